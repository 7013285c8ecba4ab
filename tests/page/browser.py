"""A headless Chromium that a test drives through its own driver."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE_S = 90
_NAMES = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))


def missing() -> str:
    """The package that is not installed; empty where a browser can be started."""
    for names, package in zip(_NAMES, ("chromium", "chromium-driver"), strict=True):
        if not _found(names):
            return f"{names[0]} is not installed; Debian has it in the package {package}"
    return ""


class Browser:
    """One window.

    Args:
        driver: What controls it.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to a page, and wait until it was drawn."""
        self.driver.get(url)
        self.wait(lambda: self.find("#explain button, button#explain"))

    def find(self, selector: str) -> list[Any]:
        """The elements that fit a CSS selector."""
        found: list[Any] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def one(self, selector: str) -> Any:
        """The first element that fits, once there is one."""
        return self.wait(lambda: self.find(selector))[0]

    def wait(self, reached: Callable[[], Any]) -> Any:
        """Wait until something is so; what it gives then."""
        waiting = WebDriverWait(
            self.driver, PATIENCE_S, 0.1, ignored_exceptions=[StaleElementReferenceException]
        )
        return waiting.until(lambda _: reached())

    def upload(self, file: Path) -> None:
        """Give the page a picture, as if it was dropped."""
        self.one("#picture input[type=file]").send_keys(str(file.absolute()))

    def choose(self, field: str, option: str) -> None:
        """Pick an entry of a list."""
        self.one(f"{field} input").click()

        def found() -> list[Any]:
            entries = self.find("ul[role=listbox] li, [role=option]")
            return [entry for entry in entries if content(entry).strip(" ✓\n") == option]

        self.wait(found)[0].click()

    def text(self, selector: str) -> str:
        """The text of the first element that fits; empty where none does."""
        return "".join(str(element.text) for element in self.find(selector)[:1])

    def picture(self, selector: str) -> Image.Image | None:
        """The picture of an <img> whose data are in the page."""
        images = self.find(selector)
        address = str(images[0].get_attribute("src")) if images else ""
        kind, _, content = address.partition(",")
        if not kind.startswith("data:image/"):
            return None
        return Image.open(io.BytesIO(base64.b64decode(content)))

    def requests(self) -> list[str]:
        """The addresses that the browser asked for since the last call."""
        entries = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        messages = [entry["message"] for entry in entries]
        return [
            str(message["params"]["request"]["url"])
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


def content(element: Any) -> str:
    """The text of an element, also where it is scrolled out of sight."""
    return str(element.get_attribute("textContent"))


@contextmanager
def chromium(width: int = 1280, height: int = 800) -> Iterator[Browser]:
    """Start a browser without a window."""
    options = Options()
    options.binary_location = _found(_NAMES[0])
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        f"--window-size={width},{height}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_found(_NAMES[1])))
    try:
        driver.set_page_load_timeout(PATIENCE_S)
        yield Browser(driver)
    finally:
        driver.quit()


def _found(names: tuple[str, ...]) -> str:
    return next(filter(None, map(shutil.which, names)), "")
