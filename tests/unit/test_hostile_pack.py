"""Malicious packs are rejected with the reason, in bounded time and memory, and none runs code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_with_library

from tests.unit.conftest import HIDDEN
from vllm_steer.errors import PackError
from vllm_steer.packs.manifest import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES
from vllm_steer.packs.pack import MANIFEST_FILE, VECTORS_FILE, SteeringPack, load_pack
from vllm_steer.packs.tensor_file import MAX_HEADER_BYTES
from vllm_steer.testing.random_pack import random_identity, write_random_pack

# In units of parsing the worst JSON that is let through, so that it tells bounded from unbounded and not one machine
# from another: nothing takes much more than one, and ten times as much JSON would take ten.
MAX_TIME = 5.0
MAX_GROWTH = 100 * 2**20
# As many of the most costly values as are let through.
WORST = "[" + '{"":[]},' * (MAX_MANIFEST_VALUES // 3 - 100) + "0]"


@cache
def unit() -> float:
    """Processor seconds that the standard library takes to parse the worst that is let through."""
    start = time.process_time()
    json.loads(WORST)
    return time.process_time() - start


def _peak() -> int:
    """Highest resident memory since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if what runs within takes more time or memory than a refusal may."""
    most = MAX_TIME * unit()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.process_time()
    yield
    assert time.process_time() - start < most
    assert _peak() - before < MAX_GROWTH


def refused(pack: Path, message: str) -> None:
    with bounded(), pytest.raises(PackError, match=message):
        load_pack(pack)


def edit(pack: SteeringPack, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((pack.path / MANIFEST_FILE).read_text())
    change(manifest)
    (pack.path / MANIFEST_FILE).write_text(json.dumps(manifest))


def put_vectors(pack: SteeringPack, data: bytes) -> None:
    """Replaces the tensor file and makes the manifest agree with it."""
    (pack.path / VECTORS_FILE).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(pack, lambda m: m["tensors"].update(sha256=digest, size=len(data)))


def put_header(pack: SteeringPack, header: bytes, data: bytes) -> None:
    put_vectors(pack, len(header).to_bytes(8, "little") + header + data)


def parts(pack: SteeringPack) -> tuple[dict[str, Any], bytes]:
    """Header and data of a pack's tensor file."""
    content = (pack.path / VECTORS_FILE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_the_own_reader_agrees_with_the_library(fears: SteeringPack) -> None:
    library = load_with_library((fears.path / VECTORS_FILE).read_bytes())
    for name, vector in load_pack(fears.path).vectors.items():
        assert np.array_equal(library[name], vector)


def test_cut_anywhere(fears: SteeringPack) -> None:
    for name in (VECTORS_FILE, MANIFEST_FILE):
        data = (fears.path / name).read_bytes()
        for length in range(0, len(data) - 1, 7):
            (fears.path / name).write_bytes(data[:length])
            with pytest.raises(PackError, match="truncated|Invalid JSON"):
                load_pack(fears.path)
        (fears.path / name).write_bytes(data)
    load_pack(fears.path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 10**6])
