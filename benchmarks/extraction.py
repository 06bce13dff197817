"""How much faster the pipeline extracts than a straightforward reading of the method.

    python -m benchmarks.extraction --json extraction.json

The straightforward reading runs prompt after prompt, keeps the attention matrices of all layers, runs
the prompts once to choose tokens and again to learn, and learns with ``hidden_size × hidden_size``
matrices. It is written here from the method's description and shares the prompts alone with the
pipeline. Both run on one thread, each in a process of its own; memory is what a process takes beside
the loaded model.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.extract.capture import (
    PATHS,
    REFERENCE,
    CaptureOptions,
    CapturePath,
    capture,
)
from vllm_steer.offline.extract.learning import ConceptLearner, ExtractionJob
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.models.batches import shared_length
from vllm_steer.offline.models.prompts import (
    RenderedPrompt,
    count_candidates,
    prefix_for,
    render_prompt,
)
from vllm_steer.offline.questions.statements import statements

CONCEPTS = (
    "spiders",
    "enclosed spaces",
    "heights",
    "needles",
    "thunder",
    "clowns",
    "mirrors",
    "dolls",
)
BANDWIDTHS = (1.0, 10.0, 100.0)
LAYERS = (4, 8, 16, 32)
SYSTEM = "Answer in a few words. Today is a day in May."
# What is spent once is shared by the concepts of the paper's benchmark.
WORKLOAD = 512


@dataclass(frozen=True, eq=False)
class Run:
    """What one arm took and gave.

    Attributes:
        shared_seconds: Spent once, whatever the number of concepts: loading, unprefixed prompts.
        concept_seconds: Spent on each concept.
        peak_mib: Peak memory beside the model.
        vectors: Concept to ``[layers, hidden_size]``.
        tokens: Concept to the token of each layer.
    """

    shared_seconds: float
    concept_seconds: float
    peak_mib: float
    vectors: dict[str, NDArray[np.float32]]
    tokens: dict[str, list[int]]


def sides(count: int) -> tuple[list[str], list[str]]:
    """Return the statements of prefixed and of unprefixed prompts."""
    texts = [statement.text for statement in statements("extract")]
    half = len(texts) // 2
    return texts[:half][:count], texts[half:][:count]


def straightforward(path: Path, concepts: Sequence[str], count: int) -> Run:
    """Extract as the method is described, without any thought of speed."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    last = count_candidates(tokenizer)
    positives, negatives = sides(count)
    vectors, tokens = {}, {}
    reset_peak()
    before, start = resident_mib(), time.perf_counter()
    for concept in concepts:
        prefix = prefix_for("fears", concept)
        prefixed = [render_prompt(tokenizer, text, prefix) for text in positives]
        plain = [render_prompt(tokenizer, text) for text in negatives]
        attention = np.array([forward(model, prompt, last)[0] for prompt in prefixed])
        chosen = attention.max(axis=0).argmax(axis=-1)
        rows, labels = [], []
        for pair in zip(prefixed, plain, strict=True):
            for prompt in pair:
                sums, states = forward(model, prompt, last)
                layers = np.arange(len(chosen))
                rows.append(states[layers, chosen])
                labels.append(sums[layers, chosen])
        x, y = np.array(rows), np.array(labels)
        vectors[concept] = np.stack(
            [dense_rfm(x[:, layer], y[:, layer]) for layer in range(1, x.shape[1])]
        )
        tokens[concept] = (chosen[1:] - last).tolist()
    seconds = time.perf_counter() - start
    return Run(0.0, seconds / len(concepts), peak_mib() - before, vectors, tokens)


@torch.inference_mode()
def forward(
    model: LlamaForCausalLM, prompt: RenderedPrompt, last: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the prefix sums ``[layers, last]`` and states ``[layers, last, hidden]`` of a prompt."""
    final: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    output = model(
        torch.tensor([prompt.token_ids]), output_attentions=True, output_hidden_states=True
    )
    handle.remove()
    begin, end = prompt.prefix_span
    sums = [w[0, :, -last:, begin:end].sum(dim=-1).mean(dim=0) for w in output.attentions]
    # The last of Hugging Face's hidden states has passed the final norm.
    states = [state[0, -last:] for state in (*output.hidden_states[1:-1], final[0])]
    return torch.stack(sums).numpy(), torch.stack(states).numpy()


def dense_rfm(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the direction of one layer by M of ``hidden_size × hidden_size`` in float32."""
    states = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))
    labels = torch.from_numpy((y - y.min()) / (y.max() - y.min()))
    train = len(y) - int(0.2 * len(y))
    best_r, best = -1.0, states[0]
    for bandwidth in BANDWIDTHS:
        for normalise in (True, False):
            rows = states - states[:train].mean(dim=0)
            if normalise:
                rows = rows / rows.norm(dim=1, keepdim=True)
            r, vector = dense_run(rows, labels, train, bandwidth)
            if r >= best_r:
                best_r, best = r, vector
    sign = np.sign(np.corrcoef(x @ best.numpy(), y)[0, 1])
    return sign * best.numpy()


