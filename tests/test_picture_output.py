"""Pictures as parts of a page and as files: `engine.pictures.output`."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine.pictures import alt_text, image_to_jpeg, to_jpeg, to_png, to_svg

NAME = '<b>&"肺" $x_{$ url(#x) --> id="y"'
XLINK = "{http://www.w3.org/1999/xlink}href"


def picture(name: str = NAME, height: float = 1.0) -> Figure:
    """With clipped lines, markers, a hatch and an image, each of which refers to something by its id."""
    figure = Figure(figsize=(3, 2))
    figure.set_label(f"Shows {name}.")
    axes = figure.add_subplot()
    axes.plot([0, 1, 2], [0, height, 0], "o-")
    axes.bar([0], [height], hatch="/")
    axes.imshow(np.eye(2), extent=(0, 1, 0, 1))
    axes.set_title(name, parse_math=False)
    return figure


def ids(svg: str) -> set[str]:
    return {element.get("id") for element in ElementTree.fromstring(svg).iter() if element.get("id")}


def test_the_same_picture_gives_the_same_bytes():
    assert to_svg(picture()) == to_svg(picture())
    assert to_png(picture()) == to_png(picture())


def test_an_svg_is_one_element_that_says_what_it_shows():
    figure = picture()
    svg = to_svg(figure)
    root = ElementTree.fromstring(svg)
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert (root.get("role"), root.get("aria-label")) == ("img", alt_text(figure)) == ("img", f"Shows {NAME}.")
    assert (root.get("width"), root.get("height")) == ("216", "144")
    assert NAME in {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_an_svg_holds_nothing_that_reaches_beyond_it():
    svg = to_svg(picture())
    for alien in ("<?xml", "<!DOCTYPE", "<style", "<metadata", "matplotlib", "purl.org", "creativecommons"):
        assert alien not in svg
    targets = [element.get(XLINK) for element in ElementTree.fromstring(svg).iter() if element.get(XLINK)]
    assert targets and all(target.startswith(("#", "data:image/png")) for target in targets)


def test_ids_are_those_that_are_referred_to_and_no_other_pictures():
    svgs = [to_svg(picture()), to_svg(picture(height=2.0)), to_svg(picture("other"))]
    for svg in svgs:
        elements = [
            element.attrib for element in ElementTree.fromstring(svg).iter() if "aria-label" not in element.attrib
        ]
        used = {element[XLINK][1:] for element in elements if element.get(XLINK, "").startswith("#")}
        painted = re.findall(r"url\(#([^)]+)\)", " ".join(value for element in elements for value in element.values()))
        assert ids(svg) == used | set(painted)
        assert used and painted
    assert len(set.union(*map(ids, svgs))) == sum(len(ids(svg)) for svg in svgs)


@pytest.mark.parametrize(("make", "kind"), [(to_png, "PNG"), (to_jpeg, "JPEG")])
def test_files_are_whole_images(make, kind):
    with Image.open(io.BytesIO(make(picture(), dpi=50))) as image:
        image.load()
        assert (image.format, image.size) == (kind, (150, 100))
        assert "Software" not in image.info


def test_a_photograph_becomes_a_jpeg_file():
    pixels = np.repeat(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], 30, axis=0).repeat(3, axis=2)
    with Image.open(io.BytesIO(image_to_jpeg(pixels))) as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).max() < 8
