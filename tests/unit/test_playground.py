"""The playground's routes and files, without a browser: what is served, with which headers, and when nothing is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from tests.unit.conftest import calibrated
from tests.unit.front_end import started
from tests.unit.test_layout import ROOT
from vllm_steer.config import CONFIG_KEY
from vllm_steer.errors import ConfigError
from vllm_steer.operations import FormChoice
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.serving import middleware, playground
from vllm_steer.serving.flags import add_flags, read_flags
from vllm_steer.serving.middleware import SteeringMiddleware
from vllm_steer.serving.packs_api import describe_pack
from vllm_steer.serving.policy import Policy

PAGE = ROOT / "vllm_steer" / "serving" / "page"
KEY = "5" * 64
Client = Callable[..., TestClient]


@pytest.fixture
def client(fears: SteeringPack, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Clients of a server with a flag, a policy and a proxy's prefix, of which it is told or not."""

    def make(on: bool = True, policy: Policy | None = None, prefix: str = "", **fields: Any) -> Any:
        admission = started(fears, playground=on, **fields)
        admission.policy = policy or Policy()
        monkeypatch.setattr(middleware, "current_admission", lambda: admission)

        async def others(request: Any) -> PlainTextResponse:
            return PlainTextResponse("of vLLM", 404)

        app: Any = SteeringMiddleware(Starlette(routes=[Route("/{path:path}", others)]))
        app = Mount(prefix, app) if prefix else app
        return TestClient(app, base_url="http://server", follow_redirects=False)

    return make


def test_without_the_flag_there_is_no_route(client: Client) -> None:
    for path in ("/steering", "/steering/", "/steering/main.js", "/steering/nothing"):
        assert client(on=False).get(path).text == "of vLLM"


def test_every_file_is_served_with_its_kind_and_a_strict_policy(client: Client) -> None:
    asked = client()
    assert {path.name for path in PAGE.iterdir()} == {file for file, _ in playground.FILES.values()}
    for name, (file, kind) in playground.FILES.items():
        answer = asked.get(f"/steering/{name}")
        assert answer.status_code == 200
        assert answer.content == (PAGE / file).read_bytes()
        assert answer.headers["content-type"] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in answer.headers
        rules = dict(
            rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
        )
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["trusted-types"] == "'none'"
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_only_the_files_are_served(client: Client) -> None:
    asked = client()
    for path in (
        "/steering/nothing.js",
        "/steering/index.html",
        "/steering/main.js/",
        "/steering//",
        "/steering/..%2fgrafana.json",
        "/steering/%2e%2e/grafana.json",
        "/steering/page/main.js",
        "/steering/main.js%00",
        "/steering/MAIN.JS",
    ):
        answer = asked.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["param"] == "path"
    # Of another route that begins so, nothing is taken.
    assert asked.get("/steeringwheel").text == "of vLLM"


def test_it_is_only_read(client: Client) -> None:
    asked = client()
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = asked.request(method, "/steering/")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    head = asked.head("/steering/main.js")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == (PAGE / "main.js").stat().st_size


