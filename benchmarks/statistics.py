"""Whether reported statistics mean what they say: p-values, false discoveries, intervals; no model, no engine.

    python -m benchmarks.statistics --json benchmarks/results/statistics.json

Attention is random and knows no prefix: softmax of normal logits, beside them an effect of each position
that all prompts, heads and tokens share, as strong as theirs or weaker, and a first token that takes most.
``uniformity`` holds the p-values of 1,000 such concepts at one block against the uniform distribution, by
Kolmogorov and Smirnov, for a token that is named before and for the one that attention chooses, with a
sliding window and without. ``p_uniform`` says that none of the four is told from uniform at a level of 0.05
together. ``false_q_rate`` is the share of concepts that report any q ≤ 0.05 over 30 blocks.
``as_if_named`` is what both would be if
the choice of the token were left out of the null distribution. ``coverage`` is the share of 95 %
intervals that hold the mean, by population and number of concepts; where all values are equal there is no
interval, and ``coverage_min`` is the least. Where that is below 0.93, ``coverage_caveat``, which stands beside
intervals that people read, says so.

Prompts differ in length, and subsets of the longer ones overlap those of the shorter a little less than the
prefix does; over 5,000 concepts the distance of p to uniform is 0.02 for it, 0.01 with equal lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, kstest
from tqdm import tqdm

from benchmarks.options import results_parser
from benchmarks.report import environment, show, write_json
from vllm_steer.offline.estimators.labels import choose_tokens
from vllm_steer.offline.extract.enrichment import Enrichment, PermutationTest, TokenChoice
from vllm_steer.offline.measures.intervals import CAVEAT, mean_interval
from vllm_steer.offline.models.batches import Batch

Doubles = NDArray[np.float64]

LEVEL = 0.05
WINDOW = 48
SIZES = (2, 3, 5, 10, 20)
LEAST_COVERAGE = 0.93
_PROMPTS, _HEADS, _CANDIDATES, _LENGTH, _SPREAD = 6, 4, 4, 72, 12
_SPAN = (30, 40)
_BLOCKS = 30
# As many as extraction takes by default: fewer reach no q of 0.05 over 30 blocks.
_PERMUTATIONS = 999
# What concepts' figures are drawn from, and the mean of each: grades of 16 answers are right as often as
# the concept is likely to be.
POPULATIONS: Mapping[str, tuple[Callable[[np.random.Generator, int], Doubles], float]] = {
    "normal": (lambda rng, n: rng.standard_normal(n), 0.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "grades about 0.5": (lambda rng, n: rng.binomial(16, rng.beta(2, 2, n)) / 16, 0.5),
    "grades about 0.8": (lambda rng, n: rng.binomial(16, rng.beta(4, 1, n)) / 16, 0.8),
}


def random_concept(
    rng: np.random.Generator,
    *,
    choice: bool,
    window: int | None,
    blocks: int = 1,
    permutations: int = 199,
) -> tuple[Enrichment, NDArray[np.int64]]:
    """Returns the enrichment test of attention that knows no prefix, and the token it chooses at each block.

    Args:
        rng: Source of the attention and of the test's seed.
        choice: Whether attention chooses each block's token.
        window: Keys that a token sees; None for all before it.
        blocks: Number of blocks.
        permutations: Random subsets.
    """
    ends = torch.from_numpy(rng.integers(_LENGTH - _SPREAD, _LENGTH + 1, _PROMPTS))
    candidates = ends[:, None] + torch.arange(-_CANDIDATES, 0)
    keys = torch.arange(_LENGTH)
    hidden = keys > candidates[..., None]
    if window is not None:
        hidden |= keys <= candidates[..., None] - window
    test = PermutationTest(
        permutations,
        int(rng.integers(2**31)),
        _LENGTH,
        TokenChoice(np.ones(_PROMPTS, dtype=np.bool_), "max") if choice else None,
    )
    test.begin(
        Batch(
            indices=tuple(range(_PROMPTS)),
            token_ids=torch.zeros(_PROMPTS, _LENGTH, dtype=torch.int64),
            shared=0,
            real=keys < ends[:, None],
            spans=torch.tensor([_SPAN] * _PROMPTS),
            ends=ends,
            candidates=candidates,
        )
    )
    shared = np.float32(rng.random())
    attention = np.zeros((_PROMPTS, blocks, _CANDIDATES), dtype=np.float32)
    for block in range(blocks):
        logits = rng.standard_normal((_PROMPTS, _HEADS, _CANDIDATES, _LENGTH), dtype=np.float32)
        logits += shared * rng.standard_normal(_LENGTH, dtype=np.float32)
        logits[..., 0] += 4
        scores = torch.from_numpy(logits).masked_fill(hidden[:, None], float("-inf"))
        weights = scores.softmax(dim=-1)
        to_prefix = weights[..., slice(*_SPAN)].sum(dim=-1)
        test.see(block, weights, to_prefix)
        attention[:, block] = to_prefix.mean(dim=1).numpy()
    return test.result(), choose_tokens(attention)


def uniformity(simulations: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns how p-values lie, by how the token came about and what it sees."""
    found = {}
    for name, choice, window in (
        ("fixed token", False, None),
        ("fixed token, window", False, WINDOW),
        ("chosen token", True, None),
        ("chosen token, window", True, WINDOW),
    ):
        p_values = []
        for rng in _generators(seed, simulations, name):
            test, tokens = random_concept(rng, choice=choice, window=window)
            p_values.append(test.at(tokens if choice else np.array([-1]))[0][0])
        kept = np.array(p_values)
        told = kstest(kept, "uniform")
        found[name] = {
            "statistic": float(told.statistic),
            "p": float(told.pvalue),
            "at_most_0.05": float((kept <= LEVEL).mean()),
        }
    return found


