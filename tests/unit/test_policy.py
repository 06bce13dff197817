"""What a policy allows, and what a receipt says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.unit.front_end import manager_of, started
from vllm_steer.client import steer
from vllm_steer.errors import ConfigError, ConflictError, RequestError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import PackStore
from vllm_steer.plan.binding import bind
from vllm_steer.plan.dose import relative_dose, scaled
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import count_steered
from vllm_steer.request.schema import SteeringRequest, parse
from vllm_steer.serving.admission import Wanted
from vllm_steer.serving.http_context import HttpContext, current_http_context
from vllm_steer.serving.policy import Policy, load_policy
from vllm_steer.serving.receipt import MAX_HEADER, LimitedPlan, Receipt

KEY = "a" * 64


def plan_of(registry: PackRegistry, **fields: Any) -> Any:
    return resolve(bind(SteeringRequest.model_validate(fields), registry), 10)


def test_keys_and_patterns() -> None:
    policy = Policy(keys={KEY: ["moods/*", "fears/spiders"], "*": ["moods/calm"]})
    assert policy.allows(KEY, "moods/gloomy")
    assert policy.allows(KEY, "fears/spiders")
    assert not policy.allows(KEY, "fears/heights")
    assert policy.allows(None, "moods/calm")
    assert not policy.allows("b" * 64, "moods/gloomy")
    assert Policy().allows(None, "anything/at all")
    assert not Policy(keys={KEY: ["*"]}).allows(None, "moods/calm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "policy:"),
        ("[]", "policy:"),
        ('{"alias": {}}', "alias:"),
        ('{"aliases": {"a b": {"directions": [{"name": "x"}]}}}', "aliases.a b"),
        ('{"aliases": {"a": {"directions": []}}}', "aliases.a: needs directions to steer"),
        ('{"dose_action": "clamp"}', "dose_action:"),
        ('{"max_dose": 0}', "max_dose:"),
        ('{"keys": {"my-key": ["*"]}}', "keys.my-key"),
        ('{"watch": {}, "keys": {}, "watch": {}}', "policy: .*'watch' is given twice"),
        ('{"keys": {"*": ["a/*"], "*": ["*"]}}', r"policy: .*'\*' is given twice"),
    ],
)
def test_malformed_policies(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"^--steering-policy: {file}: .*{message}"):
        load_policy(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(str(tmp_path / "none.json"))


def test_dose_adds_up_over_layers_and_directions_and_is_the_largest_over_positions(
    pack_at: Callable[..., SteeringPack],
) -> None:
    """Unit vectors beside a residual stream of norm 10."""
    registry = PackRegistry([pack_at("p", {"a": [0, 1], "b": [1, 2]})])
    both = [{"name": "a", "scale": 3.0}, {"name": "b", "scale": -4.0}]
    assert relative_dose(plan_of(registry, directions=both), registry) == pytest.approx(1.4)
    apart = [both[0] | {"positions": "prompt"}, both[1] | {"positions": "generated"}]
    plan = plan_of(registry, directions=apart)
    assert relative_dose(plan, registry) == pytest.approx(0.8)
    assert relative_dose(scaled(plan, 0.5), registry) == pytest.approx(0.4)
    nothing = plan_of(registry, directions=[{"name": "a", "scale": 0.0}])
    assert relative_dose(nothing, registry) == 0.0


def names_of(registry: PackRegistry, names: Sequence[str]) -> dict[str, str]:
    return {registry.find(name).digest: registry.find(name).full_name for name in names}


@pytest.mark.parametrize(
    ("positions", "count"),
    [("all", 15), ("prompt", 10), ("generated", 5), ([[-2, None]], 7), ([[0, 3], [12, 99]], 6)],
)
def test_count_of_steered_tokens(
    positions: Any, count: int, pack_at: Callable[..., SteeringPack]
) -> None:
    registry = PackRegistry([pack_at("p", {"a": [0]})])
    plan = plan_of(registry, directions=[{"name": "a"}], positions=positions)
    assert count_steered(plan, 15) == count
    receipt = Receipt.of(LimitedPlan(plan, 0.2), names_of(registry, ["a"]), 10, 2)
    receipt.answered.update({0: 6, 1: 6})
    assert receipt.tokens_steered(0) == count
    assert receipt.tokens_steered() == 2 * count


def test_headers_stay_short(pack_at: Callable[..., SteeringPack]) -> None:
    names = [f"a rather long name of a direction {number}" for number in range(64)]
    registry = PackRegistry([pack_at("p", dict.fromkeys(names, [0]))])
    plan = plan_of(registry, directions=[{"name": name} for name in names])
    header = Receipt.of(LimitedPlan(plan, 1.0), names_of(registry, names), 10).to_header()
    assert len(header) <= MAX_HEADER
    assert header.endswith(", ...")
    assert header.isascii()


def test_a_replaced_pack_is_found_by_content(pack_at: Callable[..., SteeringPack]) -> None:
    old, other = pack_at("p", {"a": [0]}), pack_at("q", {"a": [0]}, seed=3)
    store = PackStore(PackRegistry([old, other]))
    new = pack_at("p", {"a": [0]}, seed=1)
    assert store.add(new) is old
    assert store.registry.find("p/a").digest == new.digests["a"] != old.digests["a"]
    assert store.by_digest(old.digests["a"]).digest == old.digests["a"]
    assert store.retired == {old.digests["a"]}
    # The same content under a name again is no longer retired.
    store.add(old)
    assert store.retired == {new.digests["a"]}
    store.forget(store.retired)
    with pytest.raises(Exception, match="no loaded direction has the content"):
        store.by_digest(new.digests["a"])


def test_a_pack_of_the_same_name_with_other_content_has_other_keys(
    pack_at: Callable[..., SteeringPack],
) -> None:
    """So blocks of the prefix cache that were computed with the old one are never found."""
    keys = []
    for seed in (0, 1, 0):
        registry = PackRegistry([pack_at("p", {"a": [0, 1]}, seed=seed)])
        (segment,) = plan_of(registry, directions=[{"name": "p/a"}]).segments
        keys.append(segment.key)
    assert keys[0] == keys[2] != keys[1]


def test_the_helper_builds_what_the_server_reads() -> None:
    wanted = {"directions": [{"name": "p/a", "scale": 2.0}, {"name": "b"}], "layers": [1]}
    fields = steer({"p/a": 2, "b": None}, layers=[1], positions=[(-4, None)])
    assert fields == {"steering": wanted | {"positions": [[-4, None]]}}
    xargs = steer({"p/a": 2, "b": None}, layers=[1], positions=[(-4, None)], xargs=True)
    assert json.loads(xargs["vllm_xargs"]["steering"]) == fields["steering"]
    assert parse(fields) == parse(xargs["vllm_xargs"])
    assert steer("p/a") == steer(["p/a"])
    with pytest.raises(RequestError, match="steering.layers"):
        steer("p/a", layers=[])


@pytest.mark.parametrize(
    "choice",
    [
        {"name": "nobody"},
        {"name": "fears/nobody"},
        {"name": "spiders", "op": "rotate", "plane": "nobody", "scale": 10.0},
        {"name": "spiders", "op": "affine", "read": "nobody", "scale": 1.0},
        {"name": "spiders", "gate": {"direction": "fears/nobody", "above": 0.0}},
    ],
    ids=lambda choice: list(choice)[-1],
)
def test_an_alias_that_names_nothing_is_refused(
    choice: dict[str, Any], fears: SteeringPack
) -> None:
    """Else every unload would stumble over it."""
    admission = started(fears)
    body = json.dumps({"directions": [choice]}).encode()
    with manager_of(admission) as manager:
        with pytest.raises(
            RequestError, match="aliases.x.directions.0.(name|plane|read|gate.direction): .*nobody"
        ):
            asyncio.run(manager.set_alias("x", body, None))
        assert not admission.policy.aliases
        asyncio.run(manager.set_alias("y", b'{"directions": [{"name": "spiders"}]}', None))
        with pytest.raises(ConflictError, match="needed by aliases.y"):
            asyncio.run(manager.unload("fears", None))


def test_a_change_says_nothing_twice(fears: SteeringPack) -> None:
    """Of two values for one key the last would count, and who sent the first never learn it."""
    admission = started(fears)
    alias = b'{"directions": [{"name": "spiders", "scale": 1.0, "scale": 9.0}]}'
    with manager_of(admission, fears.path.parent) as manager:
        with pytest.raises(RequestError, match="body: .*'scale' is given twice"):
            asyncio.run(manager.set_alias("x", alias, None))
        with pytest.raises(RequestError, match="body: .*'name' is given twice"):
            asyncio.run(manager.load(b'{"name": "other", "name": "fears"}', None))


def test_no_pack_comes_that_breaks_the_policy(
    fears: SteeringPack, pack_at: Callable[..., SteeringPack]
) -> None:
    """A second direction of a bare name that the default names, or content without an alias's direction."""
    pack_at("more", {"spiders": [1]})
    admission = started(fears)
    store = admission.store
    assert store is not None
    admission.policy = Policy(
        default=SteeringRequest.model_validate({"directions": [{"name": "spiders"}]})
    )
    with manager_of(admission, fears.path.parent) as manager:
        with pytest.raises(
            ConflictError,
            match="'more' conflicts with the policy: default.directions.0.name: .*more than one",
        ):
            asyncio.run(manager.load(b'{"name": "more"}', None))
        assert list(store.registry.packs) == ["fears"]
        admission.policy = Policy(
            aliases={
                "x": SteeringRequest.model_validate({"directions": [{"name": "fears/spiders"}]})
            }
        )
        asyncio.run(manager.load(b'{"name": "more"}', None))
        pack_at("fears", {"heights": [1]})
        with pytest.raises(
            ConflictError, match="aliases.x.directions.0.name: .*no direction 'spiders'"
        ):
            asyncio.run(manager.load(b'{"name": "fears"}', None))
        assert "spiders" in store.registry.packs["fears"].directions


