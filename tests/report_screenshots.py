"""Takes docs/report-desktop.png and docs/report-phone.png again: ``python -m tests.report_screenshots RUN_DIR``."""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.test_report_browser import FLAGS

DOCS = Path(__file__).parent.parent / "docs"
SHOTS = {"report-desktop.png": ((1280, 1500), 1, "light"), "report-phone.png": ((360, 740), 2, "dark")}
"""CSS pixels of the upper part of the page, how many of the picture's make one of them, and the scheme."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="a run that engine.report has made report.html of")
    page_file = parser.parse_args().run.absolute() / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        for name, ((width, height), scale, scheme) in SHOTS.items():
            viewport = {"width": width, "height": height}
            page = browser.new_page(viewport=viewport, device_scale_factor=scale, color_scheme=scheme)
            page.goto(page_file.as_uri())
            # few colours make a small file
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(255)
            shot.save(DOCS / name, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
