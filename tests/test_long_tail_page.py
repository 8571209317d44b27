"""The page of ``benchmarks.long_tail``: its arms can be trained, and it says what they came to and what is missing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.long_tail import __main__ as page
from engine.comparison import Outcome, compare_outcomes
from engine.predictions import Predictions

METRICS = {"split": "test", "selected_on": "validation"}


def comparison(figures: dict[str, tuple[float, ...]]) -> dict:
    """Macro-F1 as given, by arm and seed."""
    predictions = Predictions(("a",), ("0", "1"), torch.tensor([0]), torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    outcomes = {
        arm: [Outcome(METRICS | {"macro_f1": value, "accuracy": value}, predictions) for value in values]
        for arm, values in figures.items()
    }
    found = compare_outcomes(outcomes, range(3), page.METRICS)
    for arm, values in figures.items():
        found["recipes"][arm] |= {"macro_f1_by_validation_loss": list(values), "recall_of_rarest": list(values)}
    return found


@pytest.fixture
def half_way() -> dict[float, dict]:
    return {0.02: comparison({page.PLAIN: (0.5, 0.625, 0.75), page.REWEIGHTED: (0.75, 0.75, 1.0)})}


def test_every_arm_is_a_recipe_that_differs_from_plain_by_its_method_alone():
    plain = page.config_of(page.PLAIN, 0.02)
    for arm in (page.REWEIGHTED, *page.CANDIDATES):
        config = page.config_of(arm, 0.02)
        same = ("model", "img_size", "epochs", "lr", "opt", "batch_size", "smoothing", "hflip", "imbalance_ratio")
        assert [name for name in same if getattr(config, name) != getattr(plain, name)] == []
        assert (plain.aug_prob, config.aug_prob) == (0.0, 0.3)


def test_figures_are_set_beside_the_reported_ones(half_way):
    text = page.as_markdown(half_way)
    assert "| 0.02 | macro-F1 | 0.268 | 0.371 | +0.104 | 0.625 | 0.833 | +0.208 |" in text
    assert "| 0.02 | `plain` | 0.625 +- 0.125 | 0.500, 0.625, 0.750 |" in text
    assert "| 0.02 | `reweighted` | macro_f1 | +0.208 |" in text


def test_what_is_not_trained_yet_is_said(half_way):
    text = page.as_markdown(half_way)
    assert "Not trained yet: all of u = 0.1, u = 0.005 and the third arm (another method) at u = 0.1, u = 0.02" in text
    whole = {page.PLAIN: (0.5, 0.6, 0.7), page.REWEIGHTED: (0.7, 0.7, 0.9), "ldam-drw": (0.8, 0.8, 0.9)}
    assert "Not trained" not in page.as_markdown({ratio: comparison(whole) for ratio in page.RATIOS}, None, "ldam-drw")