def dense_run(
    rows: torch.Tensor, labels: torch.Tensor, train: int, bandwidth: float
) -> tuple[float, torch.Tensor]:
    """Return the best |r| on the validation rows and its eigenvector, of M_1 to M_9."""
    x, y = rows[:train], labels[:train]
    matrix = torch.eye(x.shape[1])
    best_r, best = -1.0, rows[0]
    for _ in range(9):
        moved = x @ matrix
        products = moved @ x.T
        norms = products.diagonal()
        distance = (norms[:, None] + norms - 2 * products).clamp(min=0).sqrt()
        distance.fill_diagonal_(0)
        kernel = torch.exp(-distance / bandwidth)
        alpha = torch.linalg.solve(kernel + 1e-3 * torch.eye(train), y)
        ratio = torch.where(distance > 0, kernel / distance, 0.0)
        gradients = ratio @ (alpha[:, None] * moved) - (ratio @ alpha)[:, None] * moved
        gradients = gradients - gradients.mean(dim=0)
        matrix = gradients.T @ gradients
        matrix = matrix / matrix.max()
        vector = torch.lobpcg(matrix, k=1, niter=200, tol=1e-6)[1][:, 0]
        r = abs(np.corrcoef((rows[train:] @ vector).numpy(), labels[train:].numpy())[0, 1])
        if r > best_r:
            best_r, best = float(r), vector
    return best_r, best


def pipeline(path: Path, concepts: Sequence[str], count: int) -> Run:
    """Extract with the project's pipeline."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    layers = LlamaConfig.from_pretrained(path).num_hidden_layers
    positives, negatives = sides(count)
    job = ExtractionJob(
        model_path=str(path),
        settings=ExtractionSettings(),
        layers=tuple(range(1, layers)),
        candidates=count_candidates(tokenizer),
        positives=tuple(positives),
        negatives=tuple(negatives),
        probe=prefix_for("fears", concepts[0]),
        device="cpu",
        workers=1,
    )
    start = time.perf_counter()
    learner = ConceptLearner(job, tokenizer)
    shared = time.perf_counter() - start
    reset_peak()
    before, start = resident_mib(), time.perf_counter()
    learned = {c: learner.learn(c, prefix_for("fears", c), Parallel(n_jobs=1)) for c in concepts}
    seconds = time.perf_counter() - start
    return Run(
        shared,
        seconds / len(concepts),
        peak_mib() - before,
        {name: concept.vectors for name, concept in learned.items()},
        {name: concept.metrics["token"] for name, concept in learned.items()},
    )


def forward_peak(layers: int, path: CapturePath | None) -> float:
    """Return the peak memory in MiB of one forward pass of 4 prompts of 384 tokens; None: plain."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape(hidden=256, layers=layers)).eval()
    model.set_attn_implementation("eager")
    rng = np.random.default_rng(0)
    prompts = [
        RenderedPrompt("", tuple(rng.integers(3, 1000, 384).tolist()), (2, 20)) for _ in range(4)
    ]

    def once(given: Sequence[RenderedPrompt]) -> None:
        if path is None:
            with torch.inference_mode():
                model(
                    torch.tensor([prompt.token_ids for prompt in given]),
                    output_attentions=True,
                    output_hidden_states=True,
                )
        else:
            capture(model, given, candidates=4, batch_size=4, options=CaptureOptions(path))

    # What the first pass sets up is no memory of the pass.
    once([RenderedPrompt("", prompt.token_ids[:24], (2, 20)) for prompt in prompts])
    reset_peak()
    before = resident_mib()
    once(prompts)
    return peak_mib() - before


def shape(hidden: int, layers: int) -> LlamaConfig:
    """Return a Llama with heads of 64 and the demo model's vocabulary."""
    return LlamaConfig(
        vocab_size=1604,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )


def write_wide(path: Path, hidden: int, layers: int) -> None:
    """Write a random model with the demo model's tokenizer and prompts of the usual length.

    The templates of chat models begin with a system turn, about 30 tokens in Llama 3.1's, which makes
    prompts of about 70 tokens; the demo model's begins with the user's.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(shape(hidden, layers)).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.chat_template = f"<|start|>system<|sep|>\n{SYSTEM}<|end|>\n{tokenizer.chat_template}"
    tokenizer.save_pretrained(path)


def reset_peak() -> None:
    """Let the kernel count this process's peak memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the peak since ``reset_peak``."""
    return _status("VmHWM")


