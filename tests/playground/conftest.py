"""A real browser, Debian's Chromium, and what the tests ask of a page."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

# Where make playground-test puts it.
AXE = Path("axe", "node_modules", "axe-core", "axe.min.js")
# Where the screenshots go, to be looked at.
PICTURES = "PLAYGROUND_PICTURES"
SECONDS = 300


class Page:
    """The playground as a person has it before them."""

    def __init__(self, driver: Any, pictures: Path) -> None:
        self.driver = driver
        self.pictures = pictures

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(self.script, "return performance.getEntriesByName('interactive').length")

    def until(self, found: Any, *given: Any) -> Any:
        """Waits until ``found(*given)`` is true, and returns it."""
        return WebDriverWait(self.driver, SECONDS, 0.1).until(lambda _: found(*given))

    def script(self, code: str, *given: Any) -> Any:
        return self.driver.execute_script(code, *given)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return str(self.find(css).get_property("textContent"))

    def press(self, css: str) -> None:
        """Presses a button by the keyboard."""
        button = self.until(lambda: self.find(css))
        self.script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.send_keys(Keys.ENTER)

    def write(self, css: str, text: str) -> None:
        control = self.find(css)
        control.send_keys(Keys.CONTROL, "a")
        control.send_keys(Keys.DELETE)
        control.send_keys(text)

    def choose(self, css: str, value: str) -> None:
        Select(self.find(css)).select_by_value(value)

    def use_key(self, key: str) -> None:
        self.write("#key", key)
        self.press("#use-key")

    def ask(self, question: str | None = None) -> None:
        if question is not None:
            self.write("#question", question)
        self.press("#ask")
        self.idle()

    def idle(self) -> None:
        """Waits for the end of all answers."""
        self.until(lambda: self.find("#ask").is_enabled() and not self.find("#stop").is_enabled())

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, name: str, whole: bool = True) -> None:
        """Takes a screenshot, of the whole page or of what is in view."""
        import base64

        given = {"captureBeyondViewport": whole, "format": "png"}
        if whole:
            # The bar of buttons follows the view.
            self.script("window.scrollTo(0, 0)")
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            given["clip"] = {**size, "x": 0, "y": 0, "scale": 1}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", given)["data"]
        (self.pictures / f"{name}.png").write_bytes(base64.b64decode(data))

    def violations(self) -> list[str]:
        """What axe-core finds, by rule and element."""
        self.script(_axe().read_text())
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then("
            "(found) => done(found.violations), (error) => done([{id: String(error), nodes: []}]))"
        )
        return [
            f"{each['id']}: {node['target']} {node['failureSummary']}"
            for each in found
            for node in each["nodes"] or [{"target": "", "failureSummary": ""}]
        ]

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(
            self.script("return document.scrollingElement.scrollWidth <= window.innerWidth")
        )

    def faults(self) -> list[str]:
        """What the browser complained of since this was asked last, but for answers that are errors."""
        lines = [line for line in self.driver.get_log("browser") if line["level"] != "DEBUG"]
        return [
            line["message"] for line in lines if "Failed to load resource" not in line["message"]
        ]

    def stored(self) -> list[Any]:
        """What the page has left in the browser."""
        return [
            self.script("return localStorage.length + sessionStorage.length"),
            self.script("return document.cookie"),
            self.driver.execute_async_script("indexedDB.databases().then(arguments[0])"),
            self.driver.execute_async_script("caches.keys().then(arguments[0])"),
        ]


def _axe() -> Path:
    given = os.environ.get("AXE")
    return Path(given) if given else Path(sys.prefix) / AXE


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(shutil.which("chromedriver") or "chromedriver")
    started = webdriver.Chrome(options, service)
    started.set_script_timeout(SECONDS)
    yield started
    started.quit()


@pytest.fixture
def page(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page of its own for each test; pictures go where a variable says, else with the test's files."""
    given = os.environ.get(PICTURES)
    pictures = Path(given) if given else tmp_path_factory.mktemp("pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    driver.switch_to.new_window("tab")
    made = Page(driver, pictures)
    made.size(1280)
    made.scheme("light")
    made.faults()
    return made
