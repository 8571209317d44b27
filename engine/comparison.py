"""What several recipes, each trained with the same seeds, come to: mean, spread, and tests against the first of them.

Two tests. The paired t-test over the seeds (Student, "The Probable Error of a Mean", 1908): would other
trainings of the two recipes differ likewise? Pairs, because a seed gives both the same validation split, the same draws
and, of the same model, the same initial weights. And McNemar's (`engine.mcnemar`), of the two networks of a seed: would
these differ likewise on other images? Neither answers the other's question: Dietterich, "Approximate Statistical Tests
for Comparing Supervised Classification Learning Algorithms" (1998). The t-test is of trainings that are scored on the
same images. Where each seed draws test images of its own, these overlap, and there is none: it would be the resampled
t-test, whose p Dietterich found far too small.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from engine.data.listing import printable
from engine.errors import UserError
from engine.mcnemar import compare_predictions
from engine.predictions import Predictions, read_predictions
from engine.tables import format_table

DEFAULT_METRICS = ("macro_f1", "accuracy", "balanced_accuracy", "auroc_macro_ovr")
CONFIDENCE = 0.95
LINE = 120
"""Columns of a terminal that sentences are broken at."""

Rows = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one training came to: its metrics.json, and what it says of each image."""

    metrics: Mapping[str, Any]
    predictions: Predictions


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Attributes:
    difference: mean of the pairs' differences, second minus first.
    interval: of that mean, at 95%, by Student's t; None where there are fewer than two pairs, or all differ alike.
    p: two-sided, of no difference; None likewise.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float | None