def test_what_a_browser_has_is_not_sent_again(client: Client) -> None:
    asked = client()
    tag = asked.get("/steering/main.js").headers["etag"]
    again = asked.get("/steering/main.js", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == playground.POLICY
    other = asked.get("/steering/api.js", headers={"if-none-match": tag})
    assert other.status_code == 200


@pytest.mark.parametrize("prefix", ["", "/models/a"])
def test_it_works_behind_any_prefix(prefix: str, client: Client) -> None:
    """The page finds its files and the API relative to itself, so a proxy's prefix needs no setting."""
    asked = client(prefix=prefix)
    moved = asked.get(f"{prefix}/steering")
    assert moved.status_code == 307
    target = moved.next_request
    assert target is not None
    assert str(target.url) == f"http://server{prefix}/steering/"
    assert asked.get(f"{prefix}/steering/").status_code == 200
    assert asked.get(f"{prefix}/steering/main.js").status_code == 200
    for reference in _references():
        assert not re.match(r"[a-z]+:|/", reference), reference


class _Page(HTMLParser):
    """What a page refers to, and what a strict policy would block."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.inline: list[str] = []
        self.labels: set[str] = set()
        self.controls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.references += [str(given[name]) for name in ("src", "href") if name in given]
        self.inline += [
            f"{tag} {name}" for name in given if name.startswith("on") or name == "style"
        ]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)
        if tag == "label" and given.get("for"):
            self.labels.add(str(given["for"]))
        if tag in ("input", "select", "textarea") and given.get("type") != "radio":
            self.controls.append(str(given.get("id")))


def _page() -> _Page:
    page = _Page()
    page.feed((PAGE / "index.html").read_text())
    return page


def _references() -> list[str]:
    return [each for each in _page().references if not each.startswith("#")]


def test_the_page_refers_to_its_files_alone_and_has_nothing_inline() -> None:
    page = _page()
    assert set(_references()) <= set(playground.FILES)
    assert page.inline == []
    assert set(page.controls) == page.labels
    imported = set()
    for script in PAGE.glob("*.js"):
        found = re.findall(r'^import .* from "(.*)";$', script.read_text(), re.MULTILINE)
        assert all(each.startswith("./") for each in found)
        imported |= {each.removeprefix("./") for each in found}
    assert imported | {"main.js"} == {path.name for path in PAGE.glob("*.js")}


@pytest.mark.parametrize(
    "word",
    ["innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "new Function"]
    + ["localStorage", "sessionStorage", "indexedDB", ".cookie", "http:", "https:", "import("],
)
def test_no_script_makes_markup_stores_or_calls_elsewhere(word: str) -> None:
    for script in PAGE.glob("*.js"):
        assert word not in script.read_text(), script.name


def moved(*words: str) -> Any:
    """What the flags of a command become in ``additional_config``."""
    parser = add_flags(lambda parser: parser)(argparse.ArgumentParser())
    args = parser.parse_args(words)
    args.additional_config = None
    return read_flags(lambda cls, args: args.additional_config)(None, args)


def test_the_flag(fears: SteeringPack) -> None:
    packs = ("--enable-steering", "--steering-packs", str(fears.path))
    assert "playground" not in moved(*packs)[CONFIG_KEY]
    assert moved(*packs, "--steering-playground")[CONFIG_KEY]["playground"] is True
    with pytest.raises(ConfigError, match="--steering-playground: needs --enable-steering"):
        moved("--steering-playground")


def test_an_engine_without_a_server_refuses_it(fears: SteeringPack) -> None:
    from vllm_steer.serving.configure import resolve_config

    steering = {"packs": [str(fears.path)], "playground": True}
    given = SimpleNamespace(additional_config={CONFIG_KEY: steering})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_steer.serving.configure.refuse_unsupported", lambda config: None)
        with pytest.raises(ConfigError, match="playground: only vllm serve has the playground"):
            resolve_config(lambda self, usage, **more: given)(SimpleNamespace())


def test_lists_show_each_key_what_it_may_use(client: Client) -> None:
    steering = {"directions": [{"name": "fears/spiders", "strength": 1.0}]}
    both = {"directions": [{"name": "spiders", "scale": 2.0}, {"name": "New York", "scale": 1.0}]}
    both["schedule"] = {"start": 1.0, "end": 0.0, "tokens": 8}
    policy = Policy.model_validate(
        {
            "aliases": {"afraid": steering, "both": both},
            "keys": {KEY: ["*"], "*": ["fears/spiders"]},
            "max_dose": 2.0,
        }
    )
    asked = client(policy=policy, ops="affine", reads=2)
    open_to_all = asked.get("/v1/steering/aliases").json()
    # An alias with a direction that the key may not use is not told of, nor is what it does.
    assert open_to_all == {"aliases": [{"name": "afraid", "steering": steering}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_steer.serving.packs_api.key_digest", lambda scope: KEY)
        names = asked.get("/v1/steering/aliases").json()["aliases"]
        assert names[1] == {"name": "both", "steering": both}
    limits = asked.get("/v1/steering/limits").json()
    assert limits | {"layers": None} == {
        "ops": "affine",
        "rank": 2,
        "layers": None,
        "reads": 2,
        "max_dose": 2.0,
        "dose_action": "reject",
    }
    assert asked.get("/v1/steering/limits/more").status_code == 404


def test_a_direction_says_what_was_measured(fears: SteeringPack) -> None:
    record = fears.directions["spiders"].model_copy(
        update={"calibration": calibrated(), "form": FormChoice(op="ablate")}
    )
    pack = SimpleNamespace(
        name="fears",
        manifest=fears.manifest,
        directions={"spiders": record, "New York": fears.directions["New York"]},
        digests=fears.digests,
    )
    shown, plain = describe_pack(pack)["directions"]
    assert shown["calibration"]["scales"] == [2.0, 4.0]
    assert "curve" not in shown["calibration"]
    assert shown["form"] == {"op": "ablate"}
    assert (plain["calibration"], plain["form"]) == (None, None)
