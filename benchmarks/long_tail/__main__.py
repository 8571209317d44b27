"""Whether a re-weighted sampler with augmentation helps on a long tail, and how much further another method goes.

    python -m benchmarks.long_tail [--runs DIR] [--output FILE.md]

The embedded digits at three imbalance ratios u (`engine.data.long_tail`), every arm a recipe of this folder. What is in
``--runs`` already is used again, and the page written anew each time that a u is through, so that it can be stopped and
gone on with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import evaluate
from engine.build import open_data
from engine.cli import run
from engine.command_line import about_recipe, read_recipe
from engine.compare import train_runs
from engine.comparison import Outcome, compare_outcomes, markdown_table
from engine.config import Config
from engine.output import free_file, made_folder
from engine.predictions import read_predictions

HERE = Path(__file__).parent
RATIOS = (0.1, 0.02, 0.005)
PLAIN, REWEIGHTED = "plain", "reweighted"
CANDIDATES = ("weighted-loss", "balanced-softmax", "ldam-drw", "reweighted-mixup")
CHOSEN_AT, CHOOSING_SEEDS = 0.02, (3, 4)
SEEDS = (0, 1, 2)
METRICS = ("macro_f1", "accuracy")
# Of the report that the claim is from: long-tailed CIFAR-50, 50 epochs, one training; accuracy in percent
REPORTED = {
    0.1: {"macro_f1": (0.425, 0.503), "accuracy": (0.4612, 0.5156)},
    0.02: {"macro_f1": (0.2677, 0.3714), "accuracy": (0.3298, 0.394)},
    0.005: {"macro_f1": (0.1717, 0.3389), "accuracy": (0.2434, 0.3838)},
}


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    page, runs = free_file(args.output, force=True), made_folder(args.runs, flag="--runs")
    found: dict[float, dict[str, Any]] = {}
    for ratio in sorted(RATIOS):
        found[ratio] = compared((PLAIN, REWEIGHTED), ratio, SEEDS, runs)
        page.write_text(as_markdown(found), encoding="utf-8")
    choice = compared(CANDIDATES, CHOSEN_AT, CHOOSING_SEEDS, runs / "choice")
    best = max(CANDIDATES, key=lambda arm: choice["recipes"][arm]["metrics"]["macro_f1"]["mean"])
    for ratio in sorted(RATIOS):
        found[ratio] = compared((PLAIN, REWEIGHTED, best), ratio, SEEDS, runs)
        page.write_text(as_markdown(found, choice, best), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


def compared(arms: Sequence[str], ratio: float, seeds: Sequence[int], runs: Path) -> dict[str, Any]:
    """`compare_outcomes` of the arms' last epochs on the test images; and by seed what the validation loss would have
    chosen, and the recall of class 9.
    """
    configs = {arm: config_of(arm, ratio) for arm in arms}
    trained = train_runs(configs, seeds, runs / f"u{ratio:g}")
    outcomes = {arm: [last_epoch(path) for path in paths] for arm, paths in trained.items()}
    comparison = compare_outcomes(outcomes, seeds, METRICS)
    for arm, paths in trained.items():
        chosen = [json.loads((path / "metrics.json").read_text())["macro_f1"] for path in paths]
        comparison["recipes"][arm]["macro_f1_by_validation_loss"] = chosen
        rarest = [list(outcome.metrics["per_class"].values())[-1]["recall"] for outcome in outcomes[arm]]
        comparison["recipes"][arm]["recall_of_rarest"] = rarest
    return comparison


def config_of(arm: str, ratio: float) -> Config:
    file = str(HERE / f"{arm}.yaml")
    return Config.from_mapping(read_recipe(file) | {"imbalance_ratio": ratio}, file)


def last_epoch(run_dir: Path) -> Outcome:
    metrics, predictions = run_dir / "last_epoch.json", run_dir / "last_epoch.csv"
    if not metrics.exists():
        predictions.unlink(missing_ok=True)  # of a scoring that was stopped half-way
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            flags = ["--output", str(metrics), "--predictions", str(predictions)]
            evaluate.main([str(run_dir / "last.pt"), *flags])
    return Outcome(json.loads(metrics.read_text()), read_predictions(predictions))


def as_markdown(
    found: Mapping[float, Mapping[str, Any]], choice: Mapping[str, Any] | None = None, best: str | None = None
) -> str:
    """The page, of what is trained so far."""
    arms = [arm for arm in (PLAIN, REWEIGHTED, best) if arm is not None]
    parts = [
        "# A long tail of real images: plain, re-weighted and augmented, and further",
        f"By `python -m benchmarks.long_tail`, {datetime.date.today()}; {_device()}; torch {torch.__version__}, Python "
        f"{platform.python_version()}.",
        "The embedded digits (scikit-learn's scans, 8 x 8 grey levels), SE-ResNet18 from scratch at 32 px, 20 epochs, "
        f"AdamW, batches of 32, no label smoothing, seeds {_listed(SEEDS)}. Of ten classes, class x keeps 134 u^(x/9) "
        "training images and at least one, of which 15% are held out for validation. The test set is balanced: 400 "
        "images, the same for all.",
        markdown_table(_counts(found)),
        _arms(arms),
        "The method to be checked is both at once, the sampler and the augmentation; which of them does it is not "
        "asked here.",
        "One rule for every arm: **the weights of the last epoch are scored.** The validation images have the tail's "
        "shape and hardly one of a rare class, so that choosing an epoch by them would favour the common ones. What "
        "that would have come to, by the lowest validation loss, stands in the last column.",
        "## Macro-F1 and accuracy on the test images",
        "Mean +- standard deviation (n - 1) over the seeds.",
        markdown_table(_figures(found)),
        *_missing(found, best),
        "The tail's images are the same for every seed, but for those that are held out. At u = 0.02 class 9 has two, "
        "of which one is held out, and at u = 0.005 classes 8 and 9 have one each. Which image that is weighs as much "
        "as a method, so that figures of different u hardly compare, and the spread over the seeds knows nothing of "
        "other tails. The arms of a seed share their images: it is their differences that tell.",
        "## Beside the report that the claim is from",
        "It has long-tailed CIFAR-50, SGD at 1e-4 for 50 epochs, and tells of one training each: harder images, of "
        "five times as many classes. What can be set beside it is what a method changes, not how high the figures are.",
        markdown_table(_beside_reported(found, best)),
        "## Whether they differ",
        f"Against `{PLAIN}`. Difference, interval and p: paired t-test over the seeds, which asks whether other seeds "
        "would differ likewise; the interval of three is 4.3 standard errors to each side. McNemar: exact p of each "
        "seed's two networks, which asks whether these would differ likewise on other images; the seeds' tests are of "
        "the same images. No p is corrected for their number.",
        markdown_table(_tests(found)),
    ]
    if choice is not None:
        parts += [
            "## How the third arm was chosen",
            f"By mean macro-F1 at u = {CHOSEN_AT:g} over seeds {_listed(CHOOSING_SEEDS)}, which the tables above do "
            "not use; on the same test images, though, since the validation images cannot tell. All that was tried:",
            markdown_table(_choice(choice)),
            _arms(CANDIDATES),
        ]
    return "\n\n".join(parts) + "\n"


def _arms(arms: Sequence[str]) -> str:
    return "\n".join(f"- `{arm}`: {about_recipe(str(HERE / f'{arm}.yaml'))}." for arm in arms)


def _counts(found: Mapping[float, Any]) -> list[list[str]]:
    rows = [["u", *(f"class {label}" for label in range(10)), "train", "val"]]
    for ratio in _in_order(found):
        splits = open_data(dataclasses.replace(config_of(PLAIN, ratio), seed=SEEDS[0]))
        assert splits.val is not None, "it is taken from train"
        both = splits.train.class_counts() + splits.val.class_counts()
        rows.append([f"{ratio:g}", *map(str, both), str(len(splits.train)), str(len(splits.val))])
    return rows


def _missing(found: Mapping[float, Mapping[str, Any]], best: str | None) -> list[str]:
    """What the command has still to train, where it was stopped."""
    pairs = [f"u = {ratio:g}" for ratio in RATIOS if ratio not in found]
    thirds = [
        f"u = {ratio:g}" for ratio in RATIOS if best is None or best not in found.get(ratio, {"recipes": ()})["recipes"]
    ]
    missing = [f"all of {_listed(pairs)}"] if pairs else []
    missing += [f"the third arm (another method) at {_listed(thirds)}"] if thirds else []
    return [f"**Not trained yet: {' and '.join(missing)}.** The same command goes on with it."] if missing else []


def _in_order(found: Mapping[float, Any]) -> list[float]:
    return [ratio for ratio in RATIOS if ratio in found]


def _figures(found: Mapping[float, Mapping[str, Any]]) -> list[list[str]]:
    seeds = _listed(SEEDS)
    rows = [["u", "arm", "macro-F1", f"seeds {seeds}", "accuracy", f"seeds {seeds}", "recall of class 9"]]
    rows[0].append("macro-F1 by validation loss")
    for ratio in _in_order(found):
        for arm, recipe in found[ratio]["recipes"].items():
            row = [f"{ratio:g}", f"`{arm}`"]
            for metric in METRICS:
                figures = recipe["metrics"][metric]
                row += [_mean_sd(figures["values"]), _listed(f"{value:.3f}" for value in figures["values"])]
            row.append(_listed(f"{value:.2f}" for value in recipe["recall_of_rarest"]))
            rows.append([*row, _mean_sd(recipe["macro_f1_by_validation_loss"])])
    return rows


def _beside_reported(found: Mapping[float, Mapping[str, Any]], best: str | None) -> list[list[str]]:
    after = [arm for arm in (REWEIGHTED, best) if arm is not None]
    rows = [["u", "", "report: plain", "re-weighted", "change", f"here: `{PLAIN}`"]]
    rows[0] += [cell for arm in after for cell in (f"`{arm}`", "change")]
    for ratio in _in_order(found):
        for metric, shown in zip(METRICS, ("macro-F1", "accuracy"), strict=True):
            then = REPORTED[ratio][metric]
            here = {arm: recipe["metrics"][metric]["mean"] for arm, recipe in found[ratio]["recipes"].items()}
            row = [f"{ratio:g}", shown, f"{then[0]:.3f}", f"{then[1]:.3f}", f"{then[1] - then[0]:+.3f}"]
            row.append(f"{here[PLAIN]:.3f}")
            for arm in after:
                row += [f"{here[arm]:.3f}", f"{here[arm] - here[PLAIN]:+.3f}"] if arm in here else ["", ""]
            rows.append(row)
    return rows


def _tests(found: Mapping[float, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["u", "arm", "metric", "difference", "95% interval", "p", f"McNemar p, seeds {_listed(SEEDS)}"]]
    for ratio in _in_order(found):
        for arm, recipe in found[ratio]["recipes"].items():
            for metric, test in recipe.get("paired_t_test", {}).items():
                interval = "-" if test["interval"] is None else "{:+.3f} to {:+.3f}".format(*test["interval"])
                mcnemar = (
                    _listed(f"{pair['p_exact']:.2g}" for pair in recipe["mcnemar"]) if metric == "accuracy" else ""
                )
                p = "-" if test["p"] is None else f"{test['p']:.3g}"
                difference = [f"{test['difference']:+.3f}", interval, p]
                rows.append([f"{ratio:g}", f"`{arm}`", metric, *difference, mcnemar])
    return rows


def _choice(choice: Mapping[str, Any]) -> list[list[str]]:
    rows = [["arm", "macro-F1", f"seeds {_listed(CHOOSING_SEEDS)}", "accuracy"]]
    for arm, recipe in choice["recipes"].items():
        f1, accuracy = (recipe["metrics"][metric] for metric in METRICS)
        each = _listed(f"{value:.3f}" for value in f1["values"])
        rows.append([f"`{arm}`", f"{f1['mean']:.3f}", each, f"{accuracy['mean']:.3f}"])
    return rows


def _mean_sd(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_tail", description="Seed by seed on a long tail.")
    parser.add_argument("--runs", metavar="DIR", default="output/long_tail", help="keeps the trainings (%(default)s)")
    parser.add_argument(
        "--output", metavar="FILE.md", default="benchmarks/results/long_tail.md", help="the page (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
