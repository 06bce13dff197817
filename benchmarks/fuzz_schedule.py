"""Random schedules against the plain form: does every request get exactly its own steering?

    python -m benchmarks.fuzz_schedule --requests 2000 --json fuzz_schedule.json

Each world is one engine with a small key-value cache, so that requests are preempted, and a small
token budget, so that prompts are chunked; prefix cache, asynchronous scheduling, the number of
running requests, and whether directions may do more than be added are drawn from the world's seed. Steered
and unsteered requests arrive, some of which read directions, share prefixes, and are aborted at random.
Every token of every answer, and every score, is then held against Hugging Face with forward hooks, which sees the
whole sequence at once, without cache, batch or schedule.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import load_pack
from vllm_steer.plan.scores import SCORES_ATTRIBUTE
from vllm_steer.testing.random_pack import checkpoint_identity, write_random_pack
from vllm_steer.testing.triton import pretend_triton_backend
from vllm_steer.verify.oracle import Reference

TOLERANCE = 1e-4
WORLD_REQUESTS = 125
CONTEXT = 256
DIRECTIONS = 6
READS = 3
BLOCK = 32
TOP = 5
# Token ids of line breaks, full stops, colons and blanks, and of words that many prompts have.
FREQUENT = (201, 16, 28, 223, 291, 295, 322)


@dataclass(frozen=True)
class Wanted:
    """One request: prompt token ids, steering, answers and when it is aborted, if ever."""

    prompt: list[int]
    steering: dict[str, Any] | None
    max_tokens: int
    samples: int
    temperature: float
    prompt_logprobs: bool
    abort_after: int | None


@dataclass(frozen=True)
class Answer:
    """Token ids and, for each, the engine's log-probabilities by token id; scores ``[reads, prompt and answer]``."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float]] | None
    scores: NDArray[np.float32] | None


@dataclass(frozen=True)
class Report:
    """What one world showed.

    Attributes:
        seed: Seed that replays it.
        engine: The drawn settings of its engine.
        requests: Requests sent.
        answers: Answers compared; aborted requests have none.
        tokens: Tokens compared.
        scores: Scores compared.
        mismatches: What differed, in words.
        worst: Largest difference of a log-probability.
        worst_score: Largest difference of a score.
        aborted: Requests aborted.
        refused: Requests refused, as they would have steered or read no token; each was expected.
        preemptions: Requests that the scheduler preempted.
        cached_tokens: Prompt tokens found in the prefix cache.
    """

    seed: int
    engine: dict[str, Any]
    requests: int
    answers: int
    tokens: int
    scores: int
    mismatches: list[str]
    worst: float
    worst_score: float
    aborted: int
    refused: int
    preemptions: int
    cached_tokens: int


def random_pack(path: Path, model: Path) -> None:
    """Writes a pack of random directions at all layers of the demo model."""
    identity = checkpoint_identity(model)
    names = [f"d{number}" for number in range(DIRECTIONS)]
    write_random_pack(
        path,
        "fuzz",
        identity,
        dict.fromkeys(names, range(identity.num_layers)),
        seed=0,
        default_scale=1.0,
        safe_scale=1.0,
        residual_norm=10.0,
    )


def draw_engine(rng: random.Random) -> dict[str, Any]:
    """The settings of a world's engine."""
    return {
        "max_num_seqs": rng.choice([3, 8, 16]),
        "max_num_batched_tokens": rng.choice([16, 48, 160]),
        "num_gpu_blocks_override": rng.choice([12, 18, 40]),
        "enable_prefix_caching": rng.random() < 0.6,
        "async_scheduling": rng.random() < 0.5,
    }


def draw_request(rng: random.Random, bases: list[list[int]], layers: int, *, forms: bool) -> Wanted:
    """A request; prompts share beginnings, so that the prefix cache is hit."""
    base = rng.choice(bases)
    prompt = base[: rng.randint(1, len(base))] if rng.random() < 0.4 else list(base)
    prompt += [rng.randint(5, 500) for _ in range(rng.choice([0, 0, 1, 9, 40]))]
    sampled = rng.random() < 0.3
    return Wanted(
        prompt,
        draw_request_steering(rng, len(prompt), layers, forms=forms),
        max_tokens=rng.randint(1, 40),
        samples=rng.choice([1, 1, 2]) if sampled else 1,
        temperature=1.0 if sampled else 0.0,
        prompt_logprobs=rng.random() < 0.1,
        abort_after=rng.randint(0, 25) if rng.random() < 0.15 else None,
    )


