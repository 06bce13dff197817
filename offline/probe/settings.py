"""What is measured of probes, and how."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.measures.detection import least_negatives
from vllm_steer.packs.probe import ReadTokens, TextScore

# Texts of a kind, of which half are held out.
LEAST = 10


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are measured.

    Attributes:
        rates: False-positive rates that thresholds are chosen for.
        layers: Layers that are measured; None for all that the direction has a vector for.
        score: What the score of a text is. ``max`` is what a rule that ends an answer goes by.
        tokens: Whether the model's answer is read or the prompt.
        max_tokens: Longest answer.
        seed: Seed of the halves and of the bootstrap.
    """

    rates: tuple[float, ...] = (0.01, 0.05)
    layers: tuple[int, ...] | None = None
    score: TextScore = "max"
    tokens: ReadTokens = "generated"
    max_tokens: int = 48
    seed: int = 0

    def check(self, positives: int, negatives: int) -> None:
        """Checks that the settings make sense for so many texts.

        Raises:
            EvaluationError: They do not; the message says what would be right.
        """
        if not self.rates or not all(0 < rate < 1 for rate in self.rates):
            raise EvaluationError(
                f"--fpr: rates must be between 0 and 1, such as 0.01, not {self.rates}"
            )
        if self.max_tokens < 2:
            raise EvaluationError(
                f"--max-tokens must be at least 2, not {self.max_tokens}: the last token of an answer is not read"
            )
        if not 0 <= self.seed < 2**64:
            raise EvaluationError(f"--seed must be between 0 and 2^64 - 1, not {self.seed}")
        for option, count in (("--positive", positives), ("--negative", negatives)):
            if count < LEAST:
                raise EvaluationError(
                    f"{option}: {count} texts are too few; give {LEAST} at least, half of which are held out"
                )
        # The first half is the larger one.
        needed = 2 * least_negatives(min(self.rates)) - 1
        if negatives < needed:
            raise EvaluationError(
                f"--negative: a false-positive rate of {min(self.rates):g} needs {needed} texts at least, half of which are "
                f"held out, and there are {negatives}; give more texts, or a higher --fpr"
            )
