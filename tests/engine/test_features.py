"""vLLM's other features beside steering: each request still equals Hugging Face with hooks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import logsumexp
from transformers import AutoModelForCausalLM

from tests.engine.cases import CASES, SPIDERS
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.engine import Engine, Output
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 16
Start = Callable[[str], Engine]


def assert_scores(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[dict[str, Any] | None],
    outputs: Sequence[Output],
) -> None:
    """Every log-probability equals that of the plain form, given the tokens before it."""
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        expected = reference.score(prompt, output.tokens, steering)
        answered = expected[len(prompt) - 1 : -1]
        assert np.abs(output.logprobs - answered).max() < TOLERANCE
        if output.prompt_logprobs is not None:
            before = expected[: len(prompt) - 1]
            assert np.abs(output.prompt_logprobs - before).max() < TOLERANCE


FEATURES = {
    "async-eager": "asynchronous scheduling",
    "eager": "synchronous scheduling",
    "ngram-eager": "speculative decoding: n-grams",
    "draft-eager": "speculative decoding: draft model",
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.feature(f, "exact")) for k, f in FEATURES.items()],
)
def test_scheduling_and_speculation(
    kind: str, start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    engine = start(kind)
    assert engine.is_asynchronous() == (kind == "async-eager")
    outputs = engine.generate(prompts, list(CASES.values()), TOKENS)
    assert_equals_hooks(reference, prompts, CASES.values(), outputs, TOKENS)
    if kind.startswith(("ngram", "draft")):
        metrics = engine.metrics()
        drafted = metrics["vllm:spec_decode_num_draft_tokens"]
        accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
        # Both happen, so positions after an accepted and after a rejected draft were checked.
        assert 0 < accepted < drafted, (accepted, drafted)


@pytest.mark.feature("log-probabilities of prompt and answer", "exact")
def test_prompt_logprobs(start: Start, prompts: list[list[int]], reference: Reference) -> None:
    steerings = list(CASES.values())
    outputs = start("eager").generate(prompts, steerings, 2, prompt_logprobs=-1)
    assert all(output.prompt_logprobs is not None for output in outputs)
    assert_scores(reference, prompts, steerings, outputs)


@pytest.mark.feature("several samples of a prompt (n > 1)", "exact")
def test_several_samples(start: Start, prompts: list[list[int]], reference: Reference) -> None:
    steerings = list(CASES.values())
    # Backwards they are unfamiliar, so that the samples differ.
    prompts = [prompt[::-1] for prompt in prompts]
    outputs = start("eager").generate(prompts, steerings, TOKENS, n=3, temperature=2.0)
    assert len({tuple(output.tokens) for output in outputs[3:6]}) > 1
    triples = [(p, s) for p, s in zip(prompts, steerings, strict=True) for _ in range(3)]
    assert_scores(reference, [p for p, _ in triples], [s for _, s in triples], outputs)


@pytest.mark.feature("structured outputs", "exact")
def test_structured_outputs(start: Start, prompts: list[list[int]], reference: Reference) -> None:
    steerings = list(CASES.values())
    regex = "[a-z]{3,8} [0-9]{2}"
    outputs = start("eager").generate(prompts, steerings, 40, regex=regex, ignore_eos=False)
    assert all(re.fullmatch(regex, output.text) for output in outputs)
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        expected = reference.score(prompt, output.tokens, steering)[len(prompt) - 1 : -1]
        # On CPU the grammar masks the logits before they become log-probabilities.
        allowed = np.isfinite(output.logprobs)
        expected = expected - logsumexp(expected, axis=1, b=allowed, keepdims=True)
        assert np.abs(output.logprobs[allowed] - expected[allowed]).max() < TOLERANCE


@pytest.mark.feature("LoRA in the same batch", "exact")
def test_lora_in_the_same_batch(
    start: Start,
    prompts: list[list[int]],
    model: Path,
    packs: list[SteeringPack],
    reference: Reference,
    tmp_path: Path,
) -> None:
    adapter, merged = make_adapter(tmp_path, model)
    steerings = list(CASES.values())
    adapters = [str(adapter) if number % 2 else None for number in range(len(prompts))]
    outputs = start("lora-eager").generate(prompts, steerings, TOKENS, adapters)
    adapted = Reference(merged, packs)
    for first, plain_form in enumerate((reference, adapted)):
        taken = slice(first, None, 2)
        assert_equals_hooks(plain_form, prompts[taken], steerings[taken], outputs[taken], TOKENS)
    steered = {"directions": [{"name": SPIDERS, "scale": 6.0}]}
    change = adapted.generate(prompts[0], steered, TOKENS).logprobs
    assert np.abs(change - reference.generate(prompts[0], steered, TOKENS).logprobs).max() > 0.01


def make_adapter(path: Path, model: Path) -> tuple[Path, Path]:
    """Writes a random LoRA adapter, and the model with the adapter merged into its weights."""
    generator = torch.Generator().manual_seed(0)
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rank, factors = 4, {}
    for name, weight in merged.named_parameters():
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            down = 0.05 * torch.randn(rank, weight.shape[1], generator=generator)
            up = 0.05 * torch.randn(weight.shape[0], rank, generator=generator)
            key = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            weight.data += up @ down
    adapter = path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged.save_pretrained(path / "merged")
    return adapter, path / "merged"