def draw_request_steering(
    rng: random.Random, prompt_len: int, layers: int, *, forms: bool
) -> dict[str, Any] | None:
    """What a request steers and reads: both, one of them, or neither."""
    steering = draw_steering(rng, prompt_len, layers, forms=forms) if rng.random() < 0.7 else {}
    if rng.random() < 0.5:
        steering |= draw_reads(rng, prompt_len, layers)
    return steering or None


def draw_reads(rng: random.Random, prompt_len: int, layers: int) -> dict[str, Any]:
    """One to three reads, each with layers and positions of its own."""
    reads = [
        {
            "name": f"fuzz/d{number}",
            "layers": sorted(rng.sample(range(layers), rng.choice([1, 2, layers]))),
            "at": draw_ranges(rng, prompt_len),
            "when": rng.choice(["before", "after"]),
        }
        for number in rng.sample(range(DIRECTIONS), rng.randint(1, READS))
    ]
    return {"read": reads, "recompute": rng.random() < 0.3}


def draw_steering(
    rng: random.Random, prompt_len: int, layers: int, *, forms: bool
) -> dict[str, Any]:
    """One to three directions, each with a scale, layers and positions of its own, some with a form."""
    return {
        "directions": [
            {
                "name": f"fuzz/d{number}",
                "scale": round(rng.uniform(-12.0, 12.0), 3),
                "layers": sorted(rng.sample(range(layers), rng.choice([1, 3, layers]))),
                "positions": draw_positions(rng, prompt_len),
            }
            | (draw_form(rng) if forms else {})
            for number in rng.sample(range(DIRECTIONS), rng.randint(1, 3))
        ]
    }


def draw_form(rng: random.Random) -> dict[str, Any]:
    """Addition, ablation or multiplication, or one of the first two behind a soft gate.

    A hard gate would be open or closed by rounding alone.
    """
    forms: list[dict[str, Any]] = [
        {},
        {"op": "ablate", "scale": round(rng.uniform(-1.0, 2.0), 3)},
        {"op": "multiply", "scale": round(rng.uniform(-5.0, 5.0), 3)},
    ]
    form = rng.choice(forms)
    if form.get("op") == "multiply" or rng.random() < 0.5:
        return form
    probe = f"fuzz/d{rng.randrange(DIRECTIONS)}"
    gate = {"direction": probe, "above": rng.uniform(-1.0, 1.0), "slope": rng.uniform(0.2, 3.0)}
    return form | {"gate": gate}


def draw_positions(rng: random.Random, prompt_len: int) -> Any:
    """Ranges, or tokens within them by their ids; some are frequent, and the answer may have any."""
    ranges = draw_ranges(rng, prompt_len)
    if rng.random() < 0.7:
        return ranges
    ids = rng.sample(FREQUENT, 2) + [rng.randint(5, 500) for _ in range(rng.choice([0, 40]))]
    return {rng.choice(["tokens", "from_tokens"]): ids, "within": ranges}


def draw_ranges(rng: random.Random, prompt_len: int) -> str | list[list[int | None]]:
    """A name, a range from some position on, one from the prompt's end, or a short one."""
    choices: list[Callable[[], Any]] = [
        *(lambda name=name: name for name in ("all", "prompt", "generated", "last_prompt")),
        lambda: [[rng.randint(0, prompt_len + 10), None]],
        lambda: [[-rng.randint(1, prompt_len), rng.choice([None, prompt_len + 3])]],
        lambda: [[start := rng.randint(0, prompt_len), start + rng.randint(1, 20)]],
    ]
    return rng.choice(choices)()


def draw_sibling(rng: random.Random, request: Wanted) -> Wanted:
    """The same prompt and vectors at other positions: nothing else tells their blocks apart."""
    steering = request.steering or {}
    directions = [
        choice | {"positions": draw_positions(rng, len(request.prompt))}
        for choice in steering.get("directions", ())
    ]
    own = {"directions": directions} if directions else {}
    return replace(request, steering=(steering | own) or None)