def resident_mib() -> float:
    """Return the memory of this process now."""
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function gives in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def cosines(ours: Run, theirs: Run) -> NDArray[np.float64]:
    """Return the cosine of every concept's vectors, block by block."""
    return np.array(
        [(ours.vectors[name] * vectors).sum(axis=1) for name, vectors in theirs.vectors.items()]
    )


def compare(
    name: str, path: Path, concepts: Sequence[str], plain: int, count: int
) -> dict[str, Any]:
    """Return the figures of both arms on one model."""
    theirs: Run = alone(straightforward, path, concepts[:plain], count)
    ours: Run = alone(pipeline, path, concepts, count)
    seconds = ours.concept_seconds + ours.shared_seconds / WORKLOAD
    similar = cosines(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prefix = prefix_for("fears", concepts[0])
    prompts = [render_prompt(tokenizer, text, prefix) for text in sides(count)[0]]
    return {
        "model": name,
        "concepts": len(concepts),
        "prompt_tokens": float(np.mean([len(prompt.token_ids) for prompt in prompts])),
        "shared_tokens": shared_length(prompts, count_candidates(tokenizer)),
        "straightforward_concepts_per_minute": 60 / theirs.concept_seconds,
        "pipeline_concepts_per_minute": 60 / seconds,
        "pipeline_shared_seconds": ours.shared_seconds,
        "pipeline_seconds_per_concept": ours.concept_seconds,
        "speedup": theirs.concept_seconds / seconds,
        "straightforward_peak_mib": theirs.peak_mib,
        "pipeline_peak_mib": ours.peak_mib,
        "min_cosine": float(similar.min()),
        "cosine_by_block": similar.min(axis=0).tolist(),
        "same_tokens": all(ours.tokens[key] == value for key, value in theirs.tokens.items()),
    }


def table(models: Sequence[dict[str, Any]], peaks: dict[str, dict[int, float]]) -> str:
    """Render all figures as one text table."""
    lines = [
        f"{f'{WORKLOAD} concepts':22s} {'concepts per minute':>29s} {'':>8s} {'peak memory, MiB':>25s} {'least':>8s}",
        f"{'model':22s} {'straightforward':>16s} {'pipeline':>12s} {'speedup':>8s} "
        f"{'straightforw.':>14s} {'pipeline':>10s} {'cosine':>8s}",
    ]
    lines += [
        f"{m['model']:22s} {m['straightforward_concepts_per_minute']:16.2f} "
        f"{m['pipeline_concepts_per_minute']:12.2f} {m['speedup']:7.1f}x "
        f"{m['straightforward_peak_mib']:14.0f} {m['pipeline_peak_mib']:10.0f} {m['min_cosine']:8.5f}"
        for m in models
    ]
    lines += [
        f"{m['model']}: prompts of {m['prompt_tokens']:.0f} tokens, of which {m['shared_tokens']} shared"
        for m in models
    ]
    lines += ["", f"{'peak of a forward, MiB':28s}" + "".join(f"{n:>5d} layers" for n in LAYERS)]
    lines += [
        f"{name:28s}" + "".join(f"{by_layers[n]:12.0f}" for n in LAYERS)
        for name, by_layers in peaks.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="of the wide random model")
    parser.add_argument("--layers", type=int, default=8, help="likewise")
    parser.add_argument("--statements", type=int, default=200, help="of each side")
    parser.add_argument("--concepts", type=int, default=4, help="extracted by the pipeline")
    parser.add_argument("--plain", type=int, default=1, help="extracted straightforwardly")
    args = parser.parse_args()
    concepts = CONCEPTS[: args.concepts]
    run = partial(compare, concepts=concepts, plain=args.plain, count=args.statements)
    peaks = {
        name: {layers: alone(forward_peak, layers, path) for layers in LAYERS}
        for name, path in (
            ("straightforward", None),
            ("pipeline, eager attention", REFERENCE),
            ("pipeline", PATHS[0]),
        )
    }
    demo = run("demo model", demo_model_path())
    with tempfile.TemporaryDirectory() as directory:
        write_wide(Path(directory), args.hidden, args.layers)
        wide = run(f"random, {args.hidden} x {args.layers}", Path(directory))
    report = {
        "speedup": wide["speedup"],
        "min_cosine": wide["min_cosine"],
        "peak_memory_by_layers": {str(n): mib for n, mib in peaks["pipeline"].items()},
        "peak_memory": {name: {str(n): mib for n, mib in of.items()} for name, of in peaks.items()},
        "models": [demo, wide],
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table([demo, wide], peaks))


if __name__ == "__main__":
    main()