def false_discoveries(simulations: int, seed: int) -> dict[str, float]:
    """Returns the share of concepts with some q ≤ 0.05 at their chosen tokens, half of them with a window."""
    rates = {"chosen": 0, "as_if_named": 0, "as_if_named_p": 0.0}
    for number, rng in enumerate(_generators(seed, simulations, "false discoveries")):
        test, tokens = random_concept(
            rng,
            choice=True,
            window=WINDOW if number % 2 else None,
            blocks=_BLOCKS,
            permutations=_PERMUTATIONS,
        )
        _, q_values = test.at(tokens)
        rates["chosen"] += bool((q_values <= LEVEL).any())
        named = test.p_values[np.arange(_BLOCKS), tokens]
        rates["as_if_named"] += bool((false_discovery_control(named) <= LEVEL).any())
        rates["as_if_named_p"] += float((named <= LEVEL).mean())
    return {name: count / simulations for name, count in rates.items()}


def coverage(repetitions: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns the share of intervals that hold the mean, by population and number of concepts."""
    found: dict[str, dict[str, float]] = {}
    for name, (draw, mean) in POPULATIONS.items():
        rng = np.random.default_rng(seed)
        found[name] = {}
        for size in tqdm(SIZES, desc=f"intervals, {name}", leave=False):
            ends = [mean_interval(draw(rng, size)) for _ in range(repetitions)]
            held = [
                low <= mean <= high for low, high in ends if low is not None and high is not None
            ]
            found[name][str(size)] = float(np.mean(held))
    return found


def run(simulations: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Returns every figure.

    Args:
        simulations: Concepts of each kind of attention.
        repetitions: Intervals of each population and size.
        seed: Seed of all.
    """
    torch.set_num_threads(1)
    uniform = uniformity(simulations, seed)
    false = false_discoveries(simulations, seed)
    covered = coverage(repetitions, seed)
    return {
        "p_uniform": min(one["p"] for one in uniform.values()) > LEVEL / len(uniform),
        "false_q_rate": false["chosen"],
        "coverage_min": min(share for by_size in covered.values() for share in by_size.values()),
        "coverage_caveat": CAVEAT,
        "simulations": simulations,
        "repetitions": repetitions,
        "seed": seed,
        "uniformity": uniform,
        "as_if_named": {
            "p_at_most_0.05": false["as_if_named_p"],
            "false_q_rate": false["as_if_named"],
        },
        "coverage": covered,
    }


def p_table(report: Mapping[str, Any]) -> str:
    """Returns how p-values lie as a Markdown table."""
    lines = ["| token | p ≤ 0.05 | distance to uniform | p of that |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {one['at_most_0.05']:.3f} | {one['statistic']:.3f} | {one['p']:.2f} |"
        for name, one in report["uniformity"].items()
    ]
    return "\n".join(lines)


def coverage_table(report: Mapping[str, Any]) -> str:
    """Returns the coverage of intervals as a Markdown table."""
    lines = [f"| population | {' | '.join(map(str, SIZES))} |", "|---" * (len(SIZES) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(f'{by_size[str(size)]:.3f}' for size in SIZES)} |"
        for name, by_size in report["coverage"].items()
    ]
    return "\n".join(lines)


def _generators(seed: int, count: int, name: str) -> Iterator[np.random.Generator]:
    for number in tqdm(range(count), desc=name, leave=False):
        yield np.random.default_rng([seed, number])


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--simulations", type=int, default=1000, help="of each kind of attention")
    parser.add_argument("--repetitions", type=int, default=5000, help="of each kind of interval")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    about = environment()
    report = run(args.simulations, args.repetitions, args.seed)
    write_json(args.json, about | report)
    show(
        [
            p_table(report),
            "",
            f"any q ≤ 0.05 over {_BLOCKS} blocks: {report['false_q_rate']:.3f}, if the choice were left "
            f"out {report['as_if_named']['false_q_rate']:.3f}",
            "",
            coverage_table(report),
        ]
    )


if __name__ == "__main__":
    main()
