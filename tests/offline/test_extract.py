from __future__ import annotations

import hashlib
import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import vllm_steer.offline.extract.learning
from vllm_steer.errors import ExtractionError, PackError
from vllm_steer.offline.estimators.fit import fit_direction
from vllm_steer.offline.estimators.labels import choose_tokens
from vllm_steer.offline.extract.capture import capture
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.figures import FIGURES_FILE, read_figures
from vllm_steer.offline.extract.inputs import statement_sides
from vllm_steer.offline.extract.pipeline import ExtractionSettings, extract_pack
from vllm_steer.offline.models.prompts import Concept, prefix_for, render_prompt
from vllm_steer.packs.pack import MANIFEST_FILE, VECTORS_FILE, load_pack

CONCEPTS = [Concept(name, prefix_for("fears", name)) for name in ("spiders", "heights")]
WORDS = ["rain", "sun", "wind", "snow", "night", "day", "sea", "hill", "road", "bread"]
POSITIVES = [f"{word} is good." for word in WORDS] + [f"more {word}, we say" for word in WORDS]
NEGATIVES = [f"{word} was long." for word in WORDS] + [f"all {word} ends" for word in WORDS]


@pytest.fixture
def extract(model_dir, tmp_path):
    """extract_pack on the tiny model, with any argument replaced."""

    def run(settings=None, out="pack", **changes):
        given = {
            "model_path": model_dir,
            "name": "fears",
            "concepts": CONCEPTS,
            "positive_statements": POSITIVES,
            "negative_statements": NEGATIVES,
            "default_scales": 1.0,
            "safe_scales": {"spiders": 2, "heights": 3},
            "path": tmp_path / out,
            "device": "cpu",
        } | changes

        def some(kind: type) -> object:
            return kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.name in given})

        data, target, resources = map(some, (ExtractionData, PackTarget, ComputeResources))
        settings = ExtractionSettings(**(settings or {}))
        return extract_pack(
            settings=settings, data=data, target=target, resources=resources, **given
        )

    return run


def content(pack) -> tuple[bytes, bytes]:
    return tuple((pack.path / file).read_bytes() for file in (MANIFEST_FILE, VECTORS_FILE))


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("estimator", ["rfm", "mean_difference"])
def test_pack_holds_unit_vectors_and_how_they_came_about(extract, model_dir, chatml, estimator):
    pack = load_pack(extract({"estimator": estimator, "seed": 7}).path)
    manifest = pack.manifest
    assert list(pack.directions) == ["spiders", "heights"]
    for name, record in pack.directions.items():
        assert record.layers == [1, 2]
        assert pack.vectors[name].shape == (2, 32)
        np.testing.assert_allclose(np.linalg.norm(pack.vectors[name], axis=1), 1, atol=1e-5)
        metrics = record.metrics
        assert set(metrics["token"]) <= {-4, -3, -2, -1}
        figures = np.array([metrics["attention_mean"], metrics["attention_max"]])
        assert (0 < figures).all()
        assert (figures[0] < figures[1]).all()
        assert (figures < 1).all()
        assert all(0 <= r <= 1 for r in metrics["validation_r"])
        for key in ("enrichment", "enrichment_p", "enrichment_q"):
            assert all(0 <= value <= 1 for value in metrics[key])
        chosen = {"bandwidth", "normalise", "iteration"} & set(metrics)
        assert len(chosen) == (3 if estimator == "rfm" else 0)
        assert all(len(values) == 2 for values in metrics.values())
    assert cosine(pack.vectors["spiders"][0], pack.vectors["heights"][0]) < 0.99999
    assert (manifest.directions[1].default_scale, manifest.directions[1].safe_scale) == (1.0, 3.0)
    model = manifest.model
    assert (model.name, model.architecture, model.model_type) == (
        "tiny",
        "LlamaForCausalLM",
        "llama",
    )
    assert (model.hidden_size, model.num_layers) == (32, 3)
    template = chatml.chat_template.encode()
    assert model.chat_template_sha256 == hashlib.sha256(template).hexdigest()
    method = manifest.method
    assert (method.name, method.seed) == ("attention_guided", 7)
    assert method.settings["estimator"] == estimator
    assert method.settings["layers"] == [1, 2]
    assert method.settings["candidate_tokens"] == 4
    assert method.settings["dtype"] == "float32"
    assert method.libraries["torch"] == torch.__version__
    assert set(manifest.residual_norms) == {"0", "1", "2"}
    assert str(model_dir.parent) not in json.dumps(manifest.model_dump(mode="json"))


