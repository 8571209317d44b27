"""``python -m engine.compare``: recipes, each trained with several seeds, side by side, and whether they differ."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint import write_atomically
from engine.cli import ArgumentParser, run
from engine.command_line import MAY_CHANGE_ON_RESUME, add_run_flags, read_recipe, resolve
from engine.comparison import compare_outcomes, format_csv, format_markdown, format_text, read_outcome
from engine.config import Config, spelled
from engine.errors import UserError
from engine.metrics import METRIC_NAMES
from engine.output import made_folder
from engine.run import RunDirectory
from engine.train import train

SEEDS = (0, 1, 2)
_MAY_DIFFER = ("output", *MAY_CHANGE_ON_RESUME)


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    configs = {_name(recipe): _config(recipe, args) for recipe in args.recipes}
    _require_different(args.recipes, configs, args.seeds)
    _require_known(args.metrics, configs)
    folder = made_folder(args.output)
    runs = train_runs(configs, args.seeds, folder)

    outcomes = {name: [read_outcome(path) for path in paths] for name, paths in runs.items()}
    comparison = compare_outcomes(outcomes, args.seeds, args.metrics)
    text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
    for file, content in (
        ("comparison.json", text),
        ("comparison.csv", format_csv(comparison)),
        ("comparison.md", format_markdown(comparison)),
    ):
        _write(folder / file, content)
    print(f"\n{format_text(comparison)}\n\nwritten to {folder / 'comparison'}.csv, .json and .md")


def train_runs(configs: Mapping[str, Config], seeds: Sequence[int], folder: Path) -> dict[str, list[Path]]:
    """Trains every configuration with every seed, and returns the run directories, by name and in the seeds' order.

    A run is ``folder/NAME/seedN``, and what it prints stands in ``folder/NAME/seedN.log``. One that is there already is
    left as it is, or gone on with, provided that it was told the same.

    Raises UserError: a directory holds a run that was told something else, before anything is trained; or a run fails,
    and those before it are kept.
    """
    planned = [
        (name, dataclasses.replace(config, seed=seed, output=str(folder / name / f"seed{seed}")))
        for name, config in configs.items()
        for seed in seeds
    ]
    for _, config in planned:
        _require_told_the_same(config)
    for i, (name, config) in enumerate(planned):
        which = f"{name}, seed {config.seed} ({i + 1} of {len(planned)})"
        if (Path(str(config.output)) / "metrics.json").exists():
            print(f"{which}: is finished")
            continue
        began = time.monotonic()
        print(f"{which}: {config.output}", flush=True)
        metrics = _train_quietly(config, which)
        figures = "  ".join(f"{metric} {metrics[metric]:.4f}" for metric in ("macro_f1", "accuracy"))
        print(f"  {metrics['split']} {figures}  epoch {metrics['epoch']}  {time.monotonic() - began:.0f} s", flush=True)
    return {name: [folder / name / f"seed{seed}" for seed in seeds] for name in configs}


def _train_quietly(config: Config, which: str) -> dict[str, Any]:
    path = Path(str(config.output))
    log = path.with_suffix(".log")
    resume = str(path) if RunDirectory(path).last.exists() else None
    if resume is None and (path / "args.yaml").exists():
        shutil.rmtree(path)  # it was stopped before its first epoch ended, and holds nothing to go on from
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return train(config, resume)
    except UserError as error:
        raise UserError(f"{which}: {error} (what it printed: {log}; the runs before it are kept)") from error
    finally:
        gc.collect()  # the next run must not find this one's input pipelines and weights in memory


def _require_told_the_same(config: Config) -> None:
    path = Path(str(config.output))
    if not (path / "args.yaml").exists():
        return
    before = Config.from_mapping(read_recipe(str(path / "args.yaml")), str(path / "args.yaml"))
    for field in dataclasses.fields(Config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name not in _MAY_DIFFER:
            raise UserError(
                f"{path}: was trained with {field.name} {old}, and {spelled(field.name)} is now {new}; "
                "name another --output, or remove that run"
            )


def _config(recipe: str, args: argparse.Namespace) -> Config:
    return resolve(argparse.Namespace(**vars(args) | {"recipe": recipe}))


def _name(recipe: str) -> str:
    path = Path(recipe)
    return path.stem if path.suffix in (".yaml", ".yml") else recipe


def _require_different(recipes: Sequence[str], configs: Mapping[str, Config], seeds: Sequence[int]) -> None:
    if len(configs) < len(recipes):
        names = [_name(recipe) for recipe in recipes]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--recipes: two are named {twice}, which their runs are kept by; rename one of the files")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: one stands there twice; name each once")
    first, *others = configs
    for name in others:
        if configs[name] == configs[first]:
            raise UserError(
                f"--recipes: {first} and {name} ask for the same training with these flags; "
                "leave one out, or the flag that makes them equal"
            )


def _require_known(metrics: Sequence[str], configs: Mapping[str, Config]) -> None:
    for name in metrics:
        head, _, metric = name.rpartition(".")
        if metric not in METRIC_NAMES or (head and any(head not in config.heads for config in configs.values())):
            raise UserError(
                f"--metrics {name}: must be of {', '.join(METRIC_NAMES)}; or HEAD.METRIC with a head of every recipe"
            )


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.compare",
        description="Train recipes with several seeds each and compare them; what is trained already is used again. "
        "Beside the flags below, those of engine.train hold for every recipe.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="NAME|FILE",
        required=True,
        help="built-in recipes or YAML files; the others are tested against the first",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        metavar="INT",
        type=int,
        default=SEEDS,
        help=f"each recipe is trained with each (default: {' '.join(map(str, SEEDS))})",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        default=(),
        help="what to compare by, of the names in metrics.json, HEAD.METRIC for a head's (default: macro_f1, accuracy, "
        "balanced_accuracy, auroc_macro_ovr, and f1 where there are two classes)",
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="keeps the runs, in DIR/RECIPE/seedN, and the comparison"
    )
    add_run_flags(parser.add_argument_group("flags of engine.train"), without=("seed", "output"))
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
