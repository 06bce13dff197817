"""Content that a request of the engine needs is not forgotten before it is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.conftest import resolved
from vllm_steer.engine.content_pins import PINS, ContentPins, unpin_freed
from vllm_steer.engine.intake import check_intake
from vllm_steer.engine.pack_updates import _core_forget, _core_load, forget_in_worker
from vllm_steer.engine.staging import stage
from vllm_steer.errors import PackError, RequestError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import configured_store, keep_store
from vllm_steer.plan.message import encode_plan
from vllm_steer.plan.steering_plan import Segment, SteeringPlan, Term
from vllm_steer.request.schema import PLAN_KEY


def test_what_is_pinned_is_not_dropped() -> None:
    pins, gone = ContentPins(), set[str]()
    pins.pin("one", ["a", "b"])
    pins.pin("other", ["b"])
    assert pins.drop_unpinned(["a", "b", "c"], gone.update) == {"c"}
    pins.unpin("one")
    pins.unpin("never seen")
    assert pins.drop_unpinned(["a", "b"], gone.update) == {"a"}
    pins.unpin("other")
    assert pins.drop_unpinned(["b"], gone.update) == {"b"}
    assert gone == {"a", "b", "c"}


def test_a_request_pins_its_content_from_intake_until_the_scheduler_frees_it(
    fears: SteeringPack,
) -> None:
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
        return PINS.drop_unpinned([digest], store.forget)

    def request(number: int, term: Term) -> Any:
        message = encode_plan(SteeringPlan((Segment(0, None, (term,)),)))
        params = SimpleNamespace(extra_args={PLAN_KEY: message})
        return SimpleNamespace(request_id=f"request {number}", sampling_params=params)

    intake = check_intake(lambda self, request: request)
    store.remove("fears")
    taken = intake(core, request(1, Term(digest, 1.0, (1,))))
    assert forgotten() == set()
    # One that is refused pins nothing.
    with pytest.raises(RequestError, match="names layers"):
        intake(core, request(2, Term(digest, 1.0, (0,))))
    unpin_freed(lambda self, request: None)(None, taken)
    assert forgotten() == {digest}
    with pytest.raises(PackError, match="no loaded direction has the content"):
        intake(core, request(3, Term(digest, 1.0, (1,))))
    assert forgotten() == {digest}


def test_an_engine_forgets_what_its_requests_needed_without_being_told_again(
    fears: SteeringPack,
) -> None:
    config = resolved(
        packs=[str(fears.path)], digests=[fears.manifest.tensors.sha256], layers=[0, 1, 2, 3]
    )
    keep_store(config, PackRegistry([fears]))
    told: list[set[str]] = []
    core = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={"steering": config.model_dump()}),
        model_executor=SimpleNamespace(
            collective_rpc=lambda method, args: (
                told.append(set(args[0])) if method is forget_in_worker else []
            )
        ),
    )
    spiders, other = sorted(fears.digests.values())[:2]
    PINS.pin("one", [spiders])
    _core_forget(core, [spiders, other], ["fears"])
    _core_forget(core, [], [])
    PINS.unpin("one")
    _core_forget(core, [], [])
    assert told == [{other}, set(), {spiders}]
    # Loaded again meanwhile, it stays.
    PINS.pin("two", [spiders])
    _core_forget(core, [spiders], [])
    stage(str(fears.path), fears.manifest.tensors.sha256)
    _core_load(core, str(fears.path), fears.manifest.tensors.sha256)
    PINS.unpin("two")
    _core_forget(core, [], [])
    assert told[3:] == [set(), set()]
