"""Recipes: what they say of themselves, and how one builds on another."""

from __future__ import annotations

import pytest

from engine.build import open_data
from engine.command_line import RECIPES, about_recipe, read_recipe
from engine.config import Config
from engine.errors import UserError

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_is_and_what_it_says_works(name):
    about = about_recipe(name)
    assert 20 < len(about) < 240
    assert "\n" not in about
    Config.from_mapping(read_recipe(name), name)


@pytest.mark.parametrize("name", ("busi", "histopathology", "leukemia-multitask"))
def test_a_recipe_for_other_images_asks_for_them(name):
    with pytest.raises(UserError, match="the embedded digits: name --data-dir or --csv"):
        open_data(Config.from_mapping(read_recipe(name), name))


def test_a_recipe_overrides_the_one_that_it_is_based_on(tmp_path):
    (tmp_path / "a.yaml").write_text("about: first\nbase: digits\nepochs: 7\nlr: 0.1\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nlr: 0.2\n")
    assert read_recipe(str(tmp_path / "b.yaml")) == read_recipe("digits") | {"epochs": 7, "lr": 0.2}
    assert about_recipe(str(tmp_path / "a.yaml")) == "first"
    assert about_recipe(str(tmp_path / "b.yaml")) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("base: mine.yaml", "based on this recipe itself"),
        ("base: no-such", "--recipe no-such: no such recipe"),
        ("base: [digits]", "base: .* must be a text"),
        ("about: 3", "about: 3 must be a text"),
    ),
)
def test_what_a_recipe_says_of_itself_is_checked(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)
