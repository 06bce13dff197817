"""Packs and aliases that change while the server answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError, OpenAI
from safetensors.numpy import save
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

from tests.documents import block
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.testing.random_pack import write_variant

pytestmark = pytest.mark.server
# Long enough to fill blocks of the prefix cache.
TEXT = " ".join(user_text(statement.text) for statement in statements("heldout")[:6])
MOODS: dict[str, Any] = {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}
MOOD: dict[str, Any] = {"directions": [{"name": "late/cheerful", "scale": 9.0}]}
TOKENS = 16
ROWS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def server(model: Path, packs: list[SteeringPack], root: Path) -> Iterator[Server]:
    moods = next(pack for pack in packs if pack.name == "moods")
    early = write_variant(moods, root / "early", "early", 0.5)
    paths = [pack.path for pack in (*packs, early)]
    options = ["--steering-pack-roots", str(root), "--enable-prefix-caching"]
    options += ["--steering-upload-mib", "1"]
    options += ["--steering-rows", str(ROWS + 1), "--steering-wait-seconds", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        with serve(model, paths, root / "log", "--enforce-eager", *options) as running:
            yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def load(server: Server, name: str) -> httpx.Response:
    return httpx.post(f"{server.url}/steering/packs", json={"name": name}, timeout=60)


def unload(server: Server, name: str) -> httpx.Response:
    return httpx.delete(f"{server.url}/steering/packs/{name}", timeout=60)


def ask(client: OpenAI, steering: dict[str, Any] | None) -> Any:
    return client.completions.create(
        model=SERVED_NAME,
        prompt=TEXT,
        max_tokens=TOKENS,
        temperature=0.0,
        logprobs=1,
        extra_body={"ignore_eos": True} | ({"steering": steering} if steering else {}),
    )


def logprobs(response: Any) -> list[float]:
    return response.choices[0].logprobs.token_logprobs


def named(response: Any) -> list[str]:
    (receipt,) = response.model_extra["steering"]
    return [direction["name"] for direction in receipt["directions"]]


def test_a_pack_of_the_start_is_replaced_on_disk_before_the_first_request(
    client: OpenAI, packs: list[SteeringPack], root: Path
) -> None:
    """Stands before all tests that steer: what the processes read is what was there at the start."""
    moods = next(pack for pack in packs if pack.name == "moods")
    write_variant(moods, root / "early", "early", -0.5)
    found = ask(client, {"directions": [{"name": "early/cheerful", "scale": 18.0}]})
    same = {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}
    assert logprobs(found) == pytest.approx(logprobs(ask(client, same)), abs=1e-4)


def test_reload_under_the_same_name(
    server: Server, client: OpenAI, packs: list[SteeringPack], root: Path
) -> None:
    """Other content is used at once, and finds no blocks of the old one in the prefix cache."""
    moods = next(pack for pack in packs if pack.name == "moods")
    with pytest.raises(BadRequestError, match="no steering pack 'late' is loaded"):
        ask(client, MOOD)
    write_variant(moods, root / "late", "late", 1.0)
    assert load(server, "late").status_code == 200
    first = ask(client, MOOD)
    same = ask(client, {"directions": [{"name": "moods/cheerful", "scale": 9.0}]})
    assert logprobs(first) == pytest.approx(logprobs(same), abs=1e-4)
    # Two packs of one content; the receipt names the one that was asked for.
    assert named(first) == ["late/cheerful"]
    assert named(same) == ["moods/cheerful"]

    turned = write_variant(moods, root / "late", "late", -1.0)
    answer = load(server, "late").json()
    assert answer["sha256"] == turned.manifest.tensors.sha256
    line = server.log.read_text().rpartition("Steering pack loaded: ")[2].partition("\n")[0]
    fields = json.loads(line)
    assert (fields["name"], fields["sha256"]) == ("late", answer["sha256"])
    assert fields["replaced"] == moods.manifest.tensors.sha256
    second = ask(client, MOOD)
    opposite = {"directions": [{"name": "moods/cheerful", "scale": -9.0}]}
    assert logprobs(second) == pytest.approx(logprobs(ask(client, opposite)), abs=1e-4)
    assert logprobs(second) != pytest.approx(logprobs(first), abs=1e-2)
    (receipt,) = second.model_extra["steering"]
    assert receipt["directions"][0]["digest"] == turned.digests["cheerful"]

    assert unload(server, "late").status_code == 200
    with pytest.raises(BadRequestError, match="no steering pack 'late' is loaded"):
        ask(client, MOOD)


def test_requests_under_way_keep_what_they_began_with(
    server: Server, client: OpenAI, packs: list[SteeringPack], root: Path
) -> None:
    moods = next(pack for pack in packs if pack.name == "moods")
    write_variant(moods, root / "late", "late", 1.0)
    assert load(server, "late").status_code == 200
    body = {"ignore_eos": True, "steering": MOOD}

    def stream_of(many: AsyncOpenAI) -> Any:
        return many.completions.create(
            model=SERVED_NAME,
            prompt=TEXT[:200],
            max_tokens=200,
            temperature=0.0,
            stream=True,
            extra_body=body,
        )

    async def text_of(stream: Any) -> str:
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> tuple[str, str, str, int]:
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as many:
            expected = await text_of(await stream_of(many))
            under_way = await stream_of(many)
            in_use = await asyncio.to_thread(unload, server, "late")
            write_variant(moods, root / "late", "late", -1.0)
            reloaded = await asyncio.to_thread(load, server, "late")
            assert reloaded.status_code == 200
            after = await stream_of(many)
            return expected, await text_of(under_way), await text_of(after), in_use.status_code

    expected, under_way, after, status = asyncio.run(run())
    assert status == 409
    assert under_way == expected
    assert after != expected
    assert unload(server, "late").status_code == 200


def test_requests_on_other_routes_keep_their_packs(
    server: Server, packs: list[SteeringPack], root: Path
) -> None:
    """The middleware is not in front of this one, so that no HTTP context describes the request."""
    if "vllm_xargs" not in AnthropicMessagesRequest.model_fields:
        pytest.skip("no other route of this vLLM takes steering")
    moods = next(pack for pack in packs if pack.name == "moods")
    write_variant(moods, root / "late", "late", 1.0)
    assert load(server, "late").status_code == 200
    body = {
        "model": SERVED_NAME,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 300,
        "vllm_xargs": {"steer": ["late/cheerful:9"]},
    }

    base = server.url.removesuffix("/v1")

    async def run() -> tuple[int, httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as many:
            under_way = asyncio.create_task(many.post(f"{server.url}/messages", json=body))
            while "steering:active_requests 1.0" not in (await many.get(f"{base}/metrics")).text:
                assert not under_way.done()
            in_use = await asyncio.to_thread(unload, server, "late")
            return in_use.status_code, await under_way

    status, answer = asyncio.run(run())
    assert answer.status_code == 200, answer.text
    assert status == 409
    assert unload(server, "late").status_code == 200


def test_refused_loads(server: Server, packs: list[SteeringPack], root: Path) -> None:
    outside = root.parent / "outside"
    write_variant(packs[0], outside, "outside", 1.0)
    (root / "outside").symlink_to(outside)
    write_variant(packs[0], root / "renamed", "other", 1.0)
    shutil.copytree(packs[0].path, root / "torn")
    with (root / "torn" / "steering_vectors.safetensors").open("ab") as stream:
        stream.write(b"x")
    refused = {
        "outside": "is outside the directories",
        "renamed": "is named 'other'",
        "torn": "torn",
        "nowhere": "no directory 'nowhere'",
        "../outside": "name",
        "": "name",
    }
    for name, message in refused.items():
        answer = load(server, name)
        assert answer.status_code == 400, name
        assert message in answer.json()["error"]["message"], name
    broken = httpx.post(f"{server.url}/steering/packs", content=b"{")
    assert broken.status_code == 400
    assert broken.json()["error"]["message"].startswith("body:")
    assert unload(server, "nobody").status_code == 400
    names = [pack["name"] for pack in httpx.get(f"{server.url}/steering/packs").json()["packs"]]
    assert names == [*(pack.name for pack in packs), "early"]
    load_pack(packs[0].path)


def test_aliases_at_run_time(server: Server, client: OpenAI) -> None:
    url = f"{server.url}/steering/aliases"
    steering = {"directions": [{"name": "moods/gloomy", "scale": 6.0}]}
    key = {"authorization": "Bearer an-operator"}
    assert httpx.put(f"{url}/gloomy", json=steering, headers=key).status_code == 200
    line = server.log.read_text().rpartition("Steering alias set: ")[2].partition("\n")[0]
    fields = json.loads(line)
    assert fields["alias"] == "gloomy"
    assert hashlib.sha256(b"an-operator").hexdigest().startswith(fields["key"])
    name = f"{SERVED_NAME}:gloomy"
    assert name in [card.id for card in client.models.list().data]
    aliased = client.completions.create(model=name, prompt=TEXT, max_tokens=4, temperature=0.0)
    assert aliased.model_extra["steering"][0]["directions"][0]["name"] == "moods/gloomy"
    assert unload(server, "moods").status_code == 409
    assert httpx.delete(f"{url}/gloomy").status_code == 200
    assert httpx.delete(f"{url}/gloomy").status_code == 400
    assert httpx.put(f"{url}/bad name", json=steering).status_code == 400
    unknown = {"directions": [{"name": "moods/nobody"}]}
    assert httpx.put(f"{url}/x", json=unknown).status_code == 400
    assert httpx.put(f"{server.url}/steering/other", json={}).status_code == 404


def tensors(pack: SteeringPack, name: str, sign: float = 1.0, **wrong: Any) -> bytes:
    """A direction as a client would send it."""
    layers = json.dumps(pack.directions[name].layers)
    vector = np.float32(sign) * pack.vectors[name]
    return save({"mine": vector.copy()} | wrong, metadata={"layers": layers})


def send(server: Server, name: str, body: bytes, query: str = "") -> httpx.Response:
    return httpx.put(f"{server.url}/steering/vectors/{name}{query}", content=body, timeout=60)


def test_vectors_that_a_client_sends(
    server: Server, client: OpenAI, packs: list[SteeringPack]
) -> None:
    """They steer like the pack that they are from, are replaced and forgotten, and expire."""
    moods = next(pack for pack in packs if pack.name == "moods")
    sent: dict[str, Any] = {"directions": [{"name": "sent/mine", "scale": 9.0}]}
    same = {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}
    answer = send(server, "sent", tensors(moods, "cheerful"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["directions"][0]["digest"] == moods.digests["cheerful"]
    assert logprobs(ask(client, sent)) == pytest.approx(logprobs(ask(client, same)), abs=1e-4)
    assert send(server, "sent", tensors(moods, "cheerful", -1.0)).status_code == 200
    opposite = {"directions": [{"name": "moods/cheerful", "scale": -9.0}]}
    assert logprobs(ask(client, sent)) == pytest.approx(logprobs(ask(client, opposite)), abs=1e-4)
    assert httpx.delete(f"{server.url}/steering/vectors/sent").status_code == 200
    with pytest.raises(BadRequestError, match="no steering pack 'sent' is loaded"):
        ask(client, sent)

    assert send(server, "sent", tensors(moods, "gloomy"), "?seconds=1").status_code == 200
    ask(client, sent)
    deadline = time.monotonic() + 20
    listed = f"{server.url}/steering/packs"
    while "sent" in [pack["name"] for pack in httpx.get(listed).json()["packs"]]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(BadRequestError, match="no steering pack 'sent' is loaded"):
        ask(client, sent)


def test_what_runs_in_the_background_keeps_what_it_needs(
    server: Server, client: OpenAI, packs: list[SteeringPack]
) -> None:
    """Its HTTP request is over while it waits in the engine's queue, behind as many answers as run at once."""
    moods = next(pack for pack in packs if pack.name == "moods")
    assert send(server, "kept", tensors(moods, "cheerful"), "?seconds=3").status_code == 200
    with ThreadPoolExecutor(1) as others:
        filler = others.submit(
            client.completions.create,
            model=SERVED_NAME,
            prompt=TEXT,
            n=64,
            max_tokens=250,
            extra_body={"ignore_eos": True},
        )
        time.sleep(1.0)
        answer = client.responses.create(
            model=SERVED_NAME,
            input="Hello",
            background=True,
            max_output_tokens=8,
            extra_body={"steering": {"directions": [{"name": "kept/mine"}]}},
        )
        assert answer.status == "queued"
        dropped = httpx.delete(f"{server.url}/steering/vectors/kept")
        assert not filler.done()
        assert (dropped.status_code, "in use" in dropped.text) == (409, True)
        deadline = time.monotonic() + 60
        while client.responses.retrieve(answer.id).status in ("queued", "in_progress"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ended = client.responses.retrieve(answer.id)
        assert ended.status in ("completed", "incomplete")
        (receipt,) = ended.model_extra["steering"]
        assert receipt["directions"][0]["name"] == "kept/mine"
        assert receipt["tokens_steered"] > 0
        filler.result()
    # Its time was over while it was needed.
    listed = f"{server.url}/steering/packs"
    while "kept" in [pack["name"] for pack in httpx.get(listed).json()["packs"]]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ask(client, {"directions": [{"name": "moods/cheerful", "scale": 9.0}]})


def all_rows(**fields: Any) -> dict[str, Any]:
    """A streaming request that holds every row for as long as the engine answers it."""
    choices = [
        {"name": "moods/cheerful", "scale": 1.0 + n, "positions": [[n, n + 1]]} for n in range(ROWS)
    ]
    body = {"model": SERVED_NAME, "prompt": TEXT, "stream": True, "ignore_eos": True}
    return body | {"steering": {"directions": choices}} | fields


def answered(client: OpenAI) -> bool:
    """Whether a steered request finds rows in time."""
    try:
        ask(client, MOODS)
    except InternalServerError:
        return False
    return True


def test_who_reads_nothing_holds_rows_no_longer_than_the_engine_works(
    server: Server, client: OpenAI
) -> None:
    content = json.dumps(all_rows(n=24, logprobs=20, max_tokens=370)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    address = urlsplit(server.url)
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect((address.hostname, address.port))
        unread.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        deadline = time.monotonic() + 120
        # It may not be there yet, then it holds all rows, and then none.
        for expected in (False, True):
            while answered(client) != expected:
                assert time.monotonic() < deadline, f"a steered request is answered: {not expected}"
        # All of them again.
        with httpx.stream(
            "POST", f"{server.url}/completions", json=all_rows(max_tokens=1), timeout=60
        ) as answer:
            assert answer.status_code == 200


def test_a_wait_ends_with_503_before_the_answer_begins(server: Server) -> None:
    with httpx.stream(
        "POST", f"{server.url}/completions", json=all_rows(n=32, max_tokens=370), timeout=60
    ) as held:
        assert held.status_code == 200
        body = {"model": SERVED_NAME, "prompt": TEXT, "max_tokens": 1, "steering": MOODS}
        said = [{"role": "user", "content": "Hello"}]
        chat = {key: value for key, value in body.items() if key != "prompt"} | {"messages": said}
        respond = {"model": SERVED_NAME, "input": "Hello", "steering": MOODS}
        for route, asked in (
            ("/completions", body),
            ("/completions", body | {"stream": True}),
            ("/chat/completions", chat | {"stream": True}),
            ("/chat/completions", chat),
            ("/responses", respond),
            ("/responses", respond | {"stream": True}),
        ):
            answer = httpx.post(f"{server.url}{route}", json=asked, timeout=60)
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "5"
            assert "x-steering" not in answer.headers
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == (503, "steering")
            assert "no row became free within 1 s" in error["message"]
    rejected = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    assert 'steering:rejected_total{reason="busy"}' in rejected


def test_vectors_that_are_refused(
    server: Server, packs: list[SteeringPack], tmp_path: Path
) -> None:
    pack = packs[0]
    name = next(iter(pack.directions))
    good, layers = tensors(pack, name), {"layers": "[0]"}
    width = pack.manifest.model.hidden_size
    refused: list[tuple[str, bytes, str, int, str]] = [
        ("sent", b"", "", 400, "not a safetensors file"),
        ("sent", good[:-4], "", 400, "bytes, but the file has"),
        ("sent", save({"mine": np.zeros((1, width), np.float32)}, layers), "", 400, "is zero"),
        ("sent", save({"mine": np.ones((1, 3), np.float32)}, layers), "", 400, "of shape"),
        ("sent", save({"mine": np.ones((1, width))}, layers), "", 400, "float64"),
        ("sent", save({"a/b": np.ones((1, width), np.float32)}, layers), "", 400, "name"),
        ("sent", save({"mine": np.ones((1, width), np.float32)}), "", 400, "in its header"),
        (
            "sent",
            save({"mine": np.ones((1, width), np.float32)}, {"layers": "[77]"}),
            "",
            400,
            r"after layers [77]",
        ),
        ("sent", good, "?seconds=0", 400, "from 1 to"),
        ("sent", good, "?ttl=5", 400, "from 1 to"),
        ("bad name", good, "", 400, "name"),
        (pack.name, good, "", 409, "name of a loaded"),
        ("sent", good + b"\0" * 2**20, "", 413, "larger than"),
    ]
    for to, body, query, status, message in refused:
        answer = send(server, to, body, query)
        assert answer.status_code == status, (message, answer.text)
        told = answer.json()["error"]["message"]
        assert message in told
        assert "/tmp" not in told
        assert str(tmp_path.parent) not in told
    assert httpx.delete(f"{server.url}/steering/vectors/sent").status_code == 400
    names = [one["name"] for one in httpx.get(f"{server.url}/steering/packs").json()["packs"]]
    assert "sent" not in names


def test_the_documentation_s_upload(server: Server, client: OpenAI, model: Path) -> None:
    """The program of the page on uploads, as it stands there."""
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    code = block("docs/how-to/uploads.md", "python", "/v1/steering/vectors/")
    code = code.replace("http://localhost:8000/v1", server.url).replace("HIDDEN_SIZE", str(width))
    exec(compile(code, "uploads.md", "exec"), {})
    assert named(ask(client, {"directions": [{"name": "mine/up"}]})) == ["mine/up"]
