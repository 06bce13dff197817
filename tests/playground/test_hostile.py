"""The playground before hostile packs, answers, errors and networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.playground.conftest import Page
from tests.playground.front_end import LONG, MARKUP, MODEL, FrontEnd, served
from tests.unit.conftest import HIDDEN, LAYERS
from tests.unit.front_end import started
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.serving import middleware
from vllm_steer.serving.policy import Policy
from vllm_steer.testing.random_pack import random_identity, write_random_pack

pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror=alert(1)>"
# Turns the direction of writing around.
TURNED = "calm\u202egnirrats"
LENGTHY = "x" * 128


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> SteeringPack:
    directions = {name: [1, 2] for name in (EVIL, TURNED, LENGTHY, "secret")}
    directions |= {f"number {number}": [1] for number in range(200)}
    return write_random_pack(
        tmp_path_factory.mktemp("pack") / "names",
        "names",
        random_identity(HIDDEN, LAYERS, name="<script>alert(2)</script>"),
        directions,
        seed=0,
        default_scale=2.0,
        safe_scale=4.0,
        residual_norm=10.0,
    )


@pytest.fixture(scope="module")
def front_end(pack: SteeringPack) -> Iterator[tuple[FrontEnd, str]]:
    admission = started(pack, playground=True, reads=2, layers=[1, 2])
    shown = {"directions": [{"name": f"names/{EVIL}", "scale": 3.0}], "until_token_ids": [5]}
    hidden = {"directions": [{"name": "names/secret", "scale": 3.0}]}
    admission.policy = Policy.model_validate(
        {
            "aliases": {"shown": shown, "hidden": hidden},
            "keys": {"*": [f"names/{TURNED}", "names/<*", "names/x*", "names/number*"]},
        }
    )
    made = FrontEnd()
    with pytest.MonkeyPatch.context() as patch, served(made) as url:
        patch.setattr(middleware, "current_admission", lambda: admission)
        yield made, url


@pytest.fixture
def opened(page: Page, front_end: tuple[FrontEnd, str]) -> Page:
    page.open(f"{front_end[1]}/steering")
    return page


def steer_with(page: Page, name: str) -> None:
    page.write("#find", name)
    page.press("#found li .buttons button")


def answers(page: Page) -> list[str]:
    return [str(each.get_property("textContent")) for each in page.all(".answer")]


def errors(page: Page) -> list[str]:
    return [each.text for each in page.all(".pane .error") if each.is_displayed()]


def test_names_and_answers_are_text(opened: Page) -> None:
    title = opened.script("return document.title")
    assert opened.text("#model") == f"{MODEL}{MODEL}:shown (alias)"
    steer_with(opened, "img")
    steer_with(opened, "gnirrats")
    steer_with(opened, LENGTHY)
    assert [row.text for row in opened.all("#chosen h3")] == [
        f"names/{each}" for each in (EVIL, TURNED.replace("\u202e", "\\u202e"), LENGTHY)
    ]
    opened.ask("markup")
    assert answers(opened) == [f"It begins {MARKUP}"] * 2
    assert opened.script("return document.title") == title
    assert not opened.all("main img, main script, main b")
    assert EVIL in opened.text("#snippet")
    assert "\u202e" not in opened.text("body")
    assert opened.violations() == []
    for width in (360, 1280):
        opened.size(width)
        assert opened.fits()
        opened.picture(f"hostile-{width}")
    assert opened.faults() == []


def test_what_a_key_may_not_use_is_not_shown(opened: Page) -> None:
    opened.write("#find", "secret")
    assert opened.text("#found-note") == "0 directions."
    assert "hidden" not in opened.text("body")


def test_an_alias_shows_what_it_steers(opened: Page, front_end: tuple[FrontEnd, str]) -> None:
    opened.choose("#model", f"{MODEL}:shown")
    assert f"names/{EVIL} ε 3" in opened.text("#alias")
    assert '"until_token_ids"' in opened.text("#alias")
    opened.ask("hello")
    # The middleware has made the alias's name that of the model.
    assert {each.get("steering") for each in front_end[0].bodies[-2:]} == {"none", None}
    opened.press("#alias button")
    opened.ask("hello")
    (copied,) = (each for each in front_end[0].bodies[-2:] if each["steering"] != "none")
    assert copied["model"] == MODEL
    assert copied["steering"] == {
        "directions": [{"name": f"names/{EVIL}", "scale": 3}],
        "until_token_ids": [5],
    }


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("error", f"The server ended the answer: {MARKUP} broke"),
        ("cut", "The connection ended before the answer did"),
        ("nonsense", "The server sent a chunk that is not an object: 3"),
    ],
)
def test_what_came_before_an_error_stays(question: str, message: str, opened: Page) -> None:
    opened.ask(question)
    assert errors(opened) == [message]
    assert answers(opened)[0] == "It begins "
    assert opened.text("#status") == "Not all answers are complete"
    # The next one is answered.
    opened.ask("again")
    assert answers(opened)[0] == "It begins again"
    assert errors(opened) == []


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        (401, "The server asks for an API key, or does not know this one"),
        (403, "This API key may not do this"),
        (503, "The server is busy"),
    ],
)
def test_refusals_are_shown_as_they_are(status: int, meaning: str, opened: Page) -> None:
    opened.ask(str(status))
    assert errors(opened) == [f"{status}: {meaning}. {MARKUP} is refused"]


def test_stopping_hangs_up(opened: Page, front_end: tuple[FrontEnd, str]) -> None:
    left = front_end[0].left
    opened.write("#question", "endless")
    opened.press("#ask")
    opened.until(lambda: len(answers(opened)[0]) > 100)
    opened.press("#stop")
    opened.idle()
    assert errors(opened) == ["Stopped."]
    opened.until(lambda: front_end[0].left == left + 1)


def test_leaving_the_page_hangs_up(opened: Page, front_end: tuple[FrontEnd, str]) -> None:
    left = front_end[0].left
    opened.write("#question", "endless")
    opened.press("#ask")
    opened.until(lambda: len(answers(opened)[0]) > 100)
    opened.driver.get("about:blank")
    opened.until(lambda: front_end[0].left == left + 1)


def test_a_huge_answer_leaves_the_page_usable(opened: Page) -> None:
    opened.ask("long")
    assert len(answers(opened)[0]) == len("It begins ") + len(LONG)
    opened.ask("short")
    assert answers(opened)[0] == "It begins short"


@pytest.mark.parametrize("key", ["a b", "ключ"])
def test_a_key_that_no_header_holds_is_refused(key: str, opened: Page) -> None:
    opened.use_key(key)
    assert "An API key has no blanks" in opened.text("#notice")


@pytest.mark.parametrize(
    ("css", "text", "message"),
    [
        ("#max-tokens", "", "This is no number"),
        ("#seed", "1.5", "This is no whole number"),
        ("#extra", "[1]", "This is no JSON object"),
        ("#chosen input[placeholder^=default]", "3-1", "Layers are numbers and ranges"),
    ],
)
def test_what_cannot_be_sent_is_not_asked(
    css: str, text: str, message: str, opened: Page, front_end: tuple[FrontEnd, str]
) -> None:
    steer_with(opened, "img")
    opened.script("document.querySelectorAll('details').forEach((each) => each.open = true)")
    opened.write(css, text)
    before = len(front_end[0].bodies)
    opened.press("#ask")
    assert message in opened.text("#notice")
    assert message in opened.text("#snippet")
    assert opened.find(css).get_attribute("aria-invalid") == "true"
    assert len(front_end[0].bodies) == before


def test_a_server_that_is_gone_is_said(page: Page, pack: SteeringPack, tmp_path: Path) -> None:
    admission: Any = started(pack, playground=True, layers=[1, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(middleware, "current_admission", lambda: admission)
        with served(FrontEnd()) as url:
            page.open(f"{url}/steering/")
        page.ask("hello")
    assert errors(page) == ["The server does not answer"]
    assert "The server does not answer" in page.text("#answers")
