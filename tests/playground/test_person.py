"""A person's whole way through the playground of a real ``vllm serve``, with the demo model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.playground.conftest import Page
from tests.unit.conftest import calibrated
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack, load_pack, update_records

pytestmark = pytest.mark.browser
TEXT = user_text(statements("heldout")[0].text)
KEY, GUEST = "the-key-of-a-friend", "the-key-of-a-guest"
# Page weight and seconds that a change must not exceed unnoticed.
MOST_BYTES = 100_000
MOST_SECONDS = 5.0
# Of a score as the page shows it, to six digits.
TOLERANCE = 1e-5


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def calibrated_packs(
    packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The packs, with ranges at which text was fluent, as a calibration writes them."""
    folder, paths = tmp_path_factory.mktemp("calibrated"), []
    for pack in packs:
        updates = {}
        for name, record in pack.directions.items():
            scale = record.default_scale
            known = {"gap_closed": 0.4, "repetition": 0.1, "perplexity": 7.5}
            curve = [known | {"scale": scale * f, "fluent": f < 2} for f in (0.5, 1.0, 2.0)]
            measured = {"calibration": calibrated(curve=curve), "safe_scale": 1.5 * scale}
            updates[name] = measured
        copied = load_pack(shutil.copytree(pack.path, folder / pack.name))
        paths.append(update_records(copied, updates).path)
    return paths


