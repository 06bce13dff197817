"""How far a plan may carry the stream: a bound that holds, and is not needlessly wide."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm.exceptions import VLLMValidationError

from tests.unit.conftest import HIDDEN, LAYERS, make_pack
from tests.unit.front_end import started
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import hook_blocks, hook_finite
from vllm_steer.engine.finite import limit_of
from vllm_steer.engine.row_values import ALWAYS, SHARE, THRESHOLD, RowValues, row_values
from vllm_steer.errors import DoseError
from vllm_steer.packs.pack import PackContent, SteeringPack, write_pack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.bounds import check_distance, farthest, layer_bound
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import Segment, SteeringPlan
from vllm_steer.request.schema import SteeringRequest
from vllm_steer.serving.admission import Wanted
from vllm_steer.verify.oracle_forms import apply_form, opened

NAMES = ("a", "b", "c")
NORM = 10.0
RANK = 8


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> PackRegistry:
    path = tmp_path_factory.mktemp("packs") / "p"
    return PackRegistry([make_pack(path, "p", dict.fromkeys(NAMES, list(range(LAYERS))))])


def plan(registry: PackRegistry, *directions: dict[str, Any], **fields: Any) -> SteeringPlan:
    request = SteeringRequest.model_validate({"directions": list(directions)} | fields)
    return resolve(bind(request, registry), 10)


SCALES = st.floats(-50, 50)
DIRECTIONS = st.one_of(
    st.fixed_dictionaries({"scale": SCALES}),
    st.fixed_dictionaries({"scale": SCALES, "op": st.sampled_from(["ablate", "clamp"])}),
    st.fixed_dictionaries(
        {"scale": st.floats(-180, 180), "op": st.sampled_from(["rotate", "angle"])}
        | {"plane": st.sampled_from(NAMES[1:])}
    ),
    st.fixed_dictionaries(
        {"scale": SCALES, "op": st.just("affine"), "bias": SCALES}
        | {"read": st.sampled_from(NAMES)}
    ),
    st.fixed_dictionaries({"scale": SCALES, "op": st.just("multiply")}),
    st.fixed_dictionaries(
        {"scale": SCALES, "op": st.sampled_from(["add", "ablate", "clamp"])}
        | {
            "gate": st.fixed_dictionaries(
                {
                    "direction": st.sampled_from(NAMES),
                    "above": SCALES,
                    "slope": st.floats(1e-3, 1e9),
                }
            )
        }
    ),
    st.fixed_dictionaries(
        {"scale": SCALES, "op": st.just("feature"), "bias": SCALES}
        | {"read": st.sampled_from(NAMES), "threshold": st.floats(0, 20)}
        | {"activation": st.sampled_from(["set", "multiply"])}
    ),
)


@settings(deadline=None, max_examples=200)
@given(
    directions=st.lists(DIRECTIONS, min_size=1, max_size=3),
    restore=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_the_graph_does_stays_within_the_bound(
    registry: PackRegistry, directions: list[dict[str, Any]], restore: bool, seed: int
) -> None:
    """Of any terms at one layer, and streams of any length and place."""
    named = [
        each
        | {"name": "p/a" if "plane" in each else f"p/{NAMES[number]}"}
        | {"layers": [1], "restore_norm": restore}
        for number, each in enumerate(directions)
    ]
    segments = plan(registry, *named).segments
    if not segments:
        return
    (segment,) = segments
    stream = torch.from_numpy(np.random.default_rng(seed).standard_normal((64, HIDDEN))).float()
    stream *= torch.logspace(-2, 3, 64).unsqueeze(1)
    for number, name in enumerate(NAMES):
        vector = registry.find(f"p/{name}").at(1)
        stream[number] = 100 * torch.tensor(vector)
    after = steered(segment, registry, stream)
    bound = layer_bound(segment.terms, 1, NORM, registry)
    if restore:
        # One that became zero stays so.
        assert (after.norm(dim=-1) <= stream.norm(dim=-1) * (1 + 1e-4) + 1e-4).all()
        return
    most = bound.gain * stream.norm(dim=-1) + bound.length
    assert (after.norm(dim=-1) <= most * (1 + 1e-4) + 1e-4).all()


def steered(segment: Segment, registry: PackRegistry, stream: torch.Tensor) -> torch.Tensor:
    block, bank = nn.Identity(), new_bank(torch.float32)
    hook_blocks([(1, block)], bank)
    find = registry.by_digest
    bank.write_row(1, row_values(segment, bank.index, RANK, HIDDEN, find, multiply=True))
    bank.set_rows(np.ones(len(stream), dtype=np.int32))
    found: torch.Tensor = block(stream.clone())
    return found


def new_bank(dtype: torch.dtype, layers: tuple[int, ...] = (1,)) -> SteeringBank:
    return SteeringBank(
        BankShape(tuple(layers), 2, HIDDEN, 64, rank=RANK, multiply=True),
        dtype,
        torch.device("cpu"),
    )


@pytest.mark.parametrize(
    "form",
    [
        {"op": "ablate", "scale": 1.0},
        {"op": "ablate", "scale": 2.0},
        {"op": "rotate", "plane": "b", "scale": 90.0},
        {"op": "angle", "plane": "b", "scale": 30.0},
        {"op": "affine", "read": "a", "scale": -2.0},
    ],
)
def test_what_does_not_lengthen_the_stream_is_not_said_to(
    form: dict[str, Any], registry: PackRegistry
) -> None:
    (segment,) = plan(registry, {"name": "a"} | form).segments
    bound = layer_bound(segment.terms, 0, NORM, registry)
    assert (bound.gain, bound.length) == (1.0, 0.0)


def test_multiplication_is_bounded_by_its_largest_factors(registry: PackRegistry) -> None:
    low, high = registry.find("p/a").extremes[0]
    for scale, gain in ((2.0, 1.0 + 2.0 * high), (-2.0, 1.0 - 2.0 * low)):
        (segment,) = plan(registry, {"name": "a", "op": "multiply", "scale": scale}).segments
        bound = layer_bound(segment.terms, 0, NORM, registry)
        assert (bound.gain, bound.length) == (pytest.approx(gain), 0.0)
    swings = {"schedule": {"start": 1.0, "end": -3.0, "tokens": 4}}
    choice = {"name": "a", "op": "multiply", "scale": 2.0} | swings
    (segment,) = plan(registry, choice).segments
    gain = 1.0 + max(2.0 * high, -6.0 * low)
    assert layer_bound(segment.terms, 0, NORM, registry).gain == pytest.approx(gain)


def test_several_ablations_do_not_compound(registry: PackRegistry) -> None:
    both = [{"name": name, "op": "ablate", "scale": 1.0} for name in NAMES[:2]]
    (segment,) = plan(registry, *both).segments
    assert layer_bound(segment.terms, 0, NORM, registry).gain == 1.0


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        # One alone is within the limit of a scale.
        ([{"name": "a", "scale": 9990.0, "layers": [k]} for k in (1, 1)], "at layer 1 by up to 2e"),
        ([{"name": n, "scale": 9990.0} for n in NAMES], "at layer 0 by up to"),
        ([{"name": "a", "op": "affine", "read": "b", "scale": 900.0}] * 2, "at layer 0 by up to"),
    ],
)
def test_the_limit_of_a_layer_is_one_of_the_sum(
    directions: list[dict[str, Any]], message: str, registry: PackRegistry
) -> None:
    with pytest.raises(DoseError, match=message):
        check_distance(plan(registry, *directions), registry, "float32")


def test_over_the_layers_the_dtype_is_the_limit(registry: PackRegistry) -> None:
    strong = plan(registry, {"name": "a", "scale": 4100.0})
    check_distance(strong, registry, "bfloat16")
    with pytest.raises(DoseError, match="over 4 layers .* by up to 1.64e.04, .*float16 is 1.638e"):
        check_distance(strong, registry, "float16")
    # What compounds, at a gain that one layer may have.
    swing = plan(registry, {"name": "a", "op": "affine", "read": "b", "scale": 40.0})
    check_distance(swing, registry, "float32")
    with pytest.raises(DoseError, match="float16"):
        check_distance(swing, registry, "float16")
    assert farthest("float8_e4m3fn") == farthest("float16")


def test_admission_knows_the_models_dtype(pack_at: Callable[..., SteeringPack]) -> None:
    admission = started(pack_at("p", dict.fromkeys(NAMES, list(range(LAYERS)))))
    directions = [{"name": "p/a", "scale": 9000.0}]
    request = SteeringRequest.model_validate({"directions": directions})
    admission.admit(Wanted(request), 10)
    admission._dtype = "float16"
    with pytest.raises(VLLMValidationError, match="steering.directions: over 4 layers"):
        admission.admit(Wanted(request), 10)


def test_the_graph_is_the_sum_of_plain_forms(tmp_path: Any) -> None:
    """Gates by probes of any length, factors of dimensions, and others, each by its own formula."""
    pack = make_pack(tmp_path / "q", "q", dict.fromkeys(NAMES, [1]))
    sizes = dict(zip(NAMES, (0.3, 2.0, 7.0), strict=True))
    longer = {name: pack.vectors[name] * np.float32(sizes[name]) for name in NAMES}
    content = PackContent(
        name="q",
        model=pack.manifest.model,
        directions=pack.manifest.directions,
        vectors=longer,
        method=pack.manifest.method,
        residual_norms={int(k): v for k, v in pack.manifest.residual_norms.items()},
    )
    found = PackRegistry([write_pack(tmp_path / "q", content)])
    vectors = {name: torch.tensor(found.find(name).at(1)) for name in NAMES}
    stream = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
    soft = {"direction": "q/b", "above": 0.4, "slope": 1.7}
    choices: list[dict[str, Any]] = [
        {"name": "q/a", "scale": 3.0, "gate": soft},
        {"name": "q/b", "op": "ablate", "scale": 1.5, "gate": soft | {"direction": "q/c"}},
        {"name": "q/c", "op": "clamp", "scale": 2.0, "gate": {"direction": "q/a", "above": 0.05}},
        {"name": "q/c", "op": "multiply", "scale": 0.5, "gate": soft | {"direction": "q/a"}},
    ]
    wanted = stream.clone()
    for choice in choices:
        moved = apply_form(stream, vectors[choice["name"][2:]], choice["scale"], choice) - stream
        gate = choice["gate"]
        wanted += opened(stream, vectors[gate["direction"][2:]], gate)[:, None] * moved
    (segment,) = plan(found, *choices).segments
    torch.testing.assert_close(steered(segment, found, stream), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_that_nobody_admitted_move_the_stream_by_the_limit(dtype: torch.dtype) -> None:
    bank, block = new_bank(dtype), nn.Identity()
    hook_blocks([(1, block)], bank)
    values = RowValues.zeros(1, RANK, HIDDEN, multiply=True)
    values.numbers[0, THRESHOLD], values.numbers[0, SHARE, 0] = ALWAYS, 1.0
    values.diagonal[:] = torch.inf
    assert bank.write_row(1, values)
    bank.set_rows(np.ones(8, dtype=np.int32), np.full((1 + RANK, 8), 1e3, dtype=np.float32))
    limit = limit_of(dtype, 1) / RANK
    small = torch.full((8, HIDDEN), 1e-3, dtype=dtype)
    moved = (block(small).float() - small.float()).norm(dim=-1)
    assert moved.isfinite().all()
    assert (moved > 10.0).all()
    stream = torch.full((8, HIDDEN), limit, dtype=dtype)
    # In float16 the sum overflows, which ``hook_finite`` mends.
    stream[0] = 1e4 if dtype == torch.float16 else torch.finfo(dtype).max
    change = block(stream).float() - stream.float()
    assert (change.norm(dim=-1) <= 1.01 * limit).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_graph_cuts_what_nobody_admitted(dtype: torch.dtype, registry: PackRegistry) -> None:
    """The second bound holds alone, layer after layer, and leaves other tokens their bits."""
    layers = tuple(range(24))
    bank, blocks = new_bank(dtype, layers), [nn.Identity() for _ in layers]
    hook_blocks(zip(layers, blocks, strict=True), bank)
    if dtype == torch.float16:
        hook_finite(blocks)
    values = row_values(
        plan(registry, {"name": "a", "scale": 1.0}).segments[0],
        {},
        RANK,
        HIDDEN,
        registry.by_digest,
    ).zeros(len(layers), RANK, HIDDEN, multiply=True)
    values.left[:], values.readers[:, :RANK] = 200.0, 200.0
    values.diagonal[:], values.numbers[:, SHARE, 0] = 1e30, 1.0
    values.numbers[:, 2] = -1.0
    bank.write_row(1, values)
    rows = np.zeros(8, dtype=np.int32)
    rows[::2] = 1
    bank.set_rows(rows, np.ones((1 + RANK, 8), dtype=np.float32))
    start = torch.randn(8, HIDDEN).to(dtype)
    stream = start
    for block in blocks:
        stream = block(stream)
        assert stream.isfinite().all()
    assert torch.equal(stream[1::2], start[1::2])
    most = start.float().abs().max() + len(layers) * limit_of(dtype, len(layers))
    assert stream.float().abs().max() <= most


def test_overflow_inside_a_float16_model_becomes_zero() -> None:
    """Hidden states and residual may each be finite while their sum is not."""

    class Block(nn.Module):
        def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
            return hidden if residual is None else (hidden, residual)

    block = Block()
    hook_finite([block])
    big, small = 40_000.0, 1.0
    # The last sum rounds to the largest number there is.
    hidden = torch.tensor([[big, small, torch.inf, torch.nan, -big, 65504]], dtype=torch.float16)
    residual = torch.tensor([[big, small, small, small, big, 8]], dtype=torch.float16)
    alone = block(hidden, None)
    assert torch.equal(alone, torch.tensor([[big, small, 0, 0, -big, 65504]], dtype=torch.float16))
    found, beside = block(hidden, residual)
    assert torch.equal(found, torch.tensor([[0, small, 0, 0, -big, 65504]], dtype=torch.float16))
    assert torch.equal(beside, torch.tensor([[0, small, 0, 0, big, 8]], dtype=torch.float16))


def test_vectors_of_any_length_are_read_in_half_precision(
    tmp_path: Any, registry: PackRegistry
) -> None:
    """The longest and the shortest that a pack may have, as one affine form of gain 1."""
    pack = make_pack(tmp_path / "q", "q", {"long": [1], "short": [1]})
    sizes = {"long": 1e17, "short": 1e-17}
    scaled = write_pack(
        tmp_path / "q",
        PackContent(
            name="q",
            model=pack.manifest.model,
            directions=pack.manifest.directions,
            vectors={name: pack.vectors[name] * np.float32(size) for name, size in sizes.items()},
            method=pack.manifest.method,
            residual_norms={int(k): v for k, v in pack.manifest.residual_norms.items()},
        ),
    )
    found = PackRegistry([scaled])
    stream = torch.randn(8, HIDDEN)
    for write, read in itertools.permutations(["long", "short"]):
        gate = {"direction": "short", "above": -1.0}
        choice = {"name": write, "op": "affine", "read": read, "scale": 1.0, "gate": gate}
        (segment,) = plan(found, choice).segments
        bank, block = new_bank(torch.float16), nn.Identity()
        hook_blocks([(1, block)], bank)
        find = found.by_digest
        bank.write_row(1, row_values(segment, bank.index, RANK, HIDDEN, find, multiply=True))
        bank.set_rows(np.ones(8, dtype=np.int32))
        u, r = (found.find(name).at(1).astype(np.float64) for name in (write, read))
        wanted = stream.double() + torch.from_numpy(np.outer(stream.double() @ r, u))
        assert torch.allclose(block(stream.half()).double(), wanted, atol=0.02)
