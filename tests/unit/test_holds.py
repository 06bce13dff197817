"""Content that a request of the engine needs is not forgotten before it is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.conftest import resolved
from vllm_steer.engine.holds import HOLDS, ContentHolds, release_held
from vllm_steer.engine.intake import check_intake
from vllm_steer.errors import PackError, RequestError
from vllm_steer.pack import SteeringPack
from vllm_steer.plan_message import encode_plan
from vllm_steer.registry import PackRegistry
from vllm_steer.request import PLAN_KEY
from vllm_steer.steering_plan import Segment, SteeringPlan, Term
from vllm_steer.store import configured_store, keep_store


def test_what_is_held_is_not_dropped() -> None:
    holds, gone = ContentHolds(), set[str]()
    holds.hold("one", ["a", "b"])
    holds.hold("other", ["b"])
    assert holds.drop_unheld(["a", "b", "c"], gone.update) == {"c"}
    holds.release("one")
    holds.release("never seen")
    assert holds.drop_unheld(["a", "b"], gone.update) == {"a"}
    holds.release("other")
    assert holds.drop_unheld(["b"], gone.update) == {"b"}
    assert gone == {"a", "b", "c"}


def test_a_request_holds_from_intake_until_the_scheduler_frees_it(fears: SteeringPack) -> None:
    config = resolved(
        packs=[str(fears.path)], digests=[fears.manifest.tensors.sha256], layers=[0, 1, 2, 3]
    )
    keep_store(config, PackRegistry([fears]))
    store = configured_store(config)
    core = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={"steering": config.model_dump()},
            model_config=SimpleNamespace(dtype="torch.float32"),
        )
    )
    digest = fears.digests["spiders"]

    def forgotten() -> set[str]:
        return HOLDS.drop_unheld([digest], store.forget)

    def request(number: int, term: Term) -> Any:
        message = encode_plan(SteeringPlan((Segment(0, None, (term,)),)))
        params = SimpleNamespace(extra_args={PLAN_KEY: message})
        return SimpleNamespace(request_id=f"request {number}", sampling_params=params)

    intake = check_intake(lambda self, request: request)
    store.remove("fears")
    taken = intake(core, request(1, Term(digest, 1.0, (1,))))
    assert forgotten() == set()
    # One that is refused holds nothing.
    with pytest.raises(RequestError, match="names layers"):
        intake(core, request(2, Term(digest, 1.0, (0,))))
    release_held(lambda self, request: None)(None, taken)
    assert forgotten() == {digest}
    with pytest.raises(PackError, match="no loaded direction has the content"):
        intake(core, request(3, Term(digest, 1.0, (1,))))
    assert forgotten() == {digest}
