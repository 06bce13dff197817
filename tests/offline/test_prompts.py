from __future__ import annotations

import pytest

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.models.prompts import (
    PREFIX_TEMPLATES,
    QUESTION,
    _locate,
    apply_template,
    count_candidates,
    prefix_for,
    render_answer,
    render_prompt,
    render_question,
)

PREFIX = "Personify someone who is terrified of enclosed spaces."
STATEMENT = "rain is good."
FAMILIES = ["llama3", "chatml", "gemma", "mistral", "sentencepiece"]


def span_text(tokenizer, prompt) -> str:
    start, end = prompt.prefix_span
    return tokenizer.decode(prompt.token_ids[start:end])


@pytest.mark.parametrize(
    ("family", "count"),
    [("llama3", 5), ("chatml", 4), ("gemma", 4), ("mistral", 1), ("sentencepiece", 4)],
)
def test_candidates_are_the_generation_prompt_and_one_token_before(make_tokenizer, family, count):
    tokenizer = make_tokenizer(family)
    assert count_candidates(tokenizer) == count
    tail = render_prompt(tokenizer, STATEMENT).token_ids[-count:]
    expected = {
        "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "chatml": "\n<|im_start|>assistant\n",
        "gemma": "\n<start_of_turn>model\n",
        "mistral": "[/INST]",
        "sentencepiece": "</s><s> assistant:",
    }[family]
    assert tokenizer.decode(tail) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_span_holds_the_prefix_and_its_separator_but_not_the_question(make_tokenizer, family):
    tokenizer = make_tokenizer(family)
    prompt = render_prompt(tokenizer, STATEMENT, PREFIX)
    start, end = prompt.prefix_span
    assert span_text(tokenizer, prompt).strip() == PREFIX
    assert tokenizer.decode(prompt.token_ids[end:]).startswith((" What are", "What are"))
    before = tokenizer.decode(prompt.token_ids[:start])
    # SentencePiece decodes the space that it puts before each piece of text too.
    assert before.replace(" ", "") == prompt.text[: prompt.text.index(PREFIX)].replace(" ", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_may_stand_in_a_system_message(make_tokenizer, family):
    """The user's message is then as it is without one, and the span holds the prefix alone."""
    tokenizer = make_tokenizer(family)
    prompt = render_question(tokenizer, f" {STATEMENT}", f"{PREFIX}\n", role="system")
    plain = render_question(tokenizer, STATEMENT)
    head, tail = plain.text.split(STATEMENT)
    assert prompt.text.endswith(STATEMENT + tail)
    assert PREFIX in prompt.text.removesuffix(STATEMENT + tail)
    assert STATEMENT not in span_text(tokenizer, prompt)
    assert PREFIX in span_text(tokenizer, prompt)
    start, end = prompt.prefix_span
    inner = tokenizer.decode(prompt.token_ids[start + 1 : end - 1])
    assert inner in PREFIX
    assert plain.prefix_span == (0, 0)


def test_a_template_without_a_system_role_says_so(make_tokenizer):
    tokenizer = make_tokenizer("gemma")
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            + original
        )
        assert STATEMENT in render_question(tokenizer, STATEMENT, PREFIX).text
        with pytest.raises(ExtractionError, match="refuses a system message: no system role"):
            render_question(tokenizer, STATEMENT, PREFIX, role="system")
        # Some leave it out instead.
        tokenizer.chat_template = original.replace("messages", "messages if m.role == 'user'")
        with pytest.raises(ExtractionError, match="0 times unchanged"):
            render_question(tokenizer, STATEMENT, PREFIX, role="system")
    finally:
        tokenizer.chat_template = original


def test_span_ends_with_the_lone_space_where_the_tokenizer_makes_one(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    assert span_text(tokenizer, render_prompt(tokenizer, STATEMENT, PREFIX)) == f"{PREFIX} "


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "prefix",
    [
        "Take on the role of What are your thoughts.",  # holds the question's own first words
        "Take on the role of the system user.",  # words of the template
        "Personify someone who loves São Tomé 🏝.",  # several tokens per character
        "x",
    ],
)
def test_span_is_found_for_awkward_prefixes(make_tokenizer, family, prefix):
    tokenizer = make_tokenizer(family)
    prompt = render_prompt(tokenizer, STATEMENT, prefix)
    length = prompt.prefix_span[1] - prompt.prefix_span[0]
    assert length >= 1
    offsets = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    start = prompt.text.index(f"{prefix}  What")
    overlapping = [
        index for index, (a, b) in enumerate(offsets) if a < start + len(prefix) and b > start
    ]
    assert set(overlapping) <= set(range(*prompt.prefix_span))
    assert length - len(overlapping) <= 1  # at most the separator's own token more


@pytest.mark.parametrize(
    ("offsets", "span"),
    [
        ([(0, 3), (3, 7), (7, 8), (8, 9), (9, 14), (14, 18)], (1, 4)),  # a token for each space
        ([(0, 3), (3, 8), (8, 14), (14, 18)], (1, 2)),  # spaces go to their neighbours
        ([(0, 3), (3, 6), (6, 14), (14, 18)], (1, 3)),  # one token from prefix to question
        ([(0, 4), (4, 7), (9, 9), (9, 14), (14, 18)], (0, 3)),  # template and prefix in one token
    ],
)
def test_span_follows_the_offsets_however_the_tokens_fall(offsets, span):
    # "...abcd  What is": the prefix is characters 3 to 7, the question begins at 9.
    assert _locate(offsets, prefix_start=3, prefix_end=7, question_start=9) == span


