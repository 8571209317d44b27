"""``python -m engine.cross_validate``: K runs, each tested on a fold that nothing of it was tuned on, and their figures
together and by fold.

Fold K of DIR is the run of ``engine.train --folds FOLDS --fold K --output DIR/foldK``, wherever it was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.build import open_data, scored_folder
from engine.cli import run
from engine.command_line import MAY_CHANGE_ON_RESUME, add_run_flags, make_parser, read_recipe, resolve
from engine.config import Config, spelled
from engine.data.listing import printable
from engine.errors import UserError
from engine.metric_report import format_reports
from engine.pooling import Fold, pooled_metrics, pooled_predictions, read_fold
from engine.predictions import names_below
from engine.run import RunDirectory
from engine.train import train

# A run may have been trained on another machine: that its images are the same is seen by their names.
_MAY_DIFFER = (*MAY_CHANGE_ON_RESUME, "output", "data_dir", "csv", "val_csv", "test_csv")


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    args.fold = 0
    config = resolve(args)
    output = config.output or f"output/cross_validate/{time.strftime('%Y%m%d-%H%M%S')}-{config.model}"
    cross_validate(dataclasses.replace(config, output=output))


def cross_validate(config: Config) -> dict[str, Any]:
    """Trains the folds that ``config.output`` does not hold yet, and returns what metrics.json there then holds.

    ``config.folds`` says how many there are; ``config.fold`` is passed over. A finished run is taken as it is, and one
    that was begun goes on.

    Raises UserError for whatever the user can mend, as far as it can be seen before anything is trained.
    """
    assert config.folds is not None and config.output is not None, "main sees to both"
    top = RunDirectory(Path(config.output))
    if (top.path / "args.yaml").exists():
        raise UserError(f"--output {top.path}: holds a run of engine.train; name another directory")
    _require_own(top.path, config)
    runs = [
        dataclasses.replace(config, fold=fold, output=str(top.path / f"fold{fold}")) for fold in range(config.folds)
    ]
    names = [_test_names(one) for one in runs]
    for one, own in zip(runs, names, strict=True):
        _require_begun_alike(one)
        if _is_finished(one):
            _read(one, own)

    print(f"{config.folds} folds in {top.path}; with --output {top.path} the same command goes on where it was stopped")
    for one in runs:
        print(f"\nfold {one.fold}: {'finished already' if _is_finished(one) else one.output}", flush=True)
        if not _is_finished(one):
            _train(one)

    folds = [_read(one, own) for one, own in zip(runs, names, strict=True)]
    _require_every_image(folds, names, config)
    metrics = pooled_metrics(folds)
    predictions = pooled_predictions(folds)
    top.write_predictions(predictions)
    for head in metrics.get("heads", {}):
        top.write_predictions(pooled_predictions([fold.heads[head] for fold in folds if head in fold.heads]), head)
    top.write_metrics(metrics)
    title = f"{len(predictions.files)} images of {config.folds} folds, each scored by the model that has not seen it:"
    print(f"\n{title}\n\n{format_reports(metrics)}\n\nwritten to {top.path}")
    return metrics


def _require_own(path: Path, config: Config) -> None:
    """Raises UserError where the directory holds what is not of this cross-validation or a report of it."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: is a file; name a directory")
    if config.data_dir is not None and path.resolve() == Path(config.data_dir).resolve():
        raise UserError(f"--output {path}: is the folder of the images; name another directory")
    found = sorted(own.name for own in path.glob("[!.]*"))
    folds = {f"fold{fold}" for fold in range(config.folds or 0)}
    results = ("metrics.json", "predictions.csv", "predictions_*.csv", "*.html") if folds & set(found) else ()
    for name in found:
        if name not in folds and not any(fnmatchcase(name, result) for result in results):
            raise UserError(
                f"--output {path}: holds {name}, which is not of a cross-validation of {config.folds} folds there; "
                "name another directory"
            )


def _train(config: Config) -> None:
    run_dir = RunDirectory(Path(str(config.output)))
    if run_dir.last.exists():
        train(config, resume=str(run_dir.path))
        return
    if (run_dir.path / "args.yaml").exists():  # stopped in its first epoch, with nothing to go on from
        shutil.rmtree(run_dir.path)
    train(config)


def _is_finished(config: Config) -> bool:
    return (Path(str(config.output)) / "metrics.json").exists()


def _test_names(config: Config) -> frozenset[str]:
    """What predictions.csv calls the fold's images."""
    test = open_data(config).test
    assert test is not None, "it is the fold"
    return frozenset(map(printable, names_below(test.files, scored_folder(config))))


def _require_begun_alike(config: Config) -> None:
    args_file = Path(str(config.output)) / "args.yaml"
    if not args_file.exists():
        return
    begun = Config.from_mapping(read_recipe(str(args_file)), str(args_file))
    for name in (field.name for field in dataclasses.fields(Config) if field.name not in _MAY_DIFFER):
        old, new = getattr(begun, name), getattr(config, name)
        if old != new:
            raise UserError(f"{spelled(name)} {new}: {args_file.parent} has {old}; take that, or name another --output")


def _read(config: Config, names: Collection[str]) -> Fold:
    assert config.fold is not None, "each run has its own"
    fold = read_fold(Path(str(config.output)), config.fold)
    foreign = [file for file in fold.predictions.files if file not in names]
    if foreign:
        raise UserError(
            f"{config.output}: {foreign[0]} is not in fold {config.fold} of these images: the run is of others; put "
            "them back, or name another --output"
        )
    return fold


def _require_every_image(folds: list[Fold], names: list[frozenset[str]], config: Config) -> None:
    """But for those that no run could read, and with heads those of which nothing is known end to end."""
    if config.heads:
        return
    missing = [own.difference(fold.predictions.files) for fold, own in zip(folds, names, strict=True)]
    total, lacking = sum(map(len, names)), sum(map(len, missing))
    if lacking > config.max_bad_fraction * total:
        fold = max(range(len(missing)), key=lambda k: len(missing[k]))
        raise UserError(
            f"{lacking} of {total} images are in no predictions.csv, such as {min(missing[fold])}; remove "
            f"{config.output}/fold{fold}, so that it is trained again"
        )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "python -m engine.cross_validate",
        "Train a run for each of K folds and score all images, each by the model that has not seen it; on the embedded "
        "digits without --data-dir or --csv.",
    )
    parser.add_argument("--folds", type=int, required=True, metavar="INT", help="number of folds, and of runs")
    add_run_flags(parser, without=("folds", "fold"))
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