@pytest.fixture
def http_context() -> Iterator[None]:
    token = current_http_context.set(HttpContext("", KEY))
    yield
    current_http_context.reset(token)


def test_a_key_learns_nothing_of_what_it_may_not_use(
    fears: SteeringPack, http_context: None
) -> None:
    """Neither that it exists, nor in which pack."""
    admission = started(fears)
    admission.policy = Policy(keys={KEY: ["moods/*"]})
    for name in ("spiders", "spidres", "fears/spiders", "fears/spidres"):
        request = SteeringRequest.model_validate({"directions": [{"name": name}]})
        with pytest.raises(
            VLLMValidationError, match=f"not allowed to use {name!r}; ask"
        ) as caught:
            admission.admit(Wanted(request), 10)
        assert "fears/" not in str(caught.value).replace(name, "")


@pytest.mark.parametrize(
    ("pattern", "name", "unseen"),
    [
        ("fears/N*", "fears/Nobody", "spiders"),
        ("more/*", "more/nobody", "fears"),
        ("mor*", "mor/nobody", "fears"),
        ("n*", "nobody", "spiders"),
    ],
)
def test_no_message_names_what_a_key_may_not_use(
    pattern: str,
    name: str,
    unseen: str,
    fears: SteeringPack,
    pack_at: Callable[..., SteeringPack],
    http_context: None,
) -> None:
    admission = started(fears, pack_at("more", {"mild": [1]}))
    admission.policy = Policy(keys={KEY: [pattern]})
    steering = {"directions": [{"name": name}]}
    with pytest.raises(VLLMValidationError, match="(has no|has a) direction|is loaded") as caught:
        admission.admit(Wanted(SteeringRequest.model_validate(steering)), 10)
    assert unseen not in str(caught.value)
    with manager_of(admission) as manager:
        body = json.dumps(steering).encode()
        with pytest.raises(RequestError, match="(has no|has a) direction|is loaded") as refused:
            asyncio.run(manager.set_alias("x", body, KEY))
    assert unseen not in str(refused.value)


def test_a_name_without_a_pack_is_one_of_what_its_key_may_use(
    fears: SteeringPack, pack_at: Callable[..., SteeringPack], http_context: None
) -> None:
    admission = started(fears, pack_at("more", {"spiders": [1]}))
    request = SteeringRequest.model_validate({"directions": [{"name": "spiders"}]})
    with pytest.raises(VLLMValidationError, match="more than one"):
        admission.admit(Wanted(request), 10)
    admission.policy = Policy(keys={KEY: ["fears/*", "spiders"]})
    receipt = admission.admit(Wanted(request), 10).receipt
    assert list(receipt.names.values()) == ["fears/spiders"]
    with manager_of(admission) as manager:
        body = request.model_dump_json().encode()
        with pytest.raises(RequestError, match="that of several") as refused:
            asyncio.run(manager.set_alias("x", body, KEY))
    assert "more" not in str(refused.value)
