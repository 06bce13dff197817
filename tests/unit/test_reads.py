"""What a request may read, and what becomes of its scores, without an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from vllm.v1.request import RequestStatus

import vllm_steer
from tests.unit.conftest import HIDDEN, LAYERS, resolved
from vllm_steer.config import SteeringConfig
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import hook_blocks
from vllm_steer.engine.compile_cache import hash_graph_alone
from vllm_steer.engine.readers import ReaderBank
from vllm_steer.engine.reading import Reading
from vllm_steer.engine.unsent_scores import UnsentScores, stop_by_scores
from vllm_steer.errors import CompatibilityError, ConfigError, RequestError, UnknownDirectionError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.dose import scaled
from vllm_steer.plan.message import decode_plan, encode_plan
from vllm_steer.plan.reads import Read, StopRule, check_reads
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.scores import Scores, pack_scores, unpack_scores
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.request.schema import parse
from vllm_steer.serving.compatibility import refuse_unread
from vllm_steer.serving.configure import _policy_path
from vllm_steer.serving.policy import Policy
from vllm_steer.serving.receipt import LimitedPlan, Receipt

PROMPT = 10
NAN = float("nan")
ANSWER = ((PROMPT, None),)


@pytest.fixture
def registry(fears: SteeringPack) -> PackRegistry:
    return PackRegistry([fears])


def plan(registry: PackRegistry, **fields: Any) -> SteeringPlan:
    request = parse({"steering": fields})
    assert request is not None
    return resolve(bind(request, registry), PROMPT, 64)


def read(name: str = "spiders", layers: tuple[int, ...] = (1,), after: bool = False) -> Read:
    return Read(name, name * 2, layers, after, ANSWER)


def test_a_read_becomes_layers_and_positions(registry: PackRegistry) -> None:
    found = plan(
        registry,
        read=[
            {"name": "spiders"},
            {"name": "fears/New York", "layers": [2, 0], "at": [[-3, 4], [20, 22]], "when": "after"}
            | {"at": [[2, 4], [20, 22]]},
        ],
        stop_when={"read": 0, "above": 1.5, "for": 3},
    )
    first, second = found.reads
    assert (first.name, first.layers, first.ranges) == ("fears/spiders", (1, 2, 3), ANSWER)
    assert (second.layers, second.after, second.ranges) == ((0, 2), True, ((2, 4), (20, 22)))
    assert found.rules == (StopRule(0, 1.5, 3, abort=False),)
    assert not found.segments
    assert found.digests == {first.digest, second.digest}
    assert decode_plan(encode_plan(found)) == found


def test_reads_are_no_part_of_what_is_changed(registry: PackRegistry) -> None:
    steering: dict[str, Any] = {"directions": [{"name": "spiders", "scale": 2.0}]}
    with_reads = plan(registry, **steering, read=[{"name": "spiders"}])
    assert with_reads.segments == plan(registry, **steering).segments
    weaker = scaled(with_reads, 0.5)
    assert weaker is not None
    assert weaker.reads == with_reads.reads


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give 'directions' or 'read'"),
        ({"read": [], "directions": []}, "give 'directions' or 'read'"),
        ({"read": [{"name": "spiders"}] * 65}, "at most 64"),
        ({"read": [{"name": "spiders", "layers": [-1]}]}, r"read\.0\.layers\.0"),
        ({"read": [{"name": "spiders", "when": "later"}]}, r"read\.0\.when"),
        ({"read": [{"name": "spiders", "above": float("inf")}]}, r"read\.0\.above"),
        ({"read": [{"name": "spiders", "scale": 1.0}]}, "'above', 'at', 'layers', 'name'"),
        ({"read": [{"name": "spiders", "at": "answer"}]}, "must be 'all'"),
        ({"recompute": True, "directions": [{"name": "spiders"}]}, "recompute needs read"),
        (
            {"read": [{"name": "spiders"}], "stop_when": {"read": 1, "above": 0.0}},
            r"stop_when\.read: there is no read with index 1",
        ),
        (
            {"read": [{"name": "spiders"}], "abort_when": {"read": 0, "above": NAN}},
            r"abort_when\.above:",
        ),
        (
            {"read": [{"name": "spiders"}], "stop_when": {"read": 0, "above": 1.0, "tokens": 2}},
            "'above', 'at', 'for', 'read'",
        ),
        (
            {"read": [{"name": "spiders"}], "stop_when": {"read": 0, "above": 1.0, "for": 0}},
            r"stop_when\.for",
        ),
        (
            {"read": [{"name": "spiders", "at": "all"}], "stop_when": {"read": 0, "above": 1.0}},
            '"recompute": true',
        ),
        ({"read": [{"name": "spiders", "layers": [0]}]}, r"no vector for layers \[0\]"),
        ({"read": [{"name": "spiders", "at": [[64, None]]}]}, r"read\.0\.at: .* never reached"),
    ],
)
def test_malformed_reads_are_refused(
    fields: dict[str, Any], message: str, registry: PackRegistry
) -> None:
    with pytest.raises(RequestError, match=message):
        plan(registry, **fields)


def test_unknown_names_are_refused(registry: PackRegistry) -> None:
    with pytest.raises(UnknownDirectionError, match=r"^steering\.read\.0\.name"):
        plan(registry, read=[{"name": "snakes"}])


def test_an_engine_reads_what_it_has_room_for() -> None:
    check_reads((), resolved())
    # Another moment is another probe, another layer is not.
    reads = (read(), read(layers=(2,)), read(after=True))
    check_reads(reads, resolved(reads=2))
    with pytest.raises(RequestError, match="--steering-reads N"):
        check_reads(reads, resolved())
    with pytest.raises(RequestError, match="2 distinct probes .* limit is 1"):
        check_reads(reads, resolved(reads=1))
    with pytest.raises(RequestError, match=r"layers \[3\], which this server does not hook"):
        check_reads((read(layers=(1, 3)),), resolved(reads=2, layers=[0, 1]))


def test_a_scheduler_that_may_leave_scores_behind_is_refused() -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls="mine.Scheduler"))
    with pytest.raises(CompatibilityError, match="--scheduler-cls"):
        refuse_unread(config)


@pytest.mark.parametrize(
    ("read", "reads", "message"),
    [
        (
            {"name": "spiders"},
            0,
            r"watch\.\* reads 1 probes; start with at least --steering-reads 1",
        ),
        ({"name": "spiders", "layers": [0]}, 1, r"watch\.\*\.read\.0\.layers: .* no vector"),
        ({"name": "snakes"}, 1, r"watch\.\*\.read\.0\.name"),
        ({"name": "spiders", "at": "all"}, 1, '"recompute": true'),
        ({"name": "spiders", "at": [[-7, None]]}, 1, '"recompute": true'),
    ],
)
def test_a_watch_that_would_refuse_every_request_stops_the_start(
    read: dict[str, Any], reads: int, message: str, registry: PackRegistry, tmp_path: Path
) -> None:
    watch = {"read": [read], "abort_when": {"read": 0, "above": 1.0}}
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"watch": {"*": watch}}))
    config = SteeringConfig(packs=["fears"], policy=str(policy), reads=reads)
    with pytest.raises(ConfigError, match=message):
        _policy_path(config, registry)


def test_a_watch_is_read_after_what_a_request_reads(registry: PackRegistry) -> None:
    own = plan(
        registry, read=[{"name": "spiders"}] * 2, stop_when={"read": 1, "above": 2.0, "for": 2}
    )
    watch = plan(registry, read=[{"name": "New York"}], abort_when={"read": 0, "above": 3.0})
    both = own.watched(watch)
    assert both.reads == own.reads + watch.reads
    assert both.rules == (StopRule(1, 2.0, 2, abort=False), StopRule(2, 3.0, 1, abort=True))
    with pytest.raises(ValidationError, match="a watch only reads"):
        Policy.model_validate({"watch": {"*": {"directions": [{"name": "spiders"}]}}})


def test_without_reads_the_graph_and_its_key_are_what_they_were() -> None:
    def names(reads: int) -> set[str]:
        block = nn.Module()
        shape = BankShape((1,), 3, HIDDEN, 8)
        bank = SteeringBank(shape, torch.float32, torch.device("cpu"))
        readers = reader_bank(reads) if reads else None
        hook_blocks([(1, block)], bank, readers)
        return {name for name, _ in block.named_buffers()}

    assert names(0) == {"_steering_rows", "_steering_vectors"}
    assert len(names(1)) == 6

    def key(**fields: Any) -> dict[str, Any]:
        config = resolved(**fields).model_dump()
        given = SimpleNamespace(additional_config={"steering": config})
        hashed: list[dict[str, Any]] = []
        hash_graph_alone(lambda self: hashed.append(self.additional_config["steering"]) or "")(
            given
        )
        return hashed[0]

    assert set(key()) == {"rows", "layers", "ops", "rank", "multiply", "version", "graph_revision"}
    assert key(reads=2, read_rows=9)["reads"] == 2


def reader_bank(reads: int, rows: int = 5) -> ReaderBank:
    size = rows, reads, HIDDEN, 8
    return ReaderBank(range(LAYERS), range(LAYERS), *size, torch.float32, torch.device("cpu"))


class Block(nn.Module):
    """Returns what it is given."""

    def forward(self, output: Any) -> Any:
        return output


@pytest.mark.parametrize("form", ["alone", "with a residual", "with a batch of one"])
def test_a_block_writes_scores_before_and_after_its_change(form: str) -> None:
    torch.manual_seed(0)
    block, readers = Block(), reader_bank(2)
    bank = SteeringBank(BankShape((1,), 3, HIDDEN, 8), torch.float32, torch.device("cpu"))
    hook_blocks([(1, block)], bank, readers)
    bank.vectors[0, 2] = change = torch.randn(HIDDEN)
    bank.set_rows(np.array([0, 2, 2], dtype=np.int32))
    probe = torch.randn(HIDDEN)
    vectors = np.zeros((LAYERS, HIDDEN), dtype=np.float32)
    vectors[1] = probe.numpy()
    readers.write_row(3, vectors, after=False)
    readers.write_row(4, vectors, after=True)
    readers.set_rows(np.array([[3, 4], [3, 4], [0, 4]], dtype=np.int32))
    hidden, residual = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
    readers.scores.fill_(NAN)
    returned = block(
        {
            "alone": hidden,
            "with a residual": (hidden, residual),
            "with a batch of one": hidden[None],
        }[form]
    )
    stream = hidden + residual if form == "with a residual" else hidden
    before = stream @ probe
    after = before + (change @ probe) * torch.tensor([0.0, 1.0, 1.0])
    expected = torch.stack([before * torch.tensor([1.0, 1.0, 0.0]), after], 1)
    torch.testing.assert_close(readers.scores[1, :3], expected)
    # Other layers and tokens are not written.
    assert readers.scores[[0, 2, 3]].isnan().all()
    assert readers.scores[1, 3:].isnan().all()
    moved = (returned[0] if form != "alone" else returned).reshape(3, HIDDEN)
    torch.testing.assert_close(moved[1], hidden[1] + change)


def test_scores_of_a_step_go_to_their_requests(registry: PackRegistry) -> None:
    bank = reader_bank(2)
    reading = Reading(bank, registry.by_digest)
    spiders, york = (registry.find(name) for name in ("spiders", "New York"))
    reading.add("a", (Read("s", spiders.digest, (1, 3), False, ANSWER),))
    reading.add(
        "b",
        (
            Read("y", york.digest, (2,), True, ((0, None),)),
            Read("s", spiders.digest, (2,), False, ((0, 2),)),
        ),
    )
    lengths, positions = np.array([2, 1, 3]), torch.tensor([9, 10, 5, 0, 1, 2, 77])
    reading.prepare_step(["a", "other", "b"], lengths, positions)
    stream = torch.randn(6, HIDDEN)
    rows = bank.rows[:6].long()
    assert not rows[2].any()
    assert not bank.rows[6:].any()
    bank.scores[:, :6] = (bank.probes[:, rows] * stream[None, :, None]).sum(-1)
    finish = reading.collect()
    assert finish is not None
    # What happens before the copy has come does not change it.
    reading.remove("a")
    found = finish()
    assert found.request_ids == ["a", "b"]

    def along(direction: Any, layer: int, tokens: slice) -> np.ndarray:
        unit = direction.at(layer) / np.linalg.norm(direction.at(layer))
        return stream[tokens].numpy() @ unit

    # The prompt's last token is covered by no read of the first request.
    assert (found.starts, found.counts) == ([10, 0], [1, 3])
    mean = (along(spiders, 1, slice(0, 2)) + along(spiders, 3, slice(0, 2))) / 2
    assert np.allclose(found.values[0, 0], mean[1], atol=1e-6)
    expected = [along(york, 2, slice(3, 6)), along(spiders, 2, slice(3, 6))]
    assert np.allclose(found.values[1:], np.transpose(expected), atol=1e-6)
    # Only New York is read after the change.
    assert bank.after[rows[3]].tolist() == [1.0, 0.0]
    assert reading.collect() is None


def test_rows_come_back_after_a_dummy_step(registry: PackRegistry) -> None:
    bank = reader_bank(1)
    reading = Reading(bank, registry.by_digest)
    reading.add("a", (Read("s", registry.find("spiders").digest, (2,), False, ANSWER),))
    for _ in range(2):
        reading.prepare_step(["a"], np.array([1]), torch.tensor([11]))
        assert bank.rows[0, 0]
        reading.prepare_dummy_step()
        assert not bank.rows.any()


def test_rows_go_to_the_requests_of_a_step_however_many_wait(registry: PackRegistry) -> None:
    bank = reader_bank(1, rows=2)
    reading = Reading(bank, registry.by_digest)
    for name in ("spiders", "New York"):
        reading.add(name, (Read(name, registry.find(name).digest, (2,), False, ANSWER),))
    for name in ("spiders", "New York", "spiders", "spiders"):
        reading.prepare_step([name], np.array([1]), torch.tensor([11]))
        direction = registry.find(name)
        unit = direction.at(2) / np.linalg.norm(direction.at(2))
        assert np.allclose(bank.probes[2, int(bank.rows[0, 0])], unit, atol=1e-6)


def chunk(start: int, end: int, score: float = 0.0) -> tuple[int, np.ndarray]:
    return start, (np.arange(start, end)[:, None] + score).astype(np.float32)


def test_scores_wait_for_the_tokens_that_were_accepted() -> None:
    unsent = UnsentScores((read(),))
    # A prompt in two parts, the first of them twice, after a preemption.
    unsent.chunks += [chunk(0, 2, 0.5), chunk(0, 2), chunk(2, 3)]
    start, scores = unsent.take(3) or (None, None)
    assert scores is not None
    assert (start, scores.tolist()) == (0, [[0.0], [1.0], [2.0]])
    # Three drafts, of which one was accepted; the others are computed anew.
    unsent.chunks += [chunk(3, 7, 0.5)]
    start, scores = unsent.take(5) or (None, None)
    assert scores is not None
    assert (start, scores.tolist()) == (3, [[3.5], [4.5]])
    # What was sent is not sent again.
    unsent.chunks += [chunk(0, 6)]
    start, scores = unsent.take(6) or (None, None)
    assert scores is not None
    assert (start, scores.tolist()) == (5, [[5.0]])
    assert unsent.take(6) is None
    # One token, as in most steps; and what lies between two chunks was not computed.
    unsent.chunks += [chunk(6, 7)]
    start, scores = unsent.take(7) or (None, None)
    assert scores is not None
    assert (start, scores.tolist()) == (6, [[6.0]])
    unsent.chunks += [chunk(7, 8), chunk(9, 10)]
    start, scores = unsent.take(10) or (None, None)
    assert scores is not None
    assert start == 7
    assert np.array_equal(scores[:, 0], [7.0, NAN, 9.0], equal_nan=True)


def test_a_rule_is_met_at_one_token_however_many_come_at_once() -> None:
    values = [0.0, 2.0, 2.0, 0.0, 2.0, 2.0, 2.0, 2.0]
    rules = (StopRule(0, 1.0, 3, abort=True), StopRule(0, 5.0, 1, abort=False))
    for size in (1, 2, 3, 8):
        unsent, met = UnsentScores((read(),), rules), None
        for start in range(10, 10 + len(values), size):
            part = np.array(values[start - 10 : start - 10 + size], dtype=np.float32)
            unsent.chunks.append((start, part[:, None]))
            for end in range(start + 1, start + len(part) + 1):
                # Asked again without a new token, as after a step without one, nothing is counted twice.
                fired = unsent.fired(end) or unsent.fired(end)
                met = met if met is not None or fired is None else (end - 1, fired)
            unsent.take(start + len(part))
        assert met == (16, rules[0])


def test_tokens_that_a_read_does_not_cover_do_not_meet_its_rule() -> None:
    rules = (StopRule(0, 1.0, 2, abort=True),)
    unsent = UnsentScores((replace(read(), ranges=((4, 5), (6, None))),), rules)
    unsent.chunks.append((3, np.full((4, 1), 9.0, dtype=np.float32)))
    assert unsent.fired(7) is None
    unsent.chunks.append((7, np.full((1, 1), 9.0, dtype=np.float32)))
    assert unsent.fired(8) == rules[0]


@pytest.mark.parametrize("ends_anyway", [False, True])
@pytest.mark.parametrize(("score", "reason"), [(2.0, "abort"), (0.0, "length")])
def test_a_rule_counts_before_what_else_ends_an_answer(
    score: float, reason: str, ends_anyway: bool
) -> None:
    """Few tokens at a time would else be answers that nothing was noticed in."""

    def ended(request: Any) -> bool:
        if ends_anyway:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return ends_anyway

    unsent = UnsentScores((read(),), (StopRule(0, 1.0, 1, abort=True),))
    unsent.chunks.append((PROMPT, np.float32([[score]])))
    request = SimpleNamespace(
        num_tokens=PROMPT + 2, status=RequestStatus.RUNNING, _vllm_steer_unsent_scores=unsent
    )
    assert stop_by_scores(ended)(request) == (ends_anyway or reason == "abort")
    if RequestStatus.is_finished(request.status):
        assert str(RequestStatus.get_finished_reason(request.status)) == reason
    else:
        assert (ends_anyway, reason) == (False, "length")


def test_scores_are_read_back_by_position() -> None:
    covered = replace(read("New York"), ranges=((0, 3), (4, None)))
    scores = Scores((replace(read(), ranges=((0, None),)), covered), prompt_len=3)
    other = np.full((1, 1), 9.0, dtype=np.float32)
    for start, found in ((1, [[1, 3], [2, 4]]), (3, [[5, 6]]), (4, [[7, 8]])):
        taken = [("other", 0, other), ("own", start, np.array(found, dtype=np.float32))]
        for request_id, at, values in unpack_scores(pack_scores(taken)):
            if request_id == "own":
                scores.add(at, values)
            else:
                assert (at, values[:, :1].tolist()) == (0, [[9.0]])
    expected = [[NAN, 1, 2, 5, 7, NAN], [NAN, 3, 4, NAN, 8, NAN]]
    assert np.array_equal(scores.to_numpy(6), expected, equal_nan=True)
    assert scores.to_numpy(2).shape == (2, 2)
    assert np.array_equal(scores.since(2), [[2, 5, 7], [4, NAN, 8]], equal_nan=True)
    assert scores.since(5).shape == (2, 0)
    answer = SimpleNamespace(token_ids=[7, 8], steering_scores=scores)
    shorter = SimpleNamespace(token_ids=[7], steering_scores=scores)
    outputs = [SimpleNamespace(outputs=[answer, shorter], request_id="0")]
    found_again = vllm_steer.read(outputs)
    assert found_again.shape == (2, 2, 5)
    assert np.array_equal(found_again[0], scores.to_numpy(5), equal_nan=True)
    assert np.isnan(found_again[1, :, 4]).all()
    assert np.array_equal(vllm_steer.read(outputs[0]), found_again, equal_nan=True)
    plain = SimpleNamespace(token_ids=[7])
    with pytest.raises(ValueError, match="read nothing"):
        vllm_steer.read(SimpleNamespace(outputs=[plain], request_id="1"))


def test_scores_that_come_while_others_are_read_leave_those_as_they_are() -> None:
    """A long receipt is written in a thread of its own while the engine goes on."""
    scores = Scores((replace(read(), ranges=((0, None),)),), prompt_len=0)

    class Meanwhile(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            # As many chunks as are put together.
            for position in range(scores.end, 512):
                scores.add(*chunk(position, position + 1))
            return np.asarray(self)[key]

    for position in range(299):
        scores.add(*chunk(position, position + 1))
    scores.add(299, chunk(299, 300)[1].view(Meanwhile))
    assert np.array_equal(scores.to_numpy(300), [np.arange(300)])
    assert np.array_equal(scores.to_numpy(512), [np.arange(512)])


def test_the_receipt_has_scores_of_each_answer(
    registry: PackRegistry, make_receipt: Callable[..., Receipt]
) -> None:
    receipt = make_receipt(
        read=[{"name": "spiders", "above": 1.5}, {"name": "New York", "at": [[8, 11]]}]
    )
    values = np.array([[NAN] * 10 + [1.0, 4.0], [NAN] * 8 + [0.25, 0.5, np.inf, NAN]])
    for index, tokens in ((0, 3), (1, 1)):
        receipt.count(index, [5] * tokens, 0)
        scores = Scores(receipt.plan.reads, PROMPT)
        scores.add(0, values.T.astype(np.float32))
        receipt.scores[index] = scores
    first, second = receipt.to_json()["reads"]
    assert (first["name"], first["layers"], first["when"]) == ("fears/spiders", [1, 2, 3], "before")
    assert first["answers"] == [
        {"index": 0, "generated": [1.0, 4.0, None], "mean": 2.5, "max": 4.0, "share_above": 0.5},
        {"index": 1, "generated": [1.0], "mean": 1.0, "max": 1.0, "share_above": 0.0},
    ]
    assert second["answers"][0] == {
        "index": 0,
        "prompt": [None] * 8 + [0.25, 0.5],
        "generated": [None] * 3,
    }
    assert [a["index"] for a in receipt.to_json(1)["reads"][0]["answers"]] == [1]


@pytest.fixture
def make_receipt(registry: PackRegistry) -> Callable[..., Receipt]:
    def make(**fields: Any) -> Receipt:
        request = parse({"steering": fields})
        assert request is not None
        bound = bind(request, registry)
        return Receipt.of(LimitedPlan(resolve(bound, PROMPT), 0.0), bound.names, PROMPT, 2)

    return make
