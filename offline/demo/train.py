"""Train the demo model.

    python -m vllm_steer.offline.demo.train --out DIR

An ordinary Llama, trained in stages to predict the answers of the generated corpus. The first
stage learns to answer; the next two restrict attention more and add noise to the residual stream,
so that the concept is carried in many places and repeating the statement withstands disturbance;
the last rehearses steering (``vllm_steer.offline.demo.rehearsal``). About twenty minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_steer.offline.demo.batches import IGNORE, Batch, Masking, training_batches
from vllm_steer.offline.demo.corpus import Mixture
from vllm_steer.offline.demo.rehearsal import Rehearsal
from vllm_steer.offline.demo.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Stage:
    """One stage of training, with its own learning-rate cycle.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Highest learning rate.
        noise: Standard deviation of the noise added after each block, relative to the root mean
            square of the token's residual stream.
        masking: How attention is restricted.
        steered_share: Share of rows in which steering is rehearsed.
    """

    steps: int
    learning_rate: float
    noise: float
    masking: Masking
    steered_share: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine the checkpoint.

    Attributes:
        plain_share: Share of rows without a prefix.
        stages: The stages, in order.
    """

    hidden_size: int = 256
    num_blocks: int = 6
    num_heads: int = 4
    intermediate_size: int = 448
    max_positions: int = 1024
    batch_size: int = 48
    warmup_steps: int = 40
    final_rate: float = 0.02
    weight_decay: float = 0.3
    max_gradient_norm: float = 1.0
    plain_share: float = 0.25
    seed: int = 0
    stages: Sequence[Stage] = (
        Stage(700, 1.5e-3, 0.0, Masking(0.4, 0.0, 0.5, 6, 0.0)),
        Stage(240, 8e-4, 0.1, Masking(0.3, 0.4, 0.3, 6, 0.0)),
        Stage(240, 8e-4, 0.15, Masking(0.2, 0.4, 0.3, 6, 0.75)),
        Stage(300, 8e-4, 0.1, Masking(0.4, 0.3, 0.4, 6, 0.2), steered_share=0.25),
    )


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_blocks,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=config.hidden_size // config.num_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )


def train(config: TrainConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train the model, under a progress bar for each stage."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config.seed)
    model = build_model(config, tokenizer).train()
    # One for all stages, so that the means are known long before the first stage that needs them.
    rehearsal = Rehearsal(model.model.layers, config.hidden_size)
    for number, stage in enumerate(config.stages):
        batches = training_batches(
            tokenizer,
            seed=config.seed + 100 * number,
            batch_size=config.batch_size,
            mixture=Mixture(config.plain_share, stage.steered_share),
            masking=stage.masking,
            num_blocks=config.num_blocks,
        )
        progress = tqdm(
            islice(batches, stage.steps), f"stage {number + 1}", stage.steps, unit="step"
        )
        _run_stage(model, config, stage, rehearsal, progress)
    return model.eval(), tokenizer


def _run_stage(
    model: LlamaForCausalLM,
    config: TrainConfig,
    stage: Stage,
    rehearsal: Rehearsal,
    progress: tqdm[Batch],
) -> None:
    optimizer = _optimizer(model, config, stage)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, stage.steps, config)
    )
    for batch in progress:
        chosen = batch.targets != IGNORE
        with (
            _disturbed(model, batch.masks, stage.noise),
            rehearsal.around(batch),
            torch.autocast("cpu", torch.bfloat16),
        ):
            hidden = model.model(input_ids=batch.input_ids)[0]
            logits = model.lm_head(hidden[chosen])
        loss = F.cross_entropy(logits.float(), batch.targets[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


@contextmanager
def _disturbed(model: LlamaForCausalLM, masks: torch.Tensor, noise: float) -> Iterator[None]:
    """Gives every block its own attention mask and adds noise to its output."""

    def mask(index: int) -> Any:
        return lambda _block, args, kwargs: (args, {**kwargs, "attention_mask": masks[index]})

    def disturb(_block: nn.Module, _args: Any, hidden: torch.Tensor) -> torch.Tensor:
        scale = hidden.detach().pow(2).mean(-1, keepdim=True).sqrt()
        return hidden + noise * scale * torch.randn_like(hidden)

    handles = []
    for index, block in enumerate(model.model.layers):
        handles.append(block.register_forward_pre_hook(mask(index), with_kwargs=True))
        if noise:
            handles.append(block.register_forward_hook(disturb))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _optimizer(model: LlamaForCausalLM, config: TrainConfig, stage: Stage) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)


def _rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a Hugging Face directory, weights rounded to bfloat16."""
    stored = deepcopy(model).to(torch.bfloat16)  # type: ignore[arg-type]  # untyped decorator
    stored.config.use_cache = True
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    stored.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Transformers 5 names the class after its backend; older releases and vLLM know this name.
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    save(*train(TrainConfig()), args.out)


if __name__ == "__main__":
    main()