@pytest.fixture(scope="module")
def server(
    model: Path, calibrated_packs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("playground")
    cheerful = {"directions": [{"name": "moods/cheerful", "strength": 1.0}]}
    policy = {
        "aliases": {"cheerful": cheerful},
        "default": {"directions": [{"name": "moods/gloomy", "strength": 1.0}]},
        "max_dose": 2.0,
        "dose_action": "reduce",
        "keys": {sha(KEY): ["*"], sha(GUEST): ["moods/*"]},
    }
    (folder / "policy.json").write_text(json.dumps(policy))
    options = ["--steering-playground", "--steering-policy", str(folder / "policy.json")]
    options += ["--steering-reads", "2", "--steering-ops", "affine", "--enforce-eager"]
    # Nothing strips the prefix here; a proxy may.
    options += ["--root-path", "/models/demo", "--api-key", KEY, GUEST]
    with serve(model, calibrated_packs, folder / "log", *options) as running:
        yield running


@pytest.fixture
def base(server: Server) -> str:
    return server.url.removesuffix("/v1")


@pytest.fixture
def opened(page: Page, base: str) -> Page:
    page.open(f"{base}/steering")
    return page


def choose(page: Page, *names: str) -> None:
    for name in names:
        page.write("#find", name)
        page.press("#found li .buttons button")


def texts(page: Page) -> list[str]:
    return [str(each.get_property("textContent")) for each in page.all(".answer")]


def receipt(page: Page) -> dict[str, Any]:
    """The receipt below the last answer, as the page shows it."""
    page.script("[...document.querySelectorAll('.receipt details')].at(-1).open = true")
    code = "return [...document.querySelectorAll('.receipt pre')].at(-1).textContent"
    return dict(json.loads(page.until(page.script, code)))


def asked(base: str, **fields: Any) -> dict[str, Any]:
    """What the server answers to a request without the page."""
    body = {"model": SERVED_NAME, "max_tokens": 24, "temperature": 0.0, "seed": 0}
    body |= {"messages": [{"role": "user", "content": TEXT}]}
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{base}/v1/chat/completions"
    return dict(httpx.post(url, json=body | fields, headers=headers, timeout=120).json())


def snippet(page: Page, kind: str, which: str = "steered") -> str:
    page.script(f"document.querySelector('[name=format][value={kind}]').click()")
    page.script(f"document.querySelector('[name=which][value={which}]').click()")
    return page.text("#snippet")


def test_the_page_is_small_and_soon_there(opened: Page, base: str) -> None:
    entries = opened.script(
        "return performance.getEntriesByType('resource').map((e) => e.toJSON())"
    )
    assert all(entry["name"].startswith(f"{base}/") for entry in entries)
    files = [entry for entry in entries if "/steering/" in entry["name"].partition("/v1/")[0]]
    size = sum(entry["encodedBodySize"] for entry in files)
    size += opened.script("return performance.getEntriesByType('navigation')[0].encodedBodySize")
    ready = opened.script("return performance.getEntriesByName('interactive')[0].startTime") / 1000
    figures = {"bytes": size, "files": len(files) + 1, "seconds to interactive": round(ready, 3)}
    (opened.pictures / "figures.json").write_text(json.dumps(figures))
    assert 0 < size < MOST_BYTES, figures
    assert 0 < ready < MOST_SECONDS, figures


def test_without_a_key_nothing_is_shown_and_the_key_is_asked_for(opened: Page) -> None:
    assert "401: The server asks for an API key" in opened.text("#notice")
    assert not opened.find("#ask").is_enabled()
    assert opened.script("return document.activeElement.id") == "key"
    assert opened.violations() == []
    opened.use_key("no-such-key")
    opened.until(lambda: "401" in opened.text("#notice"))
    assert opened.text("#found-note") == "0 directions."


def test_a_guest_sees_and_uses_what_its_key_allows(opened: Page) -> None:
    opened.use_key(GUEST)
    opened.until(lambda: opened.text("#found-note") == "2 directions.")
    assert "fears" not in opened.text("#found")
    assert [each.text for each in opened.all("#model option")] == [
        SERVED_NAME,
        f"{SERVED_NAME}:cheerful (alias)",
    ]
    choose(opened, "cheerful")
    opened.script("document.querySelectorAll('details').forEach((each) => each.open = true)")
    opened.write("#extra", '{"directions": [{"name": "fears/spiders", "scale": 1}]}')
    opened.write("#max-tokens", "8")
    opened.ask(TEXT)
    assert "not allowed to use 'fears/spiders'" in opened.text("#answers")


def test_a_whole_way(opened: Page, base: str, tmp_path: Path) -> None:
    opened.use_key(KEY)
    opened.until(lambda: opened.text("#found-note") == "4 directions.")
    opened.write("#question", TEXT)
    opened.write("#max-tokens", "24")
    choose(opened, "cheerful", "spiders")
    opened.press("#found li .buttons button:nth-child(2)")
    # The slider has the range at which text was fluent, and moves by the keyboard.
    cheerful = next(row for row in opened.all("#chosen .row") if "cheerful" in row.text)
    assert "fluent to" in cheerful.text
    fluent = cheerful.find_element("css selector", ".marks .fluent")
    read = "return [...arguments].slice(1).map((e) => +arguments[0].style.getPropertyValue(e))"
    low, high = opened.script(read, fluent, "--from", "--to")
    assert (low, high) == (0.5, pytest.approx(1.0 - (1.0 - 1 / 1.5) / 2))
    slider = cheerful.find_element("css selector", "[type=range]")
    value = cheerful.find_element("css selector", "[type=number]")
    before = float(value.get_property("value"))
    slider.send_keys("\ue014" * 3)
    assert float(value.get_property("value")) > before
    # The second acts on the answer alone, and fades.
    opened.script("document.querySelectorAll('#chosen details')[1].open = true")
    selects = opened.all("#chosen .row:nth-child(2) details select")
    opened.script("arguments[0].id = 'at'; arguments[1].id = 'shape'", *selects[:2])
    opened.choose("#at", "generated")
    opened.choose("#shape", "linear")
    opened.ask()
    plain, steered = texts(opened)
    body = json.loads(snippet(opened, "json"))
    directions = body["steering"]["directions"]
    assert [each["name"] for each in directions] == ["moods/cheerful", "fears/spiders"]
    assert directions[1]["positions"] == "generated"
    assert directions[1]["schedule"] == {"start": 1, "end": 0, "tokens": 32, "shape": "linear"}
    # The page shows what the server answers to the same requests without it.
    unsteered = asked(base, steering="none")
    again = asked(base, **body)
    # A stop token is no part of the content, but has a score.
    assert plain.startswith(unsteered["choices"][0]["message"]["content"])
    assert steered.startswith(again["choices"][0]["message"]["content"])
    assert plain != steered
    shown = receipt(opened)
    (expected,) = again["steering"]
    assert shown["directions"] == expected["directions"]
    assert shown["dose"] == expected["dose"]
    assert f"Dose {shown['dose']:g}" in opened.text(".pane:nth-child(2) .dose")
    # Every token that has a score has its colour, and the score of the receipt.
    scores = shown["reads"][0]["answers"][0]["generated"]
    tokens = opened.all(".pane:nth-child(2) .token")
    assert len(tokens) == len(scores)
    titles = [each.get_attribute("title") for each in tokens]
    for title, score in zip(titles, scores, strict=True):
        if score is None:
            assert not title
        else:
            assert float(title.removeprefix("score ")) == pytest.approx(score, abs=TOLERANCE)
    assert any(each.value_of_css_property("background-color") != "rgba(0, 0, 0, 0)" for each in tokens)  # fmt: skip
    # What is copied works where it is run.
    environment = os.environ | {"API_KEY": KEY}
    run = [sys.executable, "-c", snippet(opened, "python")]
    done = subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
    content = again["choices"][0]["message"]["content"]
    assert done.stdout.startswith(content)
    curl = ["sh", "-c", snippet(opened, "curl")]
    done = subprocess.run(curl, check=True, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == content
    assert KEY not in opened.text("body")
    # A question over strengths.
    opened.write("#factors", "0, 1, 2")
    opened.choose("#vary", "alone")
    opened.press("#sweep")
    opened.until(lambda: opened.text("#status") == "The sweep has 6 of 6 answers")
    cells = [str(each.get_property("textContent")) for each in opened.all(".cell")]
    assert len(cells) == 6
    assert cells[0] == cells[3]
    assert cells[0] == unsteered["choices"][0]["message"]["content"]
    for index in (1, 2):
        scaled = directions[0] | {"scale": directions[0]["scale"] * index}
        found = asked(base, steering={"directions": [scaled]})
        assert cells[index] == found["choices"][0]["message"]["content"]
    # Twice a scale that is fluent to 1.5 of it: the policy's limit.
    assert "dose" in opened.text("#grid")
    opened.script("document.querySelectorAll('.receipt details').forEach((e) => e.open = false)")
    opened.script("document.querySelectorAll('#chosen details').forEach((e) => e.open = false)")
    for scheme in ("light", "dark"):
        opened.scheme(scheme)
        opened.size(1280)
        opened.picture(f"whole-{scheme}")
        assert opened.violations() == []
        opened.size(360, 740)
        assert opened.fits()
        opened.picture(f"phone-{scheme}")
        assert opened.violations() == []
    assert opened.stored() == [0, "", [], []]
    assert opened.faults() == []
    origins = opened.script(
        "return [...new Set(performance.getEntriesByType('resource').map((e) => new URL(e.name).origin))]"
    )
    assert origins == [base]


def test_a_dose_that_the_policy_reduces_is_said(opened: Page) -> None:
    opened.use_key(KEY)
    opened.until(lambda: opened.text("#found-note") == "4 directions.")
    choose(opened, "gloomy")
    opened.write("#max-tokens", "8")
    value = opened.find("#chosen [type=number]")
    scale = float(value.get_property("value"))
    opened.script("arguments[0].value = ''", value)
    value.send_keys(str(scale * 20))
    opened.ask(TEXT)
    factor = receipt(opened)["dose_factor"]
    assert factor < 1
    assert f"multiplied all scales by {factor:.6g}" in opened.text(".receipt")


def test_an_alias_says_what_it_steers(opened: Page, base: str) -> None:
    opened.use_key(KEY)
    opened.until(lambda: opened.text("#found-note") == "4 directions.")
    opened.write("#max-tokens", "24")
    opened.choose("#model", f"{SERVED_NAME}:cheerful")
    assert "moods/cheerful strength 1" in opened.text("#alias")
    assert "fluent to" in opened.text("#alias")
    opened.ask(TEXT)
    plain, steered = texts(opened)
    assert plain == asked(base, steering="none")["choices"][0]["message"]["content"]
    assert steered == asked(base, model=f"{SERVED_NAME}:cheerful")["choices"][0]["message"]["content"]  # fmt: skip
    opened.press("#alias button")
    opened.ask()
    assert texts(opened) == [plain, steered]


def test_a_proxy_may_strip_the_prefix_or_not(page: Page, base: str) -> None:
    page.open(f"{base}/models/demo/steering")
    assert page.driver.current_url == f"{base}/models/demo/steering/"
    page.use_key(KEY)
    page.until(lambda: page.text("#found-note") == "4 directions.")
    choose(page, "gloomy")
    assert f"{base}/models/demo/v1/chat/completions" in page.text("#snippet")