def test_a_header_longer_than_the_file_or_allowed(length: int, fears: SteeringPack) -> None:
    put_vectors(fears, length.to_bytes(8, "little") + b"{}" + bytes(100))
    with (fears.path / VECTORS_FILE).open("r+b") as stream:
        stream.truncate(2**30)
    edit(fears, lambda m: m["tensors"].update(size=2**30))
    refused(fears.path, "its header (is longer than the file|has 33554433 bytes)|Invalid JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["spiders"].update(data_offsets=[0, 2**40]), "data_offsets 192 bytes apart"),
        (lambda h: h["spiders"].update(data_offsets=[2**62, 2**62 + 192]), "overlap or leave gaps"),
        (lambda h: h["spiders"].update(data_offsets=[-192, 0]), "overlap or leave gaps"),
        (lambda h: h["spiders"].update(data_offsets=[0.0, 192.0]), "data_offsets 192 bytes apart"),
        (lambda h: h["spiders"].update(data_offsets=None), "data_offsets 192 bytes apart"),
        (lambda h: h["spiders"].update(data_offsets=h["New York"]["data_offsets"] + [0]), "apart"),
        (lambda h: h["New York"].update(data_offsets=[1, 129]), "overlap or leave gaps"),
        (lambda h: h["spiders"].update(shape=[2**40, 2**40]), r"\(1099511627776, 1099511627776\)"),
        (lambda h: h["spiders"].update(shape=[1] * 10**5), "an invalid shape"),
        (lambda h: h["spiders"].update(shape="many"), "an invalid shape"),
        (lambda h: h["spiders"].update(dtype="F64"), "is float64 of shape"),
        (lambda h: h["spiders"].update(dtype="BF16"), "is bfloat16 of shape"),
        (lambda h: h["spiders"].update(dtype="I32"), "is I32 of shape"),
        (lambda h: h["spiders"].update(dtype=[[]]), r"is \[\[\]\] of shape"),
        (lambda h: h.update(spiders=7), "is None of shape"),
        (lambda h: h.update({"../../etc/passwd": h.pop("spiders")}), "not in the manifest .'../../etc"),
        (lambda h: h.update(extra=h["spiders"]), "not in the manifest .'extra'."),
    ],
)  # fmt: skip
def test_headers_that_lie(change: Any, message: str, fears: SteeringPack) -> None:
    header, data = parts(fears)
    change(header)
    put_header(fears, json.dumps(header).encode(), data)
    refused(fears.path, message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":1,"a":2}', "key 'a' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 5_000_000, "more values than the limit of 1000000"),
        (b'{"a":' * 900_000, "nested too deeply"),
        (b"[]", "its header is not an object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"a":%s}' % (b"9" * 10**6), "Invalid JSON"),
        (b'{"a":NaN}', "NaN is not a number"),
    ],
)
def test_headers_that_explode(header: bytes, message: str, fears: SteeringPack) -> None:
    put_header(fears, header, bytes(64))
    refused(fears.path, message)


def test_data_that_no_tensor_claims(fears: SteeringPack) -> None:
    header, data = parts(fears)
    put_header(fears, json.dumps(header).encode(), data + bytes(4))
    refused(fears.path, "its tensors take 320 bytes, but the file has 324")


def test_a_file_of_another_size_is_not_read(fears: SteeringPack) -> None:
    with (fears.path / VECTORS_FILE).open("r+b") as stream:
        stream.truncate(2**40)
    refused(fears.path, "larger than the manifest says: it has 1099511627776 bytes")
    edit(fears, lambda m: m["tensors"].update(size=2**40))
    refused(fears.path, "tensors.size:")


def test_a_manifest_of_any_size_is_not_read(fears: SteeringPack) -> None:
    with (fears.path / MANIFEST_FILE).open("r+b") as stream:
        stream.truncate(2**40)
    refused(fears.path, f"larger than the limit of {MAX_MANIFEST_BYTES} bytes")


NESTED = "[" * 900 + "]" * 900
DEEP = '{"a":' * 300 + "1" + "}" * 300


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"settings": {}', '"settings": {"a": ' + NESTED + "}", "method.settings"),
        ('"settings": {}', '"settings": {"a": ' + DEEP + "}", "method.settings"),
        ('"settings": {}', '"settings": ' + "[" * 100_000, "nested too deeply"),
        ('"settings": {}', '"settings": {"a": [' + "[],[]," * 5_000_000 + "1]}", "more values than the limit of 1000000"),
        ('"settings": {}', '"settings": {"a": [' + '"",' * 9_000_000 + "1]}", "more values than the limit of 1000000"),
        ('"settings": {}', '"settings": {"a": 1, "a": 1}', "key 'a' is given twice"),
        ('"settings": {}', '"settings": {"a": Infinity}', "Infinity is not a number"),
        ('"settings": {}', '"settings": {"a": ' + "9" * 10**7 + "}", "Invalid JSON"),
        ('"seed": 0', '"seed": ' + "9" * 4000, "method.seed:"),
        ('"hidden_size": 16', '"hidden_size": ' + "9" * 4000, "model.hidden_size:"),
        ('"num_layers": 4', '"num_layers": 1000000000', "model.num_layers:"),
        ('"default_scale": 2.0', '"default_scale": 1e999', "default_scale:"),
        ('"default_scale": 2.0', '"default_scale": 1e30', "default_scale:"),
        ('"default_scale": 2.0', '"default_scale": ' + "9" * 4000, "default_scale:"),
        ('"0": 10.0', '"0": 1e300', "residual_norms.0:"),
        ('"name": "random"', '"name": "' + "x" * 10**7 + '"', "model.name:"),
        ('"name": "random"', '"name": "\\u001b[2J"', "model.name:"),
        ('"name": "fears"', '"name": "fears", "name": "fears"', "key 'name' is given twice"),
        ('"name": "fears"', '"name": ".."', "name:"),
        ('"name": "fears"', '"name": "a/../b"', "name:"),
        ('"name": "spiders"', '"name": "../../spiders"', "directions.0.name:"),
        ('"name": "spiders"', '"name": ".."', "directions.0.name: .* must not be . or .."),
        ('"name": "spiders"', '"name": "..\\\\x"', "directions.0.name: .* must not contain a backslash"),
        ('"name": "spiders"', '"name": "a\\u0000b"', "directions.0.name:"),
        ('"name": "spiders"', '"name": "\\ud800"', "directions.0.name"),
        (VECTORS_FILE, "../../../etc/passwd", "tensors.file:"),
        (VECTORS_FILE, "/etc/passwd", "tensors.file:"),
    ],
)  # fmt: skip
def test_manifests_made_to_hurt(old: str, new: str, message: str, fears: SteeringPack) -> None:
    file = fears.path / MANIFEST_FILE
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    refused(fears.path, message)