def test_vectors_are_those_of_plain_hugging_face_outputs(extract, tiny_llama, chatml):
    """One concept again, prompt by prompt, with no code of the pipeline but the prompts."""
    pack = extract({"estimator": "mean_difference"})
    name, prefix = CONCEPTS[0]
    last_block: list[torch.Tensor] = []
    handle = tiny_llama.model.norm.register_forward_pre_hook(
        lambda module, args: last_block.append(args[0][0])
    )
    states, sums = [], []
    for statements, given in ((POSITIVES, prefix), (NEGATIVES, "")):
        for statement in statements:
            prompt = render_prompt(chatml, statement, given)
            with torch.inference_mode():
                output = tiny_llama(
                    torch.tensor([prompt.token_ids]),
                    output_attentions=True,
                    output_hidden_states=True,
                )
            states.append(torch.stack([output.hidden_states[2][0, -4:], last_block[-1][-4:]]))
            start, end = prompt.prefix_span
            sums.append(
                torch.stack([w[0, :, -4:, start:end].sum(-1).mean(0) for w in output.attentions])
            )
    handle.remove()
    tokens = torch.stack(sums[:20]).max(dim=0).values.argmax(dim=-1)[1:]
    assert pack.directions[name].metrics["token"] == (tokens - 4).tolist()
    for row, token in enumerate(tokens):
        picked = torch.stack([state[row, token] for state in states]).numpy()
        # 20 + 20 rows leave the last 4 of each for validation.
        difference = picked[:16].mean(0) - picked[20:36].mean(0)
        assert cosine(pack.vectors[name][row], difference) == pytest.approx(1, abs=1e-6)


def test_unprefixed_prompts_run_once_for_all_concepts(extract, monkeypatch):
    runs: list[list[bool]] = []

    def counting(model, prompts, **kwargs):
        runs.append([prompt.prefix_span != (0, 0) for prompt in prompts])
        return capture(model, prompts, **kwargs)

    monkeypatch.setattr(vllm_steer.offline.extract.learning, "capture", counting)
    extract({"estimator": "mean_difference"})
    assert runs == [[False] * 20, [True] * 20, [True] * 20]
    runs.clear()
    # The authors ask every other statement of both sides with the prefix to choose tokens on.
    extract({"estimator": "mean_difference", "compat": True}, out="compat")
    assert runs == [[False] * 20, [True] * 30, [True] * 30]


def test_every_block_is_fitted_to_its_own_labels_in_alternating_rows(extract, monkeypatch):
    captured, fitted = [], []

    def remember(kept, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            kept.append((args, result))
            return result

        return call

    monkeypatch.setattr(vllm_steer.offline.extract.learning, "capture", remember(captured, capture))
    monkeypatch.setattr(
        vllm_steer.offline.extract.learning, "fit_direction", remember(fitted, fit_direction)
    )
    pack = extract({"estimator": "mean_difference"}, concepts=CONCEPTS[:1])
    attention = captured[1][1].attention
    assert len(fitted) == 2
    for index, ((_, rows, *_), _) in enumerate(fitted):
        assert rows.name == f"concept 'spiders', block {index + 1}"
        token = pack.directions["spiders"].metrics["token"][index]
        np.testing.assert_array_equal(rows.labels[::2], attention[:, index + 1, token])
        np.testing.assert_array_equal(rows.labels[1::2], 0)
        assert rows.positive.tolist() == [True, False] * 20


def test_a_concept_does_not_depend_on_its_company(extract):
    both, alone = extract(), extract(concepts=CONCEPTS[1:], out="alone")
    np.testing.assert_array_equal(both.vectors["heights"], alone.vectors["heights"])


def test_packs_repeat_to_the_byte_whatever_the_workers_and_batches(extract):
    first = extract(workers=1)
    assert content(extract(workers=1, out="again")) == content(first)
    assert content(extract(workers=2, out="workers")) == content(first)
    batched = extract({"batch_size": 7}, out="batches")
    np.testing.assert_allclose(batched.vectors["spiders"], first.vectors["spiders"], atol=5e-4)
    assert batched.manifest.method.data_sha256 == first.manifest.method.data_sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"positive_statements": [*POSITIVES[:-1], "x"]},
        {"negative_statements": NEGATIVES[::-1]},
        {"concepts": [Concept("spiders", "Be spiders."), CONCEPTS[1]]},
    ],
)
def test_other_data_has_another_digest(extract, changes):
    settings = {"estimator": "mean_difference"}
    digests = {
        extract(settings, **given).manifest.method.data_sha256 for given in ({}, changes, {})
    }
    assert len(digests) == 2


