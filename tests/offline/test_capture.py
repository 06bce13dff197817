from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from tests.offline.conftest import TINY
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.capture import (
    PATHS,
    REFERENCE,
    CaptureOptions,
    CapturePath,
    capture,
    choose_path,
)
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.models.prompts import RenderedPrompt, render_prompt

PREFIX = "Personify someone who is terrified of spiders."
CANDIDATES = 4


@pytest.fixture(scope="module")
def prompts(chatml) -> list[RenderedPrompt]:
    """Prompts of unequal lengths and unequal prefixes, in no order of length."""
    statements = ["rain is good, and so is the sun that follows it.", "no.", "rain is good.", "we"]
    prefixes = [PREFIX, PREFIX * 2, "", PREFIX]
    return [render_prompt(chatml, s, p) for s, p in zip(statements, prefixes, strict=True)]


@pytest.fixture(scope="module")
def reference(tiny_model, prompts):
    """Plain outputs of Hugging Face, one prompt at a time."""
    outputs = []
    for prompt in prompts:
        with torch.inference_mode():
            outputs.append(
                tiny_model(
                    torch.tensor([prompt.token_ids]),
                    output_attentions=True,
                    output_hidden_states=True,
                )
            )
    return outputs


def test_attention_is_the_head_mean_of_the_prefix_sum(tiny_model, prompts, reference):
    captured = capture(tiny_model, prompts, candidates=CANDIDATES, batch_size=1)
    assert captured.attention.shape == (4, 3, CANDIDATES)
    for index, (prompt, output) in enumerate(zip(prompts, reference, strict=True)):
        start, end = prompt.prefix_span
        for block, weights in enumerate(output.attentions):
            expected = weights[0, :, -CANDIDATES:, start:end].sum(-1).mean(0)
            np.testing.assert_allclose(captured.attention[index, block], expected, atol=1e-7)


SMALL = TINY | {"pad_token_id": 0}
WINDOWED = {"sliding_window": 8, "num_key_value_heads": 2, "head_dim": 8}
WHOLE, ROWS = CapturePath(rows=False, share=True), CapturePath(rows=True, share=True)


