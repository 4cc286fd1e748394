"""The page in a real browser, and the command that serves it.

`SCREENSHOT=docs/play.png pytest -n 0 -m slow tests/playground/test_page.py` draws the picture of the docs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitprune_env.cli import main
from vitprune_env.cli.flags import DeviceFlags, ImageFlags, read_flags
from vitprune_env.cli.play.command import Args
from vitprune_env.cli.play.opening import session_of
from vitprune_env.errors import SettingsError

STROKE = (23, 33, 13)  # patches of the digit in the first picture; without them it is read as another one
WAIT = 120  # seconds, of which a busy machine may need some


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        main(["play", "--no-browser"])
    assert stop.value.code == 2
    assert "pip install vitprune_env[play]" in capsys.readouterr().err


def test_flags_become_a_session(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("from vitprune_env import KeepAll\n\n\nclass Everything(KeepAll):\n    pass\n")
    args = Args(policy=("evit", "topk:leave=merge", f"{own}:Everything"), images=2, tune_images=4)
    session = session_of(args)
    assert session.policies == ("evit", "topk:leave=merge", "Everything", "by hand")
    assert len(session.pictures) == 2
    assert session.timed_images == 16


def test_network_images_and_device_are_given_as_to_other_commands() -> None:
    words = ["--dataset", "torch/cifar10", "--device", "cuda", "--threads", "3", "--seed", "4"]
    args = read_flags(Args, words, "")
    assert (args.source, args.machine, args.seed) == (ImageFlags(dataset="torch/cifar10"), DeviceFlags("cuda", 3), 4)


@pytest.mark.parametrize(
    "wrong", [{"images": 0}, {"policy": ("dynamicvit",)}, {"policy": ("nobody",)}, {"policy": ("evit", "evit")}]
)
def test_wrong_flags_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"images|dynamicvit|nobody|different names"):
        session_of(Args(**{"images": 2, "tune_images": 4, **wrong}))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio")
    from vitprune_env.playground.page import serve

    page = serve(session_of(Args()), browser=False)
    with pytest.raises(SettingsError, match="port"):
        serve(session_of(Args(images=1)), port=page.server_port, browser=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    chromium, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1360,1070", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.mark.slow
def test_a_visitor_changes_the_answer(address: str, browser: Any, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    left_arrow, wait = webdriver.Keys.ARROW_LEFT, pytest.importorskip("selenium.webdriver.support.wait")

    def text(name: str) -> str:  # of an element that may be replaced at any time
        return browser.execute_script("return document.getElementById(arguments[0])?.innerText ?? ''", name)

    def until(condition: Callable[[], object]) -> None:
        wait.WebDriverWait(browser, WAIT, 0.2).until(lambda _: condition(), "the page did not change as expected")

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    def click_patch(token: int) -> None:
        image = find("#board img")
        row, column = divmod(token, 10)
        size, middle = image.size, 4.5
        move = ((column - middle) * size["width"] / 10, (row - middle) * size["height"] / 10)
        webdriver.ActionChains(browser).move_to_element_with_offset(image, *map(round, move)).click().perform()

    browser.get(address)
    until(lambda: "x as fast" in text("vp-takes"))
    dense, cost = text("vp-reads").split()[1], text("vp-costs")
    assert "of dense" in cost
    assert "as the dense network does" in text("vp-reads")
    assert len(browser.find_elements("css selector", "#sites figure")) == 4  # three sites, and what EViT fused

    slider = find("#share input[type=range]")
    slider.send_keys(left_arrow)
    until(lambda: text("vp-costs") not in ("", cost))
    assert float(text("vp-costs").split()[1]) == pytest.approx(45, abs=2)
    assert "as the dense network does" in text("vp-reads")

    for count, token in enumerate(STROKE, start=1):
        click_patch(token)
        until(lambda count=count: f"{count} clicked away" in text("vp-keeps"))
    until(lambda: f"the dense network reads {dense}" in text("vp-reads"))
    assert text("vp-reads").split()[1] != dense
    until(lambda: "x as fast" in text("vp-takes"))
    assert f"{len(STROKE)} clicked away" in text("vp-keeps")  # no late answer to an earlier click came instead
    shot = Path(os.environ.get("SCREENSHOT", tmp_path / "page.png"))
    assert browser.save_screenshot(str(shot))
    with Image.open(shot) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert shot.stat().st_size < 400_000

    find("#back").click()
    until(lambda: "0 clicked away" in text("vp-keeps"))
    assert "as the dense network does" in text("vp-reads")

    find("#policy input").click()
    until(lambda: browser.find_elements("css selector", "[role=option]"))
    (by_hand,) = (each for each in browser.find_elements("css selector", "[role=option]") if each.text == "by hand")
    by_hand.click()
    until(lambda: "100.0 % of dense" in text("vp-costs"))

    browser.find_elements("css selector", "#pictures button.thumbnail-item")[1].click()
    until(lambda: text("vp-reads") and text("vp-reads").split()[1] != dense)

    own = tmp_path / "own.png"
    Image.new("RGB", (50, 70), (200, 30, 30)).save(own)
    find("input[type=file]").send_keys(str(own))
    until(lambda: len(browser.find_elements("css selector", "#pictures button.thumbnail-item")) == 17)
    until(lambda: "true" not in text("classes") and "x as fast" in text("vp-takes"))

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