def run_world(seed: int, count: int, pack: Path, runner: str) -> Report:
    """Runs one world, in a process of its own, and compares all its answers."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if runner == "v2":
        pretend_triton_backend()
    from transformers import AutoTokenizer
    from vllm import EngineArgs, LLMEngine

    model, rng = demo_model_path(), random.Random(seed)
    loaded = load_pack(str(pack))
    engine_settings, forms = draw_engine(rng), rng.random() < 0.5
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=CONTEXT,
            kv_cache_memory_bytes=2**28,
            block_size=BLOCK,
            enforce_eager=True,
            disable_log_stats=False,
            additional_config={
                "steering": {
                    "packs": [str(pack)],
                    "reads": READS,
                    "rows": 12 * engine_settings["max_num_seqs"] + 1,
                }
                | ({"ops": "affine", "rank": 4, "multiply": True} if forms else {})
            },
            **engine_settings,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    bases = [_prompt(tokenizer, number) for number in range(3)]
    layers = loaded.manifest.model.num_layers
    wanted: list[Wanted] = []
    while len(wanted) < count:
        if wanted and rng.random() < 0.4:
            wanted.append(draw_sibling(rng, rng.choice(wanted[-3:])))
        else:
            wanted.append(draw_request(rng, bases, layers, forms=forms))
    idle = {index for index, want in enumerate(wanted) if not reaches(want)}
    answers = _drive(engine, wanted, idle, rng)
    plain = Reference(model, [loaded])
    mismatches, worst, tokens = [], 0.0, 0
    scores, worst_score = 0, 0.0
    for index, answer in answers:
        fault, difference = compare(wanted[index], answer, plain)
        worst, tokens = max(worst, difference), tokens + len(answer.tokens)
        score_fault, score_difference, compared = compare_scores(wanted[index], answer, plain)
        worst_score, scores = max(worst_score, score_difference), scores + compared
        fault = fault or score_fault
        if fault:
            mismatches.append(f"seed {seed}, request {index}: {fault}; {wanted[index].steering}")
    metrics = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return Report(
        seed,
        engine_settings | {"forms": forms},
        count,
        len(answers),
        tokens,
        scores,
        mismatches,
        worst,
        worst_score,
        sum(want.abort_after is not None for want in wanted),
        len(idle),
        int(metrics["vllm:num_preemptions"]),
        int(metrics["vllm:prefix_cache_hits"]),
    )


def _prompt(tokenizer: Any, number: int) -> list[int]:
    """Three statements one after the other, some blocks of the key-value cache long."""
    tokens: list[int] = []
    for statement in statements("heldout")[3 * number : 3 * number + 3]:
        tokens += tokenizer.apply_chat_template(
            [{"role": "user", "content": user_text(statement.text)}],
            add_generation_prompt=True,
            return_dict=False,
        )
    return tokens


def reaches(want: Wanted) -> bool:
    """Whether a request steers a token that goes through the model, all but an answer's last, and each read has one."""
    prompt_len = len(want.prompt)
    starts = {"all": 0, "prompt": 0, "generated": prompt_len, "last_prompt": prompt_len - 1}

    def first(chosen: Any) -> int:
        if isinstance(chosen, dict):
            chosen = chosen["within"]
        if isinstance(chosen, str):
            return starts[chosen]
        return min(start + prompt_len if start < 0 else start for start, _ in chosen)

    steering, tokens = want.steering or {}, prompt_len + want.max_tokens - 1
    firsts = [first(choice["positions"]) for choice in steering.get("directions", ())]
    reads = [first(choice["at"]) for choice in steering.get("read", ())]
    return (not firsts or min(firsts) < tokens) and all(start < tokens for start in reads)


