"""What was trained, served by the engine, is what was trained: Hugging Face with the trained form in its hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import engine_arguments
from tests.offline.answers_cases import QUESTIONS, greedy
from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.models.hooks import Change
from vllm_steer.offline.models.likelihood import AnswerModel, padded
from vllm_steer.offline.models.loading import load_config, load_model, model_identity
from vllm_steer.offline.train.data import Encoder
from vllm_steer.offline.train.directions import Direction, together
from vllm_steer.offline.train.edits import clamped
from vllm_steer.offline.train.examples import Answered, Contrast
from vllm_steer.offline.train.forms import ChangingForm, where
from vllm_steer.offline.train.norms import residual_norms
from vllm_steer.offline.train.objectives.objective import Objective
from vllm_steer.offline.train.positions import Positions
from vllm_steer.offline.train.presets.preset import Bench
from vllm_steer.offline.train.presets.registry import PRESETS
from vllm_steer.offline.train.settings import TrainSettings
from vllm_steer.offline.train.trainer import Lesson, Trainer, TrainerOptions
from vllm_steer.packs.pack import MethodRecord, PackContent, SteeringPack, write_pack
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import TOLERANCE

pytestmark = pytest.mark.engine
TOKENS = 16
LAYERS = {"likelihood": (2, 3), "loreft": (1, 3, 4), "prosv": (2,), "cdas": (3,), "jola": (2, 3)}
# Two components, as an engine has room for them by default.
OWN = {
    "loreft": {"rank": 2, "rate": 0.02},
    "cdas": {},
    "prosv": {},
    "likelihood": {"rate": 0.03},
    "jola": {"rate": 0.03},
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained form with its pack."""

    objective: Objective[Any]
    positions: Positions
    pack: SteeringPack

    def steering(self) -> dict[str, Any]:
        """The whole form, at the pack's own positions and scales."""
        names = next(iter(together(self.pack)), [next(iter(self.pack.directions))])
        return {"directions": [{"name": f"{self.pack.name}/{name}"} for name in names]}

    def change(self, acting: torch.Tensor | None) -> Change:
        """What training did to hidden states."""
        form = self.objective.form
        if isinstance(form, ChangingForm):
            return form.change([0], acting)
        # A clamp is trained towards the component of another prompt, and served with the mean of them.
        unit = form.learned(0)["vectors"]
        value = torch.tensor([next(iter(self.pack.directions.values())).default_scale])
        return lambda at, hidden: where(acting, clamped(hidden, unit, value), hidden)


@dataclass(frozen=True, eq=False)
class Setting:
    """The forms, what they are asked, and an engine with their packs."""

    trained: dict[str, Trained]
    prompts: list[tuple[int, ...]]
    answers: AnswerModel
    engine: Engine


@pytest.fixture(scope="module")
def setting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    config, tokenizer = load_config(model)
    loaded = load_model(model, "float32", "cpu")
    encoder = Encoder(tokenizer, end=False)
    examples: dict[type, list[Any]] = {Answered: [], Contrast: []}
    for question in QUESTIONS[:6]:
        plain, prefixed = (
            encoder.prompt(q) for q in (question, f"{prefix('spiders')}  {question}")
        )
        positive, negative = greedy(loaded, prefixed, 12), greedy(loaded, plain, 12)
        examples[Answered].append(Answered(plain, positive, prefixed))
        examples[Contrast].append(Contrast(plain, prefixed, negative, positive))
    prompts = [encoder.prompt(question) for question in QUESTIONS[20:24]]
    norms = residual_norms(loaded, prompts)
    trained = {}
    for name, layers in LAYERS.items():
        preset = PRESETS[name]
        settings = TrainSettings(preset=name, seed=0, **OWN[name])
        skipped = encoder.template if preset.without_template else 0
        positions = Positions.parse(settings.positions, skipped)
        chosen = torch.tensor(norms[list(layers)], dtype=torch.float32)
        bench = Bench(AnswerModel(loaded, layers), chosen, 256, positions, settings)
        objective, known = preset.objective(bench), examples[preset.example]
        options = TrainerOptions(4, 6, settings.rate, every=4)
        (result,) = Trainer(objective, [Lesson(known)], options).run(None)
        found: list[Direction] = preset.directions("it", objective, result, known)
        pack = write_pack(
            tmp_path_factory.mktemp(name),
            PackContent(
                name=name,
                model=model_identity(model, config, tokenizer),
                directions=[direction.record(positions.served()) for direction in found],
                vectors={direction.name: direction.vectors for direction in found},
                method=MethodRecord(
                    name=name, settings={}, libraries={}, seed=0, data_sha256="0" * 64
                ),
                residual_norms=dict(enumerate(norms.tolist())),
            ),
        )
        trained[name] = Trained(objective, positions, pack)
    packs = [each.pack for each in trained.values()]
    engine = Engine(engine_arguments(model, packs, "affine-eager"), fork=True)
    yield Setting(trained, prompts, AnswerModel(loaded, ()), engine)
    engine.close()


@torch.no_grad()
def logs(
    answers: AnswerModel,
    prompt: tuple[int, ...],
    tokens: list[int],
    trained: Trained | None = None,
) -> np.ndarray:
    """Log-probabilities ``[tokens, vocabulary]`` of Hugging Face, with a trained form or without."""
    batch = padded([prompt], [tokens], torch.device("cpu"))
    if trained is None:
        return answers.logits(batch).log_softmax(-1).numpy()
    acting = trained.positions.mask([prompt], [tokens])
    given = trained.objective.answers
    return given.logits(batch, trained.change(acting)).log_softmax(-1).numpy()


def test_equals_what_was_trained(setting: Setting) -> None:
    """All presets and prompts in one batch."""
    cases = [(name, prompt) for name in setting.trained for prompt in setting.prompts]
    outputs = setting.engine.generate(
        [list(prompt) for _, prompt in cases],
        [setting.trained[name].steering() for name, _ in cases],
        TOKENS,
    )
    for (name, prompt), output in zip(cases, outputs, strict=True):
        expected = logs(setting.answers, prompt, output.tokens, setting.trained[name])
        assert output.tokens == expected.argmax(-1).tolist(), name
        assert np.abs(output.logprobs - expected).max() < TOLERANCE, name
        plain = logs(setting.answers, prompt, output.tokens)
        assert np.abs(output.logprobs - plain).max() > 100 * TOLERANCE, name
