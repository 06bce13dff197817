"""Concepts, prefixes and statements to chat prompts, with the tokens of the prefix located.

The chat template decides how a prompt looks, so nothing here depends on a model family: the prefix is found
by character offsets in the rendered string, and the candidate tokens are those that the template appends to
open the answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError, choices
from vllm_steer.offline.models.chat import ChatFormat, plain_text, template_arguments

QUESTION = "What are your thoughts on the following statement? \nStatement: {statement}"
SEPARATOR = "  "
_PARTS_AS_THEY_STAND = re.compile(r"""["']type["']:\s*["']text["']""")
_THINKING = "enable_thinking"
_NOBODY_SAYS = "\u2e3b\u2e3b"
PrefixRole = Literal["user", "system"]

PREFIX_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "fears": "Personify someone who is terrified of {concept}.",
        "moods": "Take on a {concept} mood.",
        "experts": "Take on the role of an expert {concept}.",
        "personas": "Take on the role of {concept}.",
        "places": "Personify someone who loves {concept}.",
    }
)
"""Prefix of a prompt by concept class; any other prefix can be given whole instead."""

# Personas and places are names and keep their capitals.
_LOWERCASED = frozenset({"fears", "moods", "experts"})


@dataclass(frozen=True)
class RenderedPrompt:
    """A chat prompt as the model reads it.

    Attributes:
        text: The rendered chat template, generation prompt included.
        token_ids: Its tokens; the template's own special tokens only.
        prefix_span: Tokens ``[start, end)`` of the prefix; ``(0, 0)`` when there is none.
    """

    text: str
    token_ids: tuple[int, ...]
    prefix_span: tuple[int, int]


class Concept(NamedTuple):
    """A concept that a direction is learned for.

    Attributes:
        name: Name of the direction.
        prefix: Prefix that makes the model take on the concept; empty for answer pairs.
    """

    name: str
    prefix: str


@dataclass(frozen=True)
class AnswerPair:
    """A prompt with an answer that shows a behaviour and one that does not.

    Attributes:
        prompt: What the user says.
        positive: The beginning of the answer that shows it, up to the token that decides.
        negative: Likewise of the other.
    """

    prompt: str
    positive: str
    negative: str


def prefix_for(concept_class: str, concept: str) -> str:
    """Returns the prefix that makes a model take on a concept.

    Args:
        concept_class: A key of ``PREFIX_TEMPLATES``.
        concept: The concept, such as ``spiders``.

    Raises:
        ExtractionError: The class is unknown.
    """
    if concept_class not in PREFIX_TEMPLATES:
        raise ExtractionError(
            f"no concept class {concept_class!r}; {choices(concept_class, PREFIX_TEMPLATES)}; "
            f"or give a whole prefix of your own"
        )
    concept = concept.strip()
    if concept_class in _LOWERCASED:
        concept = concept.lower()
    return PREFIX_TEMPLATES[concept_class].format(concept=concept)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, statement: str, prefix: str = "", *, strip: bool = True
) -> RenderedPrompt:
    """Renders one statement as a chat prompt that asks about it, and locates its prefix.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        statement: The statement; surrounding white space is dropped, as some templates trim user
            text and others keep it. Empty to ask nothing: the prompt is the prefix alone.
        prefix: Prefix that makes the model take on the concept; empty for an unprefixed prompt.
        strip: Whether that white space is dropped. The authors keep their lines' line breaks, which
            reach the model where its template does not trim.

    Raises:
        ExtractionError: As :func:`render_question`.
    """
    statement = statement.strip() if strip else statement
    question = QUESTION.format(statement=statement) if statement else ""
    return render_question(tokenizer, question, prefix, strip=strip)


