"""The page of `engine.report` in Chromium, at a desk, on a phone and on paper.

Without Chromium these tests are skipped, unless the environment says BROWSER_TESTS=required.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from engine import report
from engine.cli import run
from tests.report_pages import HOSTILE, HOSTILE_FILE, TREE
from tests.report_runs import write_run

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
DESK, PHONE, PAPER = {"width": 1280, "height": 900}, {"width": 360, "height": 740}, {"width": 688, "height": 1000}
"""CSS pixels; of A4 what is between its margins."""


@pytest.fixture(scope="module")
def browser():
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        binary, sync_playwright = None, None
    if binary is None:
        reason = "no Chromium, or no playwright: apt-get install chromium, pip install playwright"
        (pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=binary, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """Two runs that are compared, with hostile names and images, and a third one, with heads, that is not."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [
        write_run(folder / "a <b>run with a long name", HOSTILE, images=folder / "images", files=(HOSTILE_FILE,)),
        write_run(folder / "second", HOSTILE, seed=1, split="validation"),
        write_run(folder / "heads", heads=TREE),
    ]
    assert run(report.main, [*map(str, runs), "--device", "cpu", "--output", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.fixture
def open_page(browser, page_file):
    """Opens the page so wide, in light or dark; it must not say or ask for anything."""
    contexts = []

    def opened(viewport, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=False)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(page_file.as_uri(), wait_until="load")
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("viewport", "scheme"), ((DESK, "light"), (PHONE, "dark")), ids=("desk", "phone"))
def test_the_page_fits_asks_for_nothing_and_is_accessible(open_page, page_file, viewport, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(viewport, scheme)
    width = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width[0] <= width[1] == viewport["width"]
    sizes = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(sizes) == 24
    assert all(complete and natural > 0 for complete, natural in sizes)

    # what is folded away is to be looked at too; drawings are not, which takes long: black on white
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    drawings = {"exclude": [[".picture svg"]]}
    found = Axe().run(page, drawings, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(rule["id"], node["html"][:200]) for rule in found for node in rule["nodes"]] == []
    assert page.said == []
    # Chromium tells of pictures that stand in the page as well
    assert [url for url in page.asked if not url.startswith("data:")] == [page_file.as_uri()]


@pytest.mark.parametrize(("viewport", "scheme"), ((DESK, "dark"), (PHONE, "light")), ids=("dark desk", "light phone"))
def test_the_other_scheme_fits_as_well_and_has_its_own_colours(open_page, viewport, scheme):
    page = open_page(viewport, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert page.said == []


def test_what_is_wider_than_a_phone_scrolls_in_a_box_that_the_keyboard_reaches(open_page):
    page = open_page(PHONE)
    boxes = page.evaluate(
        "[...document.querySelectorAll('*')].filter(box => box.clientWidth && box.scrollWidth > box.clientWidth"
        " && getComputedStyle(box).overflowX === 'auto').map(box => [box.tabIndex, box.offsetWidth])"
    )
    assert len(boxes) > 5
    assert all(index == 0 and width <= PHONE["width"] for index, width in boxes)


def test_the_page_prints_whole(open_page):
    page = open_page(PAPER)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"]
    clipped = page.evaluate(
        """width => [...document.querySelectorAll('table, pre, .picture svg, img')].filter(part => {
            const box = part.getBoundingClientRect();
            return box.right > width + 1 || box.height < 5 || getComputedStyle(part.parentElement).overflowX === 'auto';
        }).map(part => part.outerHTML.slice(0, 200))""",
        PAPER["width"],
    )
    assert clipped == []
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = page.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 5
