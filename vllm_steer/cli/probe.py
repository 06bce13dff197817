"""The ``probe`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from vllm_steer.cli.evaluation import add_engine, extras
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.packs.probe import Probe, ReadTokens, TextScore

_FILE = (
    "a text a line, which is what a user says; in a file *.jsonl an object a line, with 'prompt', a text without chat "
    "template, or 'messages', a conversation"
)


def add_probe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer probe``."""
    probe = commands.add_parser(
        "probe",
        help="measure thresholds for the scores of a pack's directions, and write them into it",
        description="Scores texts through the engine, and gives for every direction and layer how well the scores tell "
        "both kinds apart, and thresholds at false-positive rates. Thresholds and layer are chosen on one half of the "
        "texts, and what is reported is measured on the other. Requests may then name a threshold by its rate. A run "
        "that was ended goes on where it was.",
    )
    probe.add_argument("pack", type=Path, help="directory of the pack")
    probe.add_argument("--model", required=True, help="checkpoint directory or hub id")
    probe.add_argument(
        "--positive",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"texts of the concept: {_FILE}",
    )
    probe.add_argument(
        "--negative", type=Path, required=True, metavar="FILE", help="texts without it, likewise"
    )
    probe.add_argument(
        "--direction", nargs="+", metavar="NAME", help="directions that are measured (default: all)"
    )
    probe.add_argument(
        "--fpr",
        type=float,
        nargs="+",
        metavar="RATE",
        default=[0.01, 0.05],
        help="false-positive rates that thresholds are chosen for (default: 0.01 0.05); a rate needs twice 1 / RATE "
        "negative texts",
    )
    probe.add_argument(
        "--layers", type=int, nargs="+", metavar="K", help="default: all that a direction has"
    )
    probe.add_argument(
        "--score",
        choices=get_args(TextScore),
        default="max",
        help="score of a text: that of its highest, its mean or its last token (default: max, which is what a rule that "
        "ends an answer goes by, and the only one whose thresholds requests may name)",
    )
    probe.add_argument(
        "--tokens",
        choices=get_args(ReadTokens),
        default="generated",
        help="what is read: the model's answers to the texts, or the texts, but for the first token (default: generated)",
    )
    probe.add_argument(
        "--max-tokens", type=int, default=48, help="longest answer (default: %(default)s)"
    )
    probe.add_argument(
        "--seed", type=int, default=0, help="of the halves and the bootstrap (default: 0)"
    )
    probe.add_argument("--json", type=Path, metavar="FILE", help="file for all figures")
    probe.add_argument(
        "--plot", type=Path, metavar="FILE", help="PNG file of both histograms, by layer"
    )
    add_engine(probe)
    probe.set_defaults(run=_probe)


def _probe(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.probe.run import ProbeTexts, probe_pack
    from vllm_steer.offline.files import write_atomically
    from vllm_steer.offline.probe.settings import ProbeSettings
    from vllm_steer.offline.probe.texts import read_texts

    if args.plot is not None:
        with extras("plots"):
            from vllm_steer.offline.probe.picture import histograms
    settings = ProbeSettings(
        rates=tuple(args.fpr),
        layers=None if args.layers is None else tuple(args.layers),
        score=args.score,
        tokens=args.tokens,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    texts = ProbeTexts(read_texts(args.positive), read_texts(args.negative))
    pack, scores = probe_pack(
        load_pack(args.pack), args.model, texts, settings, args.direction, args.engine
    )
    if args.json is not None:
        write_atomically(args.json, json.dumps(_figures(pack, scores), indent=2) + "\n")
    if args.plot is not None:
        write_atomically(args.plot, histograms(pack, scores))
    sys.stdout.write("\n".join(_lines(pack, scores)) + "\n")


def _figures(pack: SteeringPack, names: Iterable[str]) -> dict[str, Any]:
    found = {name: probe.model_dump() for name, probe in _probes(pack, names)}
    return {"pack": pack.name, "sha256": pack.manifest.tensors.sha256, "directions": found}


def _probes(pack: SteeringPack, names: Iterable[str]) -> Iterator[tuple[str, Probe]]:
    for name in names:
        probe = pack.directions[name].probe
        assert probe is not None
        yield name, probe


def _lines(pack: SteeringPack, names: Iterable[str]) -> Iterator[str]:
    """A table of text: what the probe of each direction does at its layer."""
    yield (
        f"{'direction':<32} {'layer':>5}  {'AUROC':<18}  {'fpr':>6} {'above':>10}  {'false positives':<18}  true positives"
    )
    for name, probe in _probes(pack, names):
        best = probe.at(probe.layer)
        assert best is not None
        head = f"{name:<32} {probe.layer:>5}  {_interval(best.auroc, best.low, best.high):<18}"
        for at in best.thresholds:
            false = _interval(at.false_positives, at.false_positives_low, at.false_positives_high)
            true = _interval(at.true_positives, at.true_positives_low, at.true_positives_high)
            yield f"{head}  {at.fpr:>6g} {at.above:>10.4g}  {false:<18}  {true}"
            head = " " * len(head)


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