def test_the_worst_manifest_that_is_parsed(fears: SteeringPack) -> None:
    file = fears.path / MANIFEST_FILE
    file.write_text(file.read_text().replace('"settings": {}', '"settings": ' + WORST))
    refused(fears.path, "method.settings:")


@pytest.mark.parametrize("name", [MANIFEST_FILE, VECTORS_FILE])
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "../outside", "elsewhere/file"])
def test_links_out_of_the_pack(name: str, target: str, fears: SteeringPack) -> None:
    (fears.path.parent / "outside").write_bytes((fears.path / name).read_bytes())
    (fears.path.parent / "real").mkdir()
    (fears.path.parent / "real" / "file").write_bytes((fears.path / name).read_bytes())
    (fears.path / "elsewhere").symlink_to(fears.path.parent / "real")
    (fears.path / name).unlink()
    (fears.path / name).symlink_to(target)
    refused(fears.path, f"{name}: a link that points outside the pack")


def test_links_within_and_to_the_pack(fears: SteeringPack, tmp_path: Path) -> None:
    os.rename(fears.path / VECTORS_FILE, fears.path / "v")
    (fears.path / VECTORS_FILE).symlink_to("v")
    (tmp_path / "current").symlink_to(fears.path)
    assert load_pack(tmp_path / "current").digests == fears.digests
    (fears.path / "v").unlink()
    refused(fears.path, "cannot be read")
    (fears.path / "v").symlink_to(VECTORS_FILE)
    refused(fears.path, "cannot be read")


@pytest.mark.parametrize("name", [MANIFEST_FILE, VECTORS_FILE])
def test_what_is_no_plain_file(name: str, fears: SteeringPack) -> None:
    (fears.path / name).unlink()
    os.mkfifo(fears.path / name)
    refused(fears.path, f"{name}: not a regular file")
    (fears.path / name).unlink()
    (fears.path / name).mkdir()
    refused(fears.path, f"{name}: (not a regular file|cannot be read)")


def many(path: Path, count: int) -> SteeringPack:
    directions = {f"direction {index}": [1, 2, 3] for index in range(count)}
    return write_random_pack(
        path, "many", random_identity(HIDDEN, 4), directions, seed=0, default_scale=1.0,
        safe_scale=1.0, residual_norm=10.0,
    )  # fmt: skip


def test_ten_thousand_directions_load(tmp_path: Path) -> None:
    pack = many(tmp_path / "many", 10_000)
    with bounded():
        again = load_pack(pack.path)
    assert len(again.digests) == 10_000


def test_too_many_directions(fears: SteeringPack) -> None:
    def repeat(manifest: dict[str, Any]) -> None:
        record = {**manifest["directions"][0], "layers": [1], "metrics": {}}
        manifest["directions"] = [{**record, "name": f"{index}"} for index in range(90_000)]

    edit(fears, repeat)
    refused(fears.path, "directions:")