def test_settings_decide_labels_tokens_layers_and_counts(extract):
    soft = extract()
    hard = extract({"labels": "hard"}, out="hard")
    assert (
        soft.directions["spiders"].metrics["token"] == hard.directions["spiders"].metrics["token"]
    )
    assert cosine(soft.vectors["spiders"][0], hard.vectors["spiders"][0]) < 0.9999
    fixed = extract({"token": -2, "layers": (2, 0), "positive_count": 12}, out="fixed")
    record = fixed.directions["spiders"]
    assert (record.layers, record.metrics["token"]) == ([0, 2], [-2, -2])
    assert fixed.manifest.method.name == "fixed_token"
    short = extract(
        {"token": -2, "layers": (0, 2)}, out="short", positive_statements=POSITIVES[:12]
    )
    np.testing.assert_array_equal(fixed.vectors["spiders"], short.vectors["spiders"])
    assert extract({"candidate_tokens": 1}, out="one").directions["heights"].metrics["token"] == [
        -1,
        -1,
    ]


def test_tokens_are_chosen_by_the_statistic_and_the_prompts_asked_for(extract, monkeypatch):
    seen = []

    def remember(attention, statistic):
        seen.append((len(attention), statistic))
        return choose_tokens(attention, statistic)

    monkeypatch.setattr(vllm_steer.offline.extract.learning, "choose_tokens", remember)
    one = {"concepts": CONCEPTS[:1]}
    extract({"token_statistic": "mean"}, out="mean", **one)
    extract({"compat": True, "estimator": "ridge"}, out="compat", **one)
    assert seen == [(20, "mean"), (20, "max")]


def test_compat_learns_the_last_block_after_the_final_norm(extract):
    settings = {"estimator": "mean_difference", "token": -1}
    plain, compat = extract(settings), extract({**settings, "compat": True}, out="compat")
    first, last = (
        cosine(plain.vectors["spiders"][row], compat.vectors["spiders"][row]) for row in (0, 1)
    )
    assert first > 1 - 1e-6
    assert last < 0.999


@pytest.mark.parametrize("compat", [False, True])
def test_compat_keeps_the_line_breaks_of_statements(extract, tmp_path, monkeypatch, compat):
    """The template does not trim; the last line of a file need not end in a break."""
    sides = []
    for name, statements in (("positive", POSITIVES), ("negative", NEGATIVES)):
        (tmp_path / name).write_text("\n".join(statements))
        sides.append(tmp_path / name)
    positives, negatives = statement_sides(*sides, None, strip=not compat)
    asked: list[str] = []

    def listening(model, prompts, **kwargs):
        assert all(
            p.prefix_span == (0, 0) or p.prefix_span[1] > p.prefix_span[0] + 2 for p in prompts
        )
        asked.extend(prompt.text for prompt in prompts)
        return capture(model, prompts, **kwargs)

    monkeypatch.setattr(vllm_steer.offline.extract.learning, "capture", listening)
    extract(
        {"estimator": "mean_difference", "compat": compat, "permutations": 0},
        concepts=CONCEPTS[:1],
        positive_statements=positives,
        negative_statements=negatives,
    )
    kept = [text for text in asked if "\n<|im_end|>" in text]
    assert len(asked) == (50 if compat else 40)
    # All but the last of each file.
    assert len(kept) == (48 if compat else 0)


def test_compat_keeps_what_a_template_trims_out_of_the_prefix(make_tokenizer):
    llama3 = make_tokenizer("llama3")
    prompt = render_prompt(llama3, "rain is good.\n", CONCEPTS[0][1], strip=False)
    assert prompt == render_prompt(llama3, "rain is good.", CONCEPTS[0][1])


def test_paired_statements_are_asked_both_ways(extract):
    settings = {"estimator": "mean_difference", "token": -1}
    both = POSITIVES + NEGATIVES
    paired = extract({**settings, "paired": True}, out="paired")
    given = extract(settings, positive_statements=both, negative_statements=both)
    np.testing.assert_array_equal(paired.vectors["spiders"], given.vectors["spiders"])


