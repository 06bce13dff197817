"""Steering packs of the demo model: one pack per class, extracted by the full method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_steer.offline.demo import demo_model_path, demo_scales_path
from vllm_steer.offline.demo.concepts import CONCEPTS, prefix
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.pipeline import extract_pack
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack

# The demo model's prefixed and unprefixed prompts lie far apart and its soft labels differ for
# reasons unrelated to the concept. So its RFM takes a large ridge, uncentred
# gradients, wide kernels and one iteration; see ``vllm_steer.offline.estimators.fit.RfmOptions``.
FULL_METHOD = ExtractionSettings(
    estimator="rfm",
    labels="soft",
    token="attention",
    positive_count=200,
    negative_count=200,
    rfm_ridge=100.0,
    rfm_center_gradients=False,
    rfm_iterations=1,
    rfm_bandwidths=(10.0, 100.0),
)


def extract_demo_packs(
    out: Path,
    concepts: Mapping[str, Iterable[str]] = CONCEPTS,
    settings: ExtractionSettings = FULL_METHOD,
    workers: int = 1,
) -> list[SteeringPack]:
    """Extracts one pack per class into ``out/<class>``.

    Args:
        out: Directory of the packs.
        concepts: Class to the concepts to extract.
        settings: How to extract.
        workers: Processes that fit directions.
    """
    scales = json.loads(demo_scales_path().read_text())
    texts = [statement.text for statement in statements("extract")]
    return [
        extract_pack(
            demo_model_path(),
            ExtractionData(
                [Concept(concept, prefix(concept)) for concept in chosen],
                texts[: len(texts) // 2],
                texts[len(texts) // 2 :],
            ),
            settings,
            PackTarget(name, out / name, scales[name]["default"], scales[name]["safe"]),
            ComputeResources(workers=workers),
        )
        for name, chosen in concepts.items()
    ]
