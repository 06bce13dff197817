"""Writes the pack that the demo ships, from what ``vllm-steer demo --full`` has learned.

``make showcase`` does both; the card says how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.evaluate.card import CARD_FILE, write_card
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.gguf.source import KNOWN
from vllm_steer.offline.showcase import MODEL, shipped_pack
from vllm_steer.offline.showcase.learn import FULL
from vllm_steer.packs.pack import PackContent, SteeringPack, load_pack, write_pack

_MADE = """## How it was made

The model is the float32 checkpoint that `vllm-steer model {model}` writes from `{file}` of the package
`{package}` {version} (Apache-2.0; sha256 of the file `{sha256}`).
`make showcase`, from a clone, does what follows, in about an hour on two cores; the lines of the file of prefixes are
names and prefixes of the directions, `spiders: Personify someone who is terrified of spiders.` first.

```
vllm-steer extract --model "$(vllm-steer model {model})" --name {model} --prefixes {model}.prefixes --out {model}
python -m vllm_steer.offline.showcase.release {model}
```

`extract` has the engine answer everyday questions with each prefix, trains the vectors that make these answers likely
without it, and measures their strength on other questions. Another machine rounds otherwise, so it will get vectors and
figures that differ a little.
"""


def release(source: Path, target: Path) -> SteeringPack:
    """Writes a pack and its card.

    Args:
        source: Directory of the pack that was learned.
        target: Directory of the one that is shipped.

    Raises:
        ExtractionError: It is not the demo's, or not calibrated.
        PackError: It cannot be read or written.
    """
    pack = load_pack(source)
    records = list(pack.directions.values())
    if tuple((r.name, r.prefix.text if r.prefix else "") for r in records) != FULL.concepts:
        raise ExtractionError(f"{source}: its directions are not those of the demo, in their order")
    if missing := [record.name for record in records if record.calibration is None]:
        raise ExtractionError(
            f"{source}: {missing} are not calibrated; vllm-steer calibrate does it"
        )
    manifest = pack.manifest
    written = write_pack(
        target,
        PackContent(
            name=MODEL,
            model=manifest.model,
            directions=records,
            vectors=pack.vectors,
            method=manifest.method,
            residual_norms={int(layer): norm for layer, norm in manifest.residual_norms.items()},
        ),
    )
    card = write_card(written).read_text(encoding="utf-8")
    name, known = manifest.model.name, KNOWN[MODEL]
    # The model has no place that a server could fetch it from by this name.
    serve = f'vllm serve "$(vllm-steer model {MODEL})" --served-model-name {name} '
    made = _MADE.format(
        model=MODEL,
        file=known.file,
        package=known.package,
        version=known.version,
        sha256=known.sha256,
    )
    text = card.replace(f"vllm serve {name} ", serve) + f"\n{made}"
    write_atomically(target / CARD_FILE, text)
    return written


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="directory of the pack that was learned")
    parser.add_argument(
        "--out", type=Path, default=shipped_pack(), help="default: where it is shipped"
    )
    args = parser.parse_args()
    written = release(args.source, args.out)
    sys.stdout.write(f"{written.path}: {len(written.directions)} directions\n")


if __name__ == "__main__":
    main()