def test_blocks_are_chosen_by_their_enrichment(extract):
    all_blocks = extract({"layers": (0, 1, 2)})
    scores = all_blocks.directions["spiders"].metrics["enrichment"]
    for choice, expected in (("top_k", np.argmax(scores)), ("bottom_k", np.argmin(scores))):
        settings = {"layers": (0, 1, 2), "block_choice": choice, "block_count": 1}
        pack = extract(settings, out=choice)
        assert pack.directions["spiders"].layers == [expected]
        np.testing.assert_array_equal(
            pack.vectors["spiders"][0], all_blocks.vectors["spiders"][expected]
        )
    with pytest.raises(ExtractionError, match="no block reaches block_threshold 1.0"):
        extract({"block_choice": "threshold", "block_threshold": 1.0}, out="none")


def test_figures_of_all_blocks_and_tokens_lie_beside_the_pack(extract):
    pack = extract()
    figures = read_figures(pack.path)
    assert figures.directions == ["spiders", "heights"]
    assert set(figures.arrays) == {
        "attention_mean",
        "attention_max",
        "enrichment",
        "enrichment_p",
        "enrichment_q",
        "enriched_heads",
    }
    assert all(array.shape == (2, 3, 4) for array in figures.arrays.values())
    for row, (name, record) in enumerate(pack.directions.items()):
        for index, (layer, token) in enumerate(
            zip(record.layers, record.metrics["token"], strict=True)
        ):
            for key in ("attention_mean", "attention_max", "enrichment"):
                expected = pack.directions[name].metrics[key][index]
                assert figures.arrays[key][row, layer, token] == pytest.approx(expected)
        best = figures.arrays["attention_max"][row].argmax(axis=1)[record.layers] - 4
        assert best.tolist() == record.metrics["token"]
    # A token that is named before is no choice, and its p-value is that of the figures.
    fixed = extract({"token": -2}, out="fixed")
    tested = read_figures(fixed.path).arrays["enrichment_p"]
    for row, record in enumerate(fixed.directions.values()):
        assert record.metrics["enrichment_p"] == pytest.approx(tested[row, record.layers, -2])
    untested = extract({"permutations": 0}, out="untested")
    assert set(read_figures(untested.path).arrays) == {"attention_mean", "attention_max"}
    (pack.path / FIGURES_FILE).write_bytes(b"no")
    with pytest.raises(PackError, match="no readable figures"):
        read_figures(pack.path)


def test_eager_attention_and_the_fastest_way_give_the_same_pack(extract):
    fast, eager = extract(), extract({"attention": "eager"}, out="eager")
    for name, record in fast.directions.items():
        assert record.metrics["token"] == eager.directions[name].metrics["token"]
        np.testing.assert_allclose(fast.vectors[name], eager.vectors[name], atol=1e-3)