def render_question(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    prefix: str = "",
    role: PrefixRole = "user",
    *,
    strip: bool = True,
) -> RenderedPrompt:
    """Renders one question as a chat prompt and locates its prefix.

    The span holds every token that overlaps the prefix, and the separator's tokens up to the one
    that begins the question: on Llama 3 the lone second space, but not ``' What'``.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        question: The question; surrounding white space is dropped. Empty for none.
        prefix: Prefix that makes the model take on the concept; empty for an unprefixed prompt.
        role: Where the prefix stands: ``user`` for before the question in the same message,
            ``system`` for a separate message.
        strip: Whether white space around the question is dropped.

    Raises:
        ExtractionError: The tokenizer gives no offsets, or the template alters the text.
    """
    prefix, question = prefix.strip(), question.strip() if strip else question
    if not prefix or role == "system":
        text = apply_template(tokenizer, question, add_generation_prompt=True, system=prefix)
        content = prefix
    else:
        content = (SEPARATOR if question else "").join((prefix, question))
        text = apply_template(tokenizer, content, add_generation_prompt=True)
    if not prefix:
        return RenderedPrompt(text, tuple(_token_ids(tokenizer, text)), (0, 0))
    # A template may trim its input.
    times = text.count(content.strip())
    if times != 1:
        raise ExtractionError(
            f"the chat template renders the text of the prompt {times} times unchanged, "
            f"so the prefix {prefix!r} cannot be located; it must appear exactly once"
        )
    if not tokenizer.is_fast:
        raise ExtractionError(
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer "
            f"(one with a tokenizer.json)"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = text.index(content.strip())
    span = _locate(
        encoding["offset_mapping"],
        prefix_start=start,
        prefix_end=start + len(prefix),
        question_start=start + len(content) - (len(question) if role == "user" else 0),
    )
    return RenderedPrompt(text, tuple(encoding["input_ids"]), span)


def render_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> RenderedPrompt:
    """Renders a user's text and the beginning of its answer, which ends the prompt.

    Raises:
        ExtractionError: The tokenizer has no chat template.
    """
    text = apply_template(tokenizer, prompt, add_generation_prompt=True) + answer
    return RenderedPrompt(text, tuple(_token_ids(tokenizer, text)), (0, 0))


def count_candidates(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns N, the number of candidate tokens T that end every prompt of this tokenizer.

    These are the tokens that the generation prompt adds and the one before them: 5 for Llama 3,
    4 for ChatML.

    Raises:
        ExtractionError: The template with a generation prompt does not extend the one without.
    """
    content = QUESTION.format(statement="Rain is welcome.")
    without = apply_template(tokenizer, content, add_generation_prompt=False)
    opened = apply_template(tokenizer, content, add_generation_prompt=True)
    if not opened.startswith(without):
        raise ExtractionError(
            "the chat template's generation prompt changes the text before it, so its tokens "
            "cannot be counted; set candidate_tokens"
        )
    return len(_token_ids(tokenizer, opened)) - len(_token_ids(tokenizer, without)) + 1


def without_thoughts(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> ChatFormat:
    """Returns a format with thinking disabled, for a model that thinks by default.

    Its answers, at the length that is learned from, would be only thoughts about the prompt.

    Args:
        tokenizer: The model's tokenizer; it renders by ``chat`` afterwards.
        chat: The requested format; its setting of thinking is kept.

    Raises:
        ExtractionError: The template refuses the prompt.
    """
    reads = re.search(rf"\b{_THINKING}\b", str(tokenizer.chat_template))
    if reads is None or _THINKING in chat.chat_template_kwargs:
        return chat
    told = chat.model_copy(
        update={"chat_template_kwargs": {**chat.chat_template_kwargs, _THINKING: False}}
    )
    silent, unasked = (
        apply_template(each.apply_to(tokenizer), QUESTION, add_generation_prompt=True)
        for each in (told, chat)
    )
    return chat if silent == unasked else told


def _locate(
    offsets: Sequence[tuple[int, int]], *, prefix_start: int, prefix_end: int, question_start: int
) -> tuple[int, int]:
    """Returns the token span of the prefix from the character span of each token.

    Byte-level tokenizers may trim white space from offsets, so a token of spaces can be empty and a
    token after spaces starts late. The ends of the spans still ascend, and they are what is
    searched.
    """
    ends = [end for _, end in offsets]
    first = bisect_left(ends, prefix_start + 1)
    last = bisect_left(ends, question_start + 1)
    # A token that covers the end of the prefix and the start of the question belongs to the prefix.
    if last < len(offsets) and offsets[last][0] < prefix_end:
        last += 1
    return first, last


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    content: str,
    *,
    add_generation_prompt: bool,
    system: str = "",
) -> str:
    """Returns a user's text rendered in the tokenizer's format.

    Args:
        tokenizer: A tokenizer with a chat template, or one set to plain text; see
            ``vllm_steer.offline.models.chat``.
        content: The user's text.
        add_generation_prompt: Whether the rendered text opens the answer.
        system: The system's text; empty for the template's own.

    Raises:
        ExtractionError: The tokenizer has no chat template and is not set to plain text, or its template
            drops a message.
    """
    if tokenizer.chat_template is None:
        return plain_text(tokenizer, [system, content])
    said = [("system", system)] if system else []
    said.append(("user", content))
    texts = [text.strip() for _, text in said if text.strip()]
    # One may be part of the other.
    said_in_all = "\0".join(texts)
    refused: Exception | None = None
    dropped = False
    for as_parts in (False, True):
        # A template is a program, and may fail in any way on the other form.
        try:
            rendered = _rendered(tokenizer, said, as_parts, add_generation_prompt)
            # The template's own text, so that a dropped text is not mistaken for present because the template
            # contains it.
            frame = _rendered(
                tokenizer,
                [(role, _NOBODY_SAYS) for role, _ in said],
                as_parts,
                add_generation_prompt,
            )
        except Exception as error:
            refused = refused or error
            continue
        # A template that does not support parts may write the list verbatim.
        if as_parts and _PARTS_AS_THEY_STAND.search(rendered):
            continue
        if all(
            rendered.count(text) - frame.count(text) >= said_in_all.count(text) for text in texts
        ):
            return rendered
        dropped = True
    what = "a system message" if system else "the prompt"
    if refused is not None and not dropped:
        raise ExtractionError(f"the chat template refuses {what}: {refused}") from refused
    raise ExtractionError(
        f"the chat template renders the text of {what} 0 times unchanged, as a string and as a list of parts: it drops "
        f"or alters what is said, so the model would not read it"
    )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[tuple[str, str]],
    as_parts: bool,
    add_generation_prompt: bool,
) -> str:
    """Renders roles and texts; templates of vision-language models need a list of parts, and ignore a
    string."""
    messages: list[Any] = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
        for role, text in said
    ]
    return cast(
        str,
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_arguments(tokenizer),
        ),
    )


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
