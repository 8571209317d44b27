"""Options searched for by Optuna (the extra ``search``), on the validation images and never on test.

    python -m examples.optuna_search --recipe digits --model seresnet18 --trials 20 --output DIR

takes the flags of engine.train. Each trial is a run of its own, DIR/trialN, and is stopped early where it does worse
than half of those before it did at that epoch. The search stands in DIR/study.log: the same command goes on with it.
What it found is DIR/best.yaml, a recipe, whose gain is to be measured with seeds that the search did not use:

    python -m engine.compare --recipes digits DIR/best.yaml --model seresnet18 --seeds 0 1 2 --output DIR2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from engine.build import open_data
from engine.cli import run
from engine.command_line import add_run_flags, make_parser, resolve
from engine.config import Config, spelled
from engine.errors import UserError
from engine.metrics import metric_is_better
from engine.output import made_folder
from engine.run import Row
from engine.train import train

_WHERE_ONLY = ("output", "workers", "device")


def options_of(trial: optuna.trial.BaseTrial, config: Config) -> dict[str, Any]:
    """What is searched: fields of `Config`. Change it to your needs."""
    mixes = config.loss != "ldam"  # which does not go with MixUp
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
        "sampling": "power",
        "sampling_alpha": trial.suggest_float("sampling_alpha", 0.0, 1.0),  # 0: as the images are, 1: inverse
        **({"mixup": trial.suggest_float("mixup", 0.0, 0.4)} if mixes else {}),
        "aug_prob": trial.suggest_float("aug_prob", 0.0, 0.6),
    }


def search(config: Config, trials: int, output: Path) -> optuna.Study:
    """``trials`` more trials of the search in ``output``.

    Raises UserError where the data cannot be opened, an epoch is to be chosen on test, or the search there was begun
    with other options.
    """
    if config.select_on != "validation":
        raise UserError(f"--select-on {config.select_on}: a search is made on validation images; leave it out")
    open_data(config)
    made_folder(str(output))
    higher = metric_is_better(config.eval_metric.rpartition(".")[2], 1.0, 0.0)
    study = optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(output / "study.log"))),
        direction="maximize" if higher else "minimize",
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=config.epochs // 4),
        load_if_exists=True,
    )
    _require_told_the_same(study, config, output)
    # another one each time, or a search that goes on would draw its first trials again
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))

    def figure_of(trial: optuna.Trial) -> float:
        tried = dataclasses.replace(config, output=str(output / f"trial{trial.number}"), **options_of(trial, config))
        figures: list[float] = []

        def report(row: Row) -> None:
            figure = row[f"val_{config.eval_metric}"]
            if figure is not None:  # a metric may be undefined for an epoch
                figures.append(figure)
                trial.report(figure, row["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        train(tried, on_epoch=report)
        return (max if higher else min)(figures, default=float("nan"))

    study.optimize(figure_of, n_trials=trials, catch=(UserError,))  # such as a loss that became infinite
    return study


def _require_told_the_same(study: optuna.Study, config: Config, output: Path) -> None:
    """Trials are compared with each other, and the study keeps the direction that its first metric had."""
    told = json.loads(json.dumps({key: own for key, own in config.as_mapping().items() if key not in _WHERE_ONLY}))
    before = study.user_attrs.get("config")
    if before is None:
        study.set_user_attr("config", told)
        return
    for key in sorted(told.keys() | before.keys()):
        if before.get(key) != told.get(key):
            raise UserError(
                f"{output}: was searched with {key} {before.get(key)}, and {spelled(key)} is now {told.get(key)}; "
                "name another --output"
            )


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    config, output = resolve(args), Path(args.output)
    study = search(config, args.trials, output)
    if not any(trial.state.is_finished() and trial.value is not None for trial in study.trials):
        raise UserError("no trial has come to its end; see the warnings above, or search with more --trials")
    best = study.best_trial
    found = dataclasses.replace(config, output=None, **options_of(optuna.trial.FixedTrial(best.params), config))
    (output / "best.yaml").write_text(yaml.safe_dump(found.as_mapping(), sort_keys=False))
    print(f"\ntrial {best.number} of {len(study.trials)}: val {config.eval_metric} {best.value:.4f} with {best.params}")
    print(f"written to {output / 'best.yaml'}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m examples.optuna_search", "Search a run's options by Optuna, on validation images.")
    parser.add_argument("--trials", type=int, default=20, metavar="INT", help="trials to add (default: 20)")
    parser.add_argument("--output", required=True, metavar="DIR", help="keeps the search, its runs and best.yaml")
    add_run_flags(parser, without=("output",))
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