@pytest.mark.parametrize(
    ("config", "fastest"),
    [
        (LlamaConfig(**SMALL, num_key_value_heads=2), ROWS),
        (Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8), ROWS),
        (Gemma3TextConfig(**SMALL, **WINDOWED, layer_types=["sliding_attention", "full_attention",
                                                            "sliding_attention"]), ROWS),
        (MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3), ROWS),
        (GPTNeoXConfig(**SMALL), ROWS),
        (GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4), ROWS),
        # Soft-capped weights and attention sinks are those of eager attention alone.
        (Gemma2Config(**SMALL, **WINDOWED), WHOLE),
        (GptOssConfig(**SMALL, **WINDOWED, num_local_experts=3, num_experts_per_tok=2), WHOLE),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_shortcuts_equal_eager_attention_on_whole_prompts(config, fastest):
    """Or are not taken: the model decides, and the probe finds out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    beginning = tuple(rng.integers(3, 100, 9).tolist())
    prompts = [
        RenderedPrompt("", beginning + tuple(rng.integers(3, 100, length).tolist()), (2, 6))
        for length in (7, 12, 9, 14)
    ]
    alone = capture(model, prompts, candidates=CANDIDATES, batch_size=1)
    path = choose_path(model, prompts[:3], CANDIDATES)
    assert path == fastest
    taken = capture(
        model, prompts, candidates=CANDIDATES, batch_size=3, options=CaptureOptions(path)
    )
    assert model.config._attn_implementation == "eager"
    np.testing.assert_allclose(taken.attention, alone.attention, atol=2e-6)
    scale = np.abs(alone.hidden).max(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(taken.hidden / scale, alone.hidden / scale, atol=5e-6)
    np.testing.assert_allclose(taken.residual_norms, alone.residual_norms, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_path_gives_the_same_for_prompts_with_and_without_much_in_common(
    tiny_model, chatml, prompts, path
):
    # Of the candidates themselves nothing may be taken as shared.
    same = [render_prompt(chatml, "rain is good.", PREFIX)] * 3
    for given in (prompts, same, prompts[:1]):
        expected = capture(tiny_model, given, candidates=CANDIDATES, batch_size=1)
        found = capture(
            tiny_model, given, candidates=CANDIDATES, batch_size=2, options=CaptureOptions(path)
        )
        np.testing.assert_allclose(found.attention, expected.attention, atol=1e-6)
        scale = np.abs(expected.hidden).max()
        np.testing.assert_allclose(found.hidden / scale, expected.hidden / scale, atol=2e-6)


def test_a_shortcut_that_is_wrong_is_not_taken(tiny_llama, chatml, monkeypatch):
    few = [render_prompt(chatml, text, PREFIX) for text in ("no.", "rain is good.")]
    assert choose_path(tiny_llama, few, CANDIDATES) == ROWS
    only = tiny_llama.model.layers[1].self_attn
    monkeypatch.setattr(only, "scaling", only.scaling * 1.01)
    monkeypatch.setattr("vllm_steer.offline.extract.attention_rows._UNSUPPORTED", ("scaling",))
    assert choose_path(tiny_llama, few, CANDIDATES) == ROWS
    monkeypatch.setattr("vllm_steer.offline.extract.attention_rows._UNSUPPORTED", ("dropout",))
    assert choose_path(tiny_llama, few, CANDIDATES) == WHOLE
    monkeypatch.setattr("vllm_steer.offline.extract.capture._ROUNDING", {torch.float32: -1.0})
    assert choose_path(tiny_llama, few, CANDIDATES) == REFERENCE


def test_the_final_norm_is_applied_where_asked_for(tiny_llama, prompts):
    plain, normed = (
        capture(
            tiny_llama,
            prompts,
            candidates=CANDIDATES,
            batch_size=2,
            options=CaptureOptions(final_norm=wanted),
        ).hidden
        for wanted in (False, True)
    )
    np.testing.assert_array_equal(plain[:, :-1], normed[:, :-1])
    with torch.inference_mode():
        expected = tiny_llama.model.norm(torch.from_numpy(plain[:, -1]))
    np.testing.assert_allclose(normed[:, -1], expected, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        # Soft-capped and sliding-window attention, norms after the block's parts too.
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8),
        # As many experts as blocks.
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3),
        # Other names for everything, and attention beside the MLP.
        GPTNeoXConfig(**SMALL),
        GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_need_no_code_of_their_own(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    prompts = [
        RenderedPrompt("", tuple(rng.integers(3, 100, length).tolist()), (2, 6))
        for length in (12, 20, 15)
    ]
    captured = capture(model, prompts, candidates=CANDIDATES, batch_size=3)
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            output = model(
                torch.tensor([prompt.token_ids]), output_attentions=True, output_hidden_states=True
            )
        for block in range(3):
            expected = output.attentions[block][0, :, -CANDIDATES:, 2:6].sum(-1).mean(0)
            np.testing.assert_allclose(captured.attention[index, block], expected, atol=2e-6)
        states = output.hidden_states[2][0, -CANDIDATES:]
        scale = states.abs().max().item()
        np.testing.assert_allclose(captured.hidden[index, 1], states, atol=2e-6 * scale)


def test_prefix_sums_are_probabilities_that_grow_with_the_span(tiny_model, prompts):
    prompt = prompts[0]
    start, end = prompt.prefix_span
    length = len(prompt.token_ids)
    spans = [(0, 0), (start, start + 1), (start, end), (0, end), (0, length)]
    grown = [RenderedPrompt(prompt.text, prompt.token_ids, span) for span in spans]
    sums = capture(tiny_model, grown, candidates=CANDIDATES, batch_size=2).attention
    assert (sums[0] == 0).all()
    assert (np.diff(sums, axis=0) > 0).all()
    np.testing.assert_allclose(sums[-1], 1, atol=1e-6)


def test_hidden_states_are_the_blocks_outputs(tiny_model, prompts, reference):
    hidden = capture(tiny_model, prompts, candidates=CANDIDATES, batch_size=1).hidden
    for index, output in enumerate(reference):
        for block in range(2):
            expected = output.hidden_states[block + 1][0, -CANDIDATES:]
            np.testing.assert_allclose(hidden[index, block], expected, atol=1e-6)


def test_last_block_is_taken_before_the_final_norm(tiny_model, prompts, reference):
    hidden = capture(tiny_model, prompts, candidates=CANDIDATES, batch_size=1).hidden
    last = torch.from_numpy(hidden[0, -1])
    published = reference[0].hidden_states[-1][0, -CANDIDATES:]
    assert not torch.allclose(last, published, atol=1e-2)
    with torch.inference_mode():
        np.testing.assert_allclose(tiny_model.model.norm(last), published, atol=1e-5)


def test_results_do_not_depend_on_padding_or_on_the_batch(tiny_model, prompts):
    alone = capture(tiny_model, prompts, candidates=CANDIDATES, batch_size=1)
    together = capture(tiny_model, prompts, candidates=CANDIDATES, batch_size=4)
    reordered = capture(tiny_model, prompts[::-1], candidates=CANDIDATES, batch_size=3)
    assert len({len(prompt.token_ids) for prompt in prompts}) == 4
    scale = np.abs(alone.hidden).max()
    for attention, hidden in (
        (together.attention, together.hidden),
        (reordered.attention[::-1], reordered.hidden[::-1]),
    ):
        np.testing.assert_allclose(attention, alone.attention, atol=1e-6)
        np.testing.assert_allclose(hidden / scale, alone.hidden / scale, atol=1e-6)
    np.testing.assert_allclose(together.residual_norms, alone.residual_norms, rtol=1e-6)


@pytest.mark.parametrize("path", [REFERENCE, ROWS], ids=str)
def test_residual_norms_are_medians_over_real_tokens_but_each_prompts_first(
    tiny_model, prompts, reference, path
):
    given = {"candidates": CANDIDATES, "batch_size": 4, "options": CaptureOptions(path)}
    norms = capture(tiny_model, prompts, **given).residual_norms
    tokens = torch.cat([output.hidden_states[1][0, 1:] for output in reference]).norm(dim=-1)
    assert norms[0] == pytest.approx(np.median(tokens), rel=1e-5)
    assert norms.shape == (3,)


def test_one_attention_matrix_lives_at_a_time(tiny_llama, prompts):
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        gc.collect()
        alive.append(sum(matrix() is not None for matrix in seen))
        seen.append(weakref.ref(output[1]))

    handles = [block.self_attn.register_forward_hook(watch) for block in find_blocks(tiny_llama, 3)]
    try:
        capture(tiny_llama, prompts, candidates=CANDIDATES, batch_size=4)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 3
    assert alive == [0, 0, 0]


def test_hooks_are_taken_off_again_and_change_nothing(tiny_llama, prompts):
    ids = torch.tensor([prompts[0].token_ids])
    with torch.inference_mode():
        before = tiny_llama(ids).logits
    capture(tiny_llama, prompts, candidates=CANDIDATES, batch_size=2)
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    with torch.inference_mode():
        assert torch.equal(tiny_llama(ids).logits, before)


def test_a_model_without_attention_weights_is_refused(tiny_llama, prompts):
    tiny_llama.set_attn_implementation("sdpa")
    try:
        with pytest.raises(ExtractionError, match="attn_implementation='eager'"):
            capture(tiny_llama, prompts, candidates=CANDIDATES, batch_size=2)
    finally:
        tiny_llama.set_attn_implementation("eager")


def test_states_that_are_not_finite_are_refused(tiny_llama, prompts):
    weight = tiny_llama.model.layers[1].mlp.down_proj.weight
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(ExtractionError, match=r"blocks \[1, 2\] give NaN"):
            capture(tiny_llama, prompts, candidates=CANDIDATES, batch_size=2)
    finally:
        with torch.no_grad():
            weight.copy_(original)


def test_a_prompt_shorter_than_the_candidates_is_refused(tiny_llama):
    with pytest.raises(ExtractionError, match="2 tokens, fewer than the 4"):
        capture(tiny_llama, [RenderedPrompt("x", (1, 2), (0, 0))], candidates=4, batch_size=1)


def test_blocks_are_the_outermost_list_of_their_number():
    def layers(count: int) -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Identity()] * 3)})
                             for _ in range(count))  # fmt: skip

    model = nn.Module()
    model.decoder = layers(3)
    assert find_blocks(model, 3) is model.decoder
    with pytest.raises(ExtractionError, match="0 lists of 7"):
        find_blocks(model, 7)
    model.vision = layers(3)
    with pytest.raises(ExtractionError, match="2 lists of 3"):
        find_blocks(model, 3)