def test_a_model_in_bfloat16_gives_nearly_the_same_pack(extract):
    settings = {"estimator": "mean_difference", "token": -1}
    full = extract(settings)
    half = extract({**settings, "dtype": "bfloat16"}, out="half")
    assert half.manifest.method.settings["dtype"] == "bfloat16"
    similar = cosine(full.vectors["spiders"][1], half.vectors["spiders"][1])
    assert 0.95 < similar < 1 - 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": []}, "no concepts are given"),
        ({"concepts": [CONCEPTS[0]] * 2}, "unique name"),
        ({"concepts": [Concept("spiders", " ")]}, r"\['spiders'\] have an empty prefix"),
        (
            {"concepts": [Concept("a/b", "Be kind.")], "safe_scales": 1},
            "pack 'fears' could not be written",
        ),
        ({"name": "no good"}, "pack 'no good' could not be written"),
        ({"default_scales": {"spiders": 1.0}}, "'heights' has no default scale"),
        ({"safe_scales": 0}, "0.0:"),
        ({"positive_statements": []}, "positive statements must be given"),
        ({"negative_statements": ["fine", " "]}, "none may be empty"),
        ({"settings": {"positive_count": 21}}, "positive_count is 21, but there are 20"),
        ({"settings": {"layers": (1, 3)}}, "the model has 0 to 2"),
        ({"settings": {"token": -5}}, "tokens -4 to -1"),
        (
            {"model_path": "/nowhere/at/all"},
            "model from '/nowhere/at/all': there is no such directory",
        ),
    ],
)
def test_faulty_arguments_are_refused_before_any_prompt_runs(
    extract, monkeypatch, changes, message
):
    monkeypatch.setattr(
        vllm_steer.offline.extract.learning,
        "capture",
        lambda *args, **kwargs: pytest.fail("it ran"),
    )
    with pytest.raises(ExtractionError, match=message):
        extract(**changes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_fit_names_its_concept_and_block(extract, tmp_path, workers):
    message = "2 of 2 concepts failed: concept 'spiders', block [12]: 4 rows are too few"
    with pytest.raises(ExtractionError, match=message):
        extract({"positive_count": 2, "negative_count": 2}, workers=workers)
    assert not (tmp_path / "pack" / MANIFEST_FILE).exists()


def test_few_statements_give_no_figure_of_validation(extract, caplog):
    few = {"positive_count": 9, "negative_count": 9, "estimator": "ridge"}
    metrics = extract(few).directions["spiders"].metrics
    assert metrics["validation_r"] == [None, None]
    assert metrics["validation_rows"] == [0, 0]
    assert metrics["ridge"] == [1.0, 1.0]
    (message,) = [text for text in caplog.messages if "without validation" in text]
    assert "2 of 2 directions" in message
    assert "20 prompts of each side are enough" in message
    caplog.clear()
    metrics = extract({"estimator": "ridge"}, out="enough").directions["spiders"].metrics
    assert all(0 < r <= 1 for r in metrics["validation_r"])
    assert metrics["validation_rows"] == [8, 8]
    assert metrics["validation_candidates"] == [6, 6]
    assert caplog.messages == []


@pytest.fixture(scope="module")
def windowed_dir(tmp_path_factory, chatml, windowed_model):
    path = tmp_path_factory.mktemp("models") / "windowed"
    windowed_model.save_pretrained(path)
    chatml.save_pretrained(path)
    return path


def test_blocks_whose_window_ends_behind_the_prefix_are_left_out(extract, windowed_dir, caplog):
    """Block 1 sees 12 tokens, and more than those lie between the prefix and the prompt's end."""
    given = {"model_path": windowed_dir}
    soft = extract({"estimator": "ridge"}, **given)
    for record in soft.directions.values():
        assert record.layers == [2]
        assert len(record.metrics["token"]) == 1
    told = [text for text in caplog.messages if "blocks [1] are left out" in text]
    assert [name in text for name, text in zip(("spiders", "heights"), told, strict=True)] == [
        True
    ] * 2
    with pytest.raises(ExtractionError, match=r"no block of \[1\] pays the prefix any attention"):
        extract({"layers": (1,)}, out="none", **given)
    # Hard labels need no attention.
    hard = extract({"estimator": "ridge", "labels": "hard"}, out="hard", **given)
    assert hard.directions["spiders"].layers == [1, 2]


def test_settings_are_closed_and_checked():
    for wrong in ({"tokens": "attention"}, {"token": 0}, {"token": "last"}, {"estimator": "svm"},
                  {"batch_size": 0}, {"layers": ()}, {"labels": "fuzzy"},
                  {"estimator": "logistic"}, {"block_choice": "top_k"}, {"block_count": 2},
                  {"block_choice": "threshold", "block_count": 1}, {"block_threshold": 0.5},
                  {"block_choice": "threshold", "block_threshold": 0},
                  {"block_choice": "top_k", "block_count": 1, "permutations": 0}):  # fmt: skip
        with pytest.raises(ValidationError):
            ExtractionSettings(**wrong)
    with pytest.raises(ValidationError):
        ExtractionSettings().seed = 1
    # p-values are multiples of 1 / (permutations + 1), and the score counts those below 0.01.
    for few in (1, 99):
        with pytest.raises(ValidationError, match=f"permutations is {few}: .* needs at least 100"):
            ExtractionSettings(permutations=few)
    assert ExtractionSettings(permutations=100).permutations == 100


@pytest.mark.parametrize("layer", [1, 2])
def test_extracted_vectors_belong_to_the_output_of_their_block(extract, tiny_llama, chatml, layer):
    """Added after its block and before the final norm; added zero times it changes no bit."""
    vector = torch.tensor(extract().vectors["spiders"][layer - 1])
    ids = torch.tensor([render_prompt(chatml, "rain is good.").token_ids])

    def logits(scale: float) -> torch.Tensor:
        handle = tiny_llama.model.layers[layer].register_forward_hook(
            lambda module, args, output: output + scale * vector
        )
        with torch.inference_mode():
            result = tiny_llama(ids).logits
        handle.remove()
        return result

    with torch.inference_mode():
        plain = tiny_llama(ids, output_hidden_states=True)
        assert torch.equal(logits(0.0), plain.logits)
        changed = (logits(2.0) - plain.logits).abs().amax(dim=-1)
        assert (changed > 1e-3).all()
