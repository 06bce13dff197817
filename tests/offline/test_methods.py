"""Each published method: its vectors are the plain formula on Hugging Face's states, its form is in the pack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from vllm_steer.cli import main
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.estimators.plane import steering_plane
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.inputs import answer_pairs
from vllm_steer.offline.extract.methods import METHODS
from vllm_steer.offline.extract.pipeline import ExtractionSettings, extract_pack
from vllm_steer.offline.models.prompts import QUESTION, SEPARATOR, AnswerPair, Concept, prefix_for
from vllm_steer.packs.pack import load_pack, raw_dose
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.resolve import resolve
from vllm_steer.request.schema import SteeringRequest

NAME = "spiders"
PREFIX = prefix_for("fears", NAME)
POSITIVES = ["rain is good.", "more bread, we say", "night is long."]
NEGATIVES = ["all sea ends", "hill was high."]
CONCEPTS = (Concept(NAME, PREFIX),)
PAIRS = [
    AnswerPair("what is rain?", "I fear it", "it is good"),
    AnswerPair("say more of the sea", "I fear the sea", "the sea"),
    AnswerPair("and the road?", "no, fear", "good road"),
]


@pytest.fixture
def extract(model_dir, tmp_path):
    def run(method, scale=1.0, pairs=None, concepts=CONCEPTS, **settings):
        return extract_pack(
            model_dir,
            ExtractionData(concepts, POSITIVES, NEGATIVES, pairs=pairs or {}),
            ExtractionSettings(method=method, **settings),
            PackTarget("fears", tmp_path / method, scale, 1.0),
            ComputeResources(device="cpu"),
        )

    return run


@pytest.fixture
def states(tiny_llama, chatml):
    """Block outputs ``[blocks, hidden_size]`` at the last token of a user's text and an answer's beginning."""

    def run(content: str, answer: str = "") -> np.ndarray:
        text = f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        found: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(lambda _m, _a, out: found.append(out[0, -1]))
            for block in tiny_llama.model.layers
        ]
        with torch.inference_mode():
            tiny_llama(torch.tensor([chatml(text + answer, add_special_tokens=False).input_ids]))
        for handle in handles:
            handle.remove()
        return torch.stack(found).double().numpy()

    return run


def asked(statement: str, prefix: str = "") -> str:
    question = QUESTION.format(statement=statement)
    return prefix + SEPARATOR + question if prefix else question


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def resolved(pack, **choice):
    """The term that a server would carry out for a request that says nothing but the name."""
    request = SteeringRequest.model_validate({"directions": [{"name": f"fears/{NAME}", **choice}]})
    return resolve(bind(request, PackRegistry.load([str(pack.path)])), 5).segments[0].terms[0]


def test_caa_of_concepts(extract, states) -> None:
    pack = extract("caa")
    every = [*POSITIVES, *NEGATIVES]
    difference = np.mean([states(asked(s, PREFIX)) - states(asked(s)) for s in every], axis=0)
    np.testing.assert_allclose(pack.vectors[NAME], difference[1:], atol=1e-4)
    assert pack.manifest.method.name == "caa"
    assert pack.directions[NAME].form.op == "add"
    assert "validation_r" not in pack.directions[NAME].metrics
    assert (resolved(pack).form.op, resolved(pack).scale) == ("add", 1.0)


def test_caa_of_answer_pairs(extract, states) -> None:
    pack = extract("caa", pairs={NAME: PAIRS})
    differences = [states(p.prompt, p.positive) - states(p.prompt, p.negative) for p in PAIRS]
    np.testing.assert_allclose(pack.vectors[NAME], np.mean(differences, axis=0)[1:], atol=1e-4)
    assert resolved(pack).form.op == "add"


def test_ablation(extract, states) -> None:
    pack = extract("ablation", layers=(0, 1, 2))
    difference = np.mean([states(asked(s, PREFIX)) for s in POSITIVES], axis=0)
    difference -= np.mean([states(asked(s)) for s in NEGATIVES], axis=0)
    np.testing.assert_allclose(pack.vectors[NAME], unit(difference), atol=1e-5)
    assert pack.directions[NAME].form.op == "ablate"
    assert METHODS["ablation"].scale == 1.0
    assert (resolved(pack).form.op, resolved(pack).scale) == ("ablate", 1.0)


def test_contrast_with_the_other_concepts(extract, states) -> None:
    others = [Concept(NAME, PREFIX), Concept("heights", prefix_for("fears", "heights"))]
    pack = extract("ablation", concepts=others, contrast="concepts")
    difference = np.mean([states(asked(s, PREFIX)) for s in POSITIVES], axis=0)
    against = [asked(s, prefix) for s, (_, prefix) in zip(NEGATIVES, others, strict=True)]
    difference -= np.mean([states(text) for text in against], axis=0)
    np.testing.assert_allclose(pack.vectors[NAME], unit(difference)[1:], atol=1e-5)
    with pytest.raises(ExtractionError, match="needs at least two concepts"):
        extract("ablation", contrast="concepts")
    with pytest.raises(ValidationError, match="needs labels 'hard'"):
        ExtractionSettings(contrast="concepts")


def test_angular(extract, states) -> None:
    pack = extract("angular", scale=30.0, layers=(0, 1, 2))
    sides = [
        unit(np.mean([unit(states(asked(s, p))) for s in texts], axis=0))
        for p, texts in ((PREFIX, POSITIVES), ("", NEGATIVES))
    ]
    candidates = sides[0] - sides[1]
    cosines = unit(candidates) @ unit(candidates).T
    first = unit(candidates)[cosines.sum(axis=1).argmax()]
    second = np.linalg.svd(candidates - candidates.mean(axis=0))[2][0]
    np.testing.assert_allclose(pack.vectors[NAME], np.stack([first] * 3), atol=1e-4)
    found = pack.vectors[f"{NAME} plane"]
    np.testing.assert_allclose(
        found * np.sign(found @ second)[:, None], np.stack([second] * 3), atol=1e-4
    )
    form = pack.directions[NAME].form
    assert (form.op, form.plane) == ("angle", f"{NAME} plane")
    assert pack.directions[f"{NAME} plane"].form is None
    term = resolved(pack)
    assert (term.form.op, term.scale) == ("angle", 30.0)
    assert term.form.partner == pack.digests[f"{NAME} plane"]


def test_prompt_only(extract, states) -> None:
    pack = extract("prompt_only")
    np.testing.assert_allclose(pack.vectors[NAME], (states(PREFIX) - states(""))[1:], atol=1e-4)
    assert resolved(pack).form.op == "add"


def test_a_plane_needs_candidates_that_span_one() -> None:
    along = np.zeros((3, 4), dtype=np.float32)
    along[:, 0] = 1, 2, 3
    for candidates in (along[:1], along):
        with pytest.raises(ExtractionError, match="plane"):
            steering_plane(candidates)


def test_scales_that_nobody_gave(extract) -> None:
    """The method's own, or one that begins at half of the residual stream's length over all layers."""
    caa = extract("caa", scale=None).directions[NAME]
    # One layer, that in the middle of three, as in its paper.
    assert (caa.default_scale, caa.layers, caa.default_layers) == (1.0, [1, 2], [1])
    angular = extract("angular", scale=None, layers=(0, 1, 2)).directions
    assert (angular[NAME].default_scale, angular[NAME].default_layers) == (60.0, None)
    assert angular[f"{NAME} plane"].default_scale == 1.0
    assert extract("ablation", scale=None).directions[NAME].default_scale == 1.0
    means = {"estimator": "mean_difference", "token": -1, "held_out": False}
    pack = extract("attention_guided", scale=None, **means)
    record = pack.directions[NAME]
    norms = {int(layer): norm for layer, norm in pack.manifest.residual_norms.items()}
    dose = raw_dose(record.default_scale, dict.fromkeys(record.layers, 1.0), norms)
    assert dose == pytest.approx(0.5, rel=5e-3)
    assert record.default_layers is None
    given = extract("attention_guided", scale=7.0, **means)
    assert given.directions[NAME].default_scale == 7.0


def test_packs_say_what_their_directions_were_learned_from(extract) -> None:
    record = extract("ablation").directions[NAME]
    assert (record.prefix.text, record.prefix.role) == (PREFIX, "user")
    assert extract("caa", pairs={NAME: PAIRS}).directions[NAME].prefix is None


def test_a_method_is_what_its_name_says() -> None:
    with pytest.raises(ValidationError, match="method 'caa' takes estimator 'mean_difference'"):
        ExtractionSettings(method="caa", estimator="rfm")
    with pytest.raises(ValidationError, match="takes a fixed token"):
        ExtractionSettings(method="ablation", token="attention")
    with pytest.raises(ValidationError, match="needs held-out prompts"):
        ExtractionSettings(held_out=False)
    assert ExtractionSettings(method="caa", paired=False, token=-2).token == -2


def test_pairs_belong_to_caa(extract) -> None:
    with pytest.raises(ExtractionError, match="belong to method 'caa'"):
        extract("ablation", pairs={NAME: PAIRS})


def test_a_pairs_file_that_is_none(tmp_path) -> None:
    file = tmp_path / "sycophancy.jsonl"
    file.write_text('{"prompt": "a", "positive": "b"}\n')
    with pytest.raises(ExtractionError, match=r"sycophancy\.jsonl: a line must be an object"):
        answer_pairs([file])


def test_command_line(model_dir, tmp_path, capsys) -> None:
    file = tmp_path / "brave.jsonl"
    file.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in PAIRS))
    out = ["--model", str(model_dir), "--name", "fears", "--out", str(tmp_path / "pack")]
    out.append("--no-calibrate")
    assert main(["extract", *out, "--pairs", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "method     caa" in shown
    assert "brave" in shown
    concepts = tmp_path / "concepts.txt"
    concepts.write_text(f"{NAME}\n")
    named = ["--concepts", str(concepts), "--class", "fears", "--method"]
    assert main(["extract", *out, *named, "angular"]) == 0
    assert load_pack(tmp_path / "pack").directions[NAME].default_scale == 60.0
    assert main(["extract", *out, *named, "ablation"]) == 0
    assert " ablate " in capsys.readouterr().out