def read_outcome(run_dir: Path) -> Outcome:
    """Of a finished run. Raises UserError where a file is missing or not readable."""
    path = run_dir / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); remove that run, and it is trained again") from error
    return Outcome(metrics, read_predictions(run_dir / "predictions.csv"))


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Of n pairs of values, at least one."""
    differences = np.subtract(second, first)
    mean = float(differences.mean())
    # what is left of equal differences is rounding, of which no spread can be told
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return PairedTest(mean, None, None)
    result = stats.ttest_rel(second, first)
    low, high = result.confidence_interval(CONFIDENCE)
    return PairedTest(mean, (float(low), float(high)), float(result.pvalue))


def compare_outcomes(
    outcomes: Mapping[str, Sequence[Outcome]], seeds: Sequence[int], metrics: Sequence[str] = ()
) -> dict[str, Any]:
    """What comparison.json holds.

    Args:
        outcomes: for each recipe one a seed; the first recipe is the one that the others are tested against.
        metrics: names of metrics.json, ``HEAD.NAME`` for a head's; by default ``DEFAULT_METRICS``, and ``f1``, which is
            the positive class's, where all have two classes.

    Returns:
        ``seeds``, ``against`` (the first recipe's name) and under ``recipes`` for each one

        - ``split``, the images that were scored; ``in_sample``, whether epochs were chosen on these; ``same_images``,
          whether they are those of every seed;
        - by metric ``values`` (None where undefined), ``mean`` and ``sd`` (divided by n - 1; None for one seed);
        - but for the first, the ``paired_t_test`` by metric, of which without ``same_images`` the difference alone is
          known, and for each seed ``mcnemar``, with ``b`` the images that only the first recipe gets right, and
          ``by_group`` where several are of one group (patient). Where the recipes were not scored on the same images,
          or by the same groups, both are left out, and ``no_test`` says why.
    """
    every = [outcome.metrics for of_recipe in outcomes.values() for outcome in of_recipe]
    if not metrics:
        binary = all("positive_class" in of_run for of_run in every)
        metrics = (*DEFAULT_METRICS, *(("f1",) if binary else ()))
    against = next(iter(outcomes))
    recipes: dict[str, Any] = {}
    for name, of_recipe in outcomes.items():
        values = {metric: [_figure(outcome.metrics, metric) for outcome in of_recipe] for metric in metrics}
        recipes[name] = {
            "split": ", ".join(dict.fromkeys(outcome.metrics["split"] for outcome in of_recipe)),
            "in_sample": any(_in_sample(outcome.metrics) for outcome in of_recipe),
            "same_images": len({frozenset(outcome.predictions.files) for outcome in of_recipe}) == 1,
            "metrics": {metric: _mean_and_sd(of_metric) for metric, of_metric in values.items()},
        }
        if name != against:
            before = {metric: figures["values"] for metric, figures in recipes[against]["metrics"].items()}
            recipes[name] |= _tests(outcomes[against], of_recipe, before, values, recipes[name]["same_images"])
    return {"seeds": list(seeds), "against": against, "recipes": recipes}


def _figure(metrics: Mapping[str, Any], name: str) -> float | None:
    head, _, metric = name.rpartition(".")
    of_head = metrics.get("heads", {}).get(head, {}) if head else metrics
    value: float | None = of_head.get(metric)
    return value


def _in_sample(metrics: Mapping[str, Any]) -> bool:
    return bool(metrics["split"] == metrics.get("selected_on", "validation"))


def _mean_and_sd(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"values": list(values), "mean": None, "sd": None}
    return {
        "values": list(values),
        "mean": float(np.mean(known)),
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _tests(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    before: Mapping[str, Sequence[float | None]],
    after: Mapping[str, Sequence[float | None]],
    same_images: bool,
) -> dict[str, Any]:
    try:
        pairs = [compare_predictions(a.predictions, b.predictions) for a, b in zip(first, second, strict=True)]
    except UserError as error:
        return {"no_test": str(error)}
    known = [metric for metric in after if None not in (*before[metric], *after[metric])]
    tests = {metric: paired_t_test(before[metric], after[metric]) for metric in known}  # type: ignore[arg-type]
    if not same_images:
        tests = {metric: PairedTest(test.difference, None, None) for metric, test in tests.items()}
    return {
        "paired_t_test": {metric: dataclasses.asdict(test) for metric, test in tests.items()},
        "mcnemar": [dataclasses.asdict(pair) for pair in pairs],
    }


def format_text(comparison: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = [_title(comparison)]
    for title, rows in _tables(comparison):
        numbers = range(1, len(rows[0]))
        parts.append(f"{title}\n\n{format_table(rows, numbers)}")
    notes = [textwrap.fill(note, LINE, break_long_words=False, break_on_hyphens=False) for note in _notes(comparison)]
    return "\n\n".join([*parts, "\n".join(notes)])


def format_markdown(comparison: Mapping[str, Any]) -> str:
    parts = [_title(comparison)]
    for title, rows in _tables(comparison):
        parts.append(f"**{title}**\n\n{markdown_table(rows)}")
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(comparison))]) + "\n"


def format_csv(comparison: Mapping[str, Any]) -> str:
    """A row for each recipe and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"seed{seed}" for seed in comparison["seeds"]]
    writer.writerow(["recipe", "split", "metric", "mean", "sd", *seeds, "difference", "low", "high", "p"])
    for name, recipe in comparison["recipes"].items():
        for metric, figures in recipe["metrics"].items():
            test = recipe.get("paired_t_test", {}).get(metric, {})
            interval = test.get("interval") or (None, None)
            writer.writerow(
                [printable(name), recipe["split"], metric, figures["mean"], figures["sd"], *figures["values"]]
                + [test.get("difference"), *interval, test.get("p")]
            )
    return text.getvalue()


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    cells = ([printable(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _title(comparison: Mapping[str, Any]) -> str:
    splits = dict.fromkeys(recipe["split"] for recipe in comparison["recipes"].values())
    seeds = ", ".join(map(str, comparison["seeds"]))
    return f"{' and '.join(splits)} images, {'seed' if len(comparison['seeds']) == 1 else 'seeds'} {seeds}"


def _tables(comparison: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """(title, rows with a header) for each metric, and for McNemar's test."""
    against, recipes = comparison["against"], comparison["recipes"]
    seeds = [f"seed {seed}" for seed in comparison["seeds"]]
    tested = any("mcnemar" in recipe for recipe in recipes.values())
    tables = []
    for metric in recipes[against]["metrics"]:
        rows = [["recipe", "mean", "sd", *seeds, *(["difference", "95% interval", "p"] if tested else [])]]
        for name, recipe in recipes.items():
            figures = recipe["metrics"][metric]
            row = [name, *map(_shown, (figures["mean"], figures["sd"], *figures["values"]))]
            rows.append(row + (_test_cells(recipe.get("paired_t_test", {}).get(metric)) if tested else []))
        tables.append((metric, rows))
    if tested:
        by_group = _by_group(recipes)
        rows = [["recipe", "seed", f"right in {against} alone", "right in it alone"]]
        rows[0] += [f"groups for {against}", "groups for it"] if by_group else []
        rows[0].append("p")
        for name, recipe in recipes.items():
            for seed, pair in zip(comparison["seeds"], recipe.get("mcnemar", ()), strict=False):
                counted = [pair, *([pair["by_group"]] if by_group else [])]
                counts = [str(of[key]) if of else "-" for of in counted for key in ("b", "c")]
                rows.append([name, str(seed), *counts, _p(pair["p_exact"])])
        tables.append((f"McNemar's test against {against}, by {'group' if by_group else 'image'}", rows))
    return tables


def _by_group(recipes: Mapping[str, Any]) -> bool:
    """Whether several images of any test were of one group."""
    return any(pair["by_group"] for recipe in recipes.values() for pair in recipe.get("mcnemar", ()))


def _test_cells(test: Mapping[str, Any] | None) -> list[str]:
    if test is None:
        return ["", "", ""]
    interval = "-" if test["interval"] is None else "{:+.4f} to {:+.4f}".format(*test["interval"])
    return [f"{test['difference']:+.4f}", interval, _p(test["p"])]


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    recipes, n = comparison["recipes"], len(comparison["seeds"])
    notes = []
    in_sample = [name for name, recipe in recipes.items() if recipe["in_sample"]]
    if in_sample:
        notes.append(f"Of {', '.join(in_sample)} the epochs were chosen on the very images scored here: they flatter.")
    notes += [f"{name} is not tested: {recipe['no_test']}" for name, recipe in recipes.items() if "no_test" in recipe]
    if any("mcnemar" in recipe for recipe in recipes.values()):
        same_images = recipes[comparison["against"]]["same_images"]
        if not same_images:
            notes.append(
                "Each seed has test images of its own, which overlap, so that no test over seeds is made: difference "
                "is the mean difference alone. Divide the data once by engine.split, and every seed has the same."
            )
        elif n > 1:
            width = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
            notes.append(
                f"difference, 95% interval, p: paired t-test over {n} seeds, against {comparison['against']}. It asks "
                "whether other seeds would differ likewise, on these same images. The interval is "
                f"{width:.1f} standard errors to each side, and takes the differences to be normal, which {n} cannot "
                "show."
            )
        else:
            notes.append("One seed has no spread: whether another one would give the same difference is not known.")
        notes.append(
            "McNemar's test asks whether the two networks of a seed would differ likewise on other images, not whether "
            "other trainings would. The seeds' tests are of "
            f"{'the same images' if same_images else 'images that overlap'}: they are not several witnesses."
        )
        if _by_group(recipes):
            notes.append(
                "Images of one group (patient) are not independent, so that McNemar's p is of whole groups. A group is "
                "for the network that gets more of its images right, and counts by how many more."
            )
        notes.append("No p is corrected for how many recipes and metrics are looked at.")
    return notes


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"