def _drive(
    engine: Any, wanted: list[Wanted], idle: set[int], rng: random.Random
) -> list[tuple[int, Answer]]:
    """Feeds the engine step by step; returns the finished answers with their request's index.

    Raises:
        RuntimeError: A request had no answer, or one of ``idle`` was not refused.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    answers: list[tuple[int, Answer]] = []
    waiting, steps = list(range(len(wanted)))[::-1], 0
    aborts: dict[int, list[str]] = {}
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 1, 2, 6]))):
            index = waiting.pop()
            want = wanted[index]
            params = SamplingParams(
                n=want.samples,
                max_tokens=want.max_tokens,
                temperature=want.temperature,
                ignore_eos=True,
                logprobs=TOP,
                prompt_logprobs=TOP if want.prompt_logprobs else None,
                extra_args={"steering": want.steering} if want.steering else None,
            )
            try:
                engine.add_request(str(index), {"prompt_token_ids": want.prompt}, params)
            except VLLMValidationError as error:
                if index in idle and re.search("no token (would be|is) (steered|read)", str(error)):
                    continue
                raise
            if index in idle:
                raise RuntimeError(f"request {index} steers or reads no token and was taken")
            if want.abort_after is not None:
                aborts.setdefault(steps + want.abort_after, []).append(str(index))
        engine.abort_request(aborts.pop(steps, []))
        steps += 1
        for output in engine.step():
            if output.finished:
                answers += [
                    (int(output.request_id), _answer(output, sample)) for sample in output.outputs
                ]
    finished = {index for index, _ in answers}
    asked = [i for i, want in enumerate(wanted) if want.abort_after is None and i not in idle]
    lost = [i for i in asked if i not in finished]
    if lost:
        raise RuntimeError(f"requests without an answer: {lost}")
    return [pair for pair in answers if len(pair[1].tokens) == wanted[pair[0]].max_tokens]


def _answer(output: Any, sample: Any) -> Answer:
    def plain(row: Any) -> dict[int, float]:
        return {token: entry.logprob for token, entry in row.items()}

    prompt = output.prompt_logprobs
    found = getattr(sample, SCORES_ATTRIBUTE, None)
    length = len(output.prompt_token_ids) + len(sample.token_ids)
    return Answer(
        list(sample.token_ids),
        [plain(row) for row in sample.logprobs],
        None if prompt is None else [plain(row) for row in prompt[1:]],
        None if found is None else found.to_numpy(length),
    )


def compare(want: Wanted, answer: Answer, plain: Reference) -> tuple[str, float]:
    """Returns what differs, in words or empty, and the largest difference of a log-probability."""
    prompt_len = len(want.prompt)
    expected = plain.score(want.prompt, answer.tokens, want.steering)
    rows = [(prompt_len - 1 + i, row) for i, row in enumerate(answer.logprobs)]
    rows += list(enumerate(answer.prompt_logprobs or []))
    worst = max(
        abs(value - expected[position, token])
        for position, row in rows
        for token, value in row.items()
    )
    if not worst < TOLERANCE:
        return f"log-probabilities differ by {worst:.3g}", float(worst)
    if want.temperature == 0.0:
        for number, token in enumerate(answer.tokens):
            row = expected[prompt_len - 1 + number]
            # Where two tokens lie within the tolerance, either is right.
            if row[token] < row.max() - TOLERANCE:
                return f"token {number} is {token}, not {row.argmax()}", float(worst)
    return "", float(worst)


def compare_scores(want: Wanted, answer: Answer, plain: Reference) -> tuple[str, float, int]:
    """Returns what differs, in words or empty, the largest difference of a score, and how many were compared."""
    steering = want.steering or {}
    if "read" not in steering or answer.scores is None:
        wrong = ("read" in steering) != (answer.scores is not None)
        return ("there are scores, or none, against what was asked" if wrong else ""), 0.0, 0
    expected = plain.read(want.prompt, answer.tokens, steering)
    # The last token went through no model.
    expected[:, -1] = np.nan
    given, wanted = np.isfinite(answer.scores), np.isfinite(expected)
    if (given & ~wanted).any():
        return "there are scores where nothing was to be read", 0.0, 0
    # What the prefix cache had is whole blocks at the beginning of the prompt.
    missing = np.flatnonzero((wanted & ~given).any(0))
    cached = 0 if not len(missing) else -(-(int(missing[-1]) + 1) // BLOCK) * BLOCK
    if cached and (steering["recompute"] or cached >= len(want.prompt) or given[:, :cached].any()):
        return f"scores are missing at {missing.tolist()}", 0.0, 0
    worst = float(np.abs(answer.scores - expected)[given].max(initial=0.0))
    fault = "" if worst < TOLERANCE else f"scores differ by {worst:.3g}"
    return fault, worst, int(given.sum())


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first world")
    parser.add_argument("--world", type=int, default=WORLD_REQUESTS, help="requests per engine")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner")
    args = parser.parse_args()
    if args.runner == "v2":
        # Here, since the worlds' processes import triton before they run any line of this file.
        os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    context = multiprocessing.get_context("spawn")
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "fuzz"
        random_pack(pack, demo_model_path())
        left = range(0, args.requests, args.world)
        for number, done in enumerate(tqdm(left, desc="worlds", unit="world")):
            count = min(args.world, args.requests - done)
            # A new process for each: an engine patches and holds memory for its whole process.
            with context.Pool(1) as pool:
                task = (args.seed + number, count, pack, args.runner)
                reports.append(pool.apply(run_world, task))
    mismatches = [fault for report in reports for fault in report.mismatches]
    result = {
        "requests": sum(report.requests for report in reports),
        "answers": sum(report.answers for report in reports),
        "tokens": sum(report.tokens for report in reports),
        "scores": sum(report.scores for report in reports),
        "mismatches": len(mismatches),
        "worst_logprob_difference": max(report.worst for report in reports),
        "worst_score_difference": max(report.worst_score for report in reports),
        "preemptions": sum(report.preemptions for report in reports),
        "cached_tokens": sum(report.cached_tokens for report in reports),
        "aborted": sum(report.aborted for report in reports),
        "refused": sum(report.refused for report in reports),
        "seeds": [report.seed for report in reports],
        "worlds": [asdict(report) for report in reports],
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    shown = {key: value for key, value in result.items() if key != "worlds"}
    print(json.dumps(shown, indent=2))  # noqa: T201
    for fault in mismatches[:20]:
        print(fault)  # noqa: T201
    raise SystemExit(bool(mismatches))


if __name__ == "__main__":
    main()