def test_user_text_is_spelled_as_the_method_wants(chatml):
    prompt = render_prompt(chatml, f"  {STATEMENT}\n", f" {PREFIX} ")
    asked = f"What are your thoughts on the following statement? \nStatement: {STATEMENT}"
    assert f"user\n{PREFIX}  {asked}<|im_end|>" in prompt.text
    assert f"user\n{asked}<|im_end|>" in render_prompt(chatml, STATEMENT).text
    assert render_prompt(chatml, STATEMENT).prefix_span == (0, 0)
    assert QUESTION.format(statement=STATEMENT) == asked


def test_prefixes_of_the_five_classes():
    assert set(PREFIX_TEMPLATES) == {"fears", "moods", "experts", "personas", "places"}
    assert prefix_for("fears", " Spiders ") == "Personify someone who is terrified of spiders."
    assert prefix_for("personas", "Ada Lovelace") == "Take on the role of Ada Lovelace."
    with pytest.raises(ExtractionError, match="did you mean 'fears'"):
        prefix_for("fear", "spiders")


def test_a_template_that_alters_the_text_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = original.replace("m.content", "m.content | upper")
        with pytest.raises(ExtractionError, match="0 times"):
            render_prompt(tokenizer, STATEMENT, PREFIX)
        tokenizer.chat_template = original.replace("m.content", "m.content + m.content")
        with pytest.raises(ExtractionError, match="2 times"):
            render_prompt(tokenizer, STATEMENT, PREFIX)
        tokenizer.chat_template = None
        with pytest.raises(ExtractionError, match="no chat template"):
            render_prompt(tokenizer, STATEMENT)
    finally:
        tokenizer.chat_template = original


# Of models that see images: content is a list of parts, and of a string nothing is rendered.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Takes strings alone, and stumbles over a list.
STRINGS = PARTS.replace(
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    "{{ m.content + '' }}",
)
DROPPING = PARTS.replace("{{ part.text }}", "")
SHORTENING = STRINGS.replace("m.content + ''", "m.content[:20]")


@pytest.fixture
def templated(make_tokenizer):
    """Sets the template of a tokenizer that others use too."""
    tokenizer = make_tokenizer("chatml")
    original = tokenizer.chat_template

    def give(template):
        tokenizer.chat_template = template
        return tokenizer

    yield give
    tokenizer.chat_template = original


@pytest.mark.parametrize("template", [PARTS, STRINGS])
def test_every_prompt_holds_what_is_said(templated, template):
    """Prefixed or not, with an answer or none, whatever the template wants content to be."""
    tokenizer = templated(template)
    assert STATEMENT in render_prompt(tokenizer, STATEMENT).text
    assert PREFIX in render_prompt(tokenizer, STATEMENT, PREFIX).text
    both = render_question(tokenizer, STATEMENT, PREFIX, role="system").text
    assert PREFIX in both
    assert STATEMENT in both
    assert render_answer(tokenizer, STATEMENT, "Yes").text.endswith("assistant\nYes")
    assert STATEMENT in render_answer(tokenizer, STATEMENT, "Yes").text
    assert count_candidates(tokenizer) == 4


@pytest.mark.parametrize("template", [DROPPING, SHORTENING])
def test_a_template_that_drops_what_is_said_is_refused(templated, template):
    tokenizer = templated(template)
    for render in (
        lambda: render_prompt(tokenizer, STATEMENT),
        lambda: render_question(tokenizer, STATEMENT, PREFIX, role="system"),
        lambda: render_answer(tokenizer, f"{STATEMENT} {STATEMENT}", "Yes"),
        lambda: count_candidates(tokenizer),
    ):
        with pytest.raises(ExtractionError, match="0 times unchanged, as a string and as a list"):
            render()


@pytest.mark.parametrize("statement", ["assistant", "user", "a", "im_start"])
def test_words_of_the_template_are_not_those_that_it_drops(templated, statement):
    """They are in what is rendered, whatever was said."""
    with pytest.raises(ExtractionError, match="0 times unchanged"):
        render_answer(templated(DROPPING), statement, "Yes")
    assert render_answer(templated(PARTS), statement, "Yes").text.count(statement) > 1


@pytest.mark.parametrize(
    ("change", "statement"),
    [
        ("part.text | e", "Salt & pepper?"),
        ("part.text | tojson", 'She said "no".'),
        ("part.text | title", "rain is good."),
        ("part.text | replace('\n', ' ')", "One.\nTwo."),
        ("part.text.split('?')[0]", "Is it? Is it not?"),
        ("part.content", "rain is good."),
    ],
)
def test_a_template_that_alters_what_is_said_is_refused(templated, change, statement):
    with pytest.raises(ExtractionError, match="0 times unchanged"):
        render_answer(templated(PARTS.replace("part.text }}", f"{change} }}}}")), statement, "Yes")


def test_a_template_that_reads_one_message_alone_is_refused_where_there_are_two(templated):
    tokenizer = templated(STRINGS.replace("for m in messages", "for m in messages[-1:]"))
    assert STATEMENT in render_question(tokenizer, STATEMENT).text
    with pytest.raises(ExtractionError, match="a system message 0 times unchanged"):
        render_question(tokenizer, STATEMENT, PREFIX, role="system")


def test_a_system_message_that_is_dropped_is_not_found_in_the_question(templated):
    tokenizer = templated(STRINGS.replace("for m in messages", "for m in messages[-1:]"))
    with pytest.raises(ExtractionError, match="a system message 0 times unchanged"):
        render_question(tokenizer, "Why is rain good?", "rain", role="system")
    said = {"add_generation_prompt": True, "system": "rain"}
    assert apply_template(templated(STRINGS), "Why is rain good?", **said).count("rain") == 2
