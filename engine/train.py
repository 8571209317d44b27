"""``python -m engine.train``: from a folder of images to a trained, scored classifier."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import fingerprint
from engine.build import (
    build_model,
    make_augmentation,
    make_eval_loader,
    make_sampler,
    make_train_loader,
    open_data,
    scored_folder,
    selected_on,
)
from engine.calibration import fit_temperature
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.cli import run
from engine.command_line import parse_args
from engine.config import SELECT_ON, Config
from engine.data import BadFile, Loader, Samples, Splits, drop_bad
from engine.data.counter import Purpose, generator
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.heads import Heads, checked_heads, criterion_for
from engine.losses import twice_corrected
from engine.metric_report import format_reports
from engine.metrics import metric_is_better
from engine.mixing import Mixing, make_mixing
from engine.provenance import describe_run
from engine.run import Row, RunDirectory
from engine.scoring import Scored, final_metrics, score, score_images
from engine.stages import frozen_at_random
from engine.step import Training, batch_loss, make_training


def main(argv: list[str] | None) -> None:
    config, resume = parse_args(argv)
    train(config, resume)


def train(
    config: Config, resume: str | None = None, *, on_epoch: Callable[[Row], None] | None = None
) -> dict[str, Any]:
    """Trains as ``config`` says and returns what metrics.json holds.

    ``on_epoch`` is given each epoch's row of summary.csv once it is written; what it raises ends the run.

    Raises UserError for whatever the user can mend, before anything is written.
    """
    device = pick_device(config.device)
    precision = Precision(device, config.amp, config.amp_dtype)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.seed)
    splits, left_out, division = _checked_data(config)
    checkpoint = _last_checkpoint(resume) if resume else None
    heads = checked_heads(config, splits)
    criterion_of = criterion_for(config, splits.train, heads, device)
    training, train_loader = _build(config, splits, heads, device, precision, starts_fresh=not resume)
    mixing = make_mixing(config, len(splits.train.class_names))
    history: list[Row] = []
    best: Row | None = None
    if checkpoint is not None:
        _require_same_data(checkpoint, config, splits, str(resume))
        training.load_state_dict(checkpoint)
        history, best = checkpoint["history"], checkpoint["best"]
    run_dir = RunDirectory.open(resume) if resume else RunDirectory.create(config)
    chosen_on = make_eval_loader(selected_on(splits, config), config, device, precision)
    print(f"{config.model} on {device}, {precision}; run directory {run_dir.path}")
    run_dir.write_about(describe_run(config, splits, left_out, device, precision))

    for epoch in range(len(history), config.epochs):
        if _has_stopped_early(config, history, best):
            break
        stats = train_epoch(training, criterion_of(epoch), train_loader, epoch, config, precision, mixing)
        if not math.isfinite(stats["train_loss"]):
            raise UserError(
                f"the loss became {stats['train_loss']} in epoch {epoch}; lower --lr, set --clip-grad or use "
                f"--amp-dtype bfloat16. {run_dir.path} keeps the epochs before"
            )
        metrics = score(training.scored, chosen_on, splits.train.class_names, precision, heads)
        scores = {f"{SELECT_ON[config.select_on]}_{name}": value for name, value in _scalars(metrics).items()}
        row = {"epoch": epoch, **stats, **scores}
        history.append(row)
        improved = best is None or _is_better(row, best, config)
        if best is None or improved:
            best = row
        _write_draws(run_dir, epoch, splits.train, train_loader)
        _save(run_dir, config, splits, division, heads, training, history, best, improved)
        print(_epoch_line(row, config, improved))
        if on_epoch is not None:
            on_epoch(row)

    metrics = _final_score(run_dir, config, splits, heads, training.model, chosen_on, device, precision)
    run_dir.write_metrics(metrics)
    run_dir.write_pictures(history, metrics)
    run_dir.close()
    print(f"\n{metrics['split']} images, weights of epoch {metrics['epoch']}:\n\n{format_reports(metrics)}")
    print(f"\nwritten to {run_dir.path}")
    return metrics


def train_epoch(
    training: Training,
    criterion: nn.Module,
    loader: Loader,
    epoch: int,
    config: Config,
    precision: Precision,
    mixing: Mixing | None = None,
) -> Row:
    """One pass over the loader. Inside the loop the host never waits for the device."""
    model = training.freezing.train(training.model, epoch)
    loss_sum: Tensor | None = None
    images_seen, waited, began = 0, 0.0, time.perf_counter()
    # dropout draws from torch's own generators, whose state no checkpoint keeps
    torch.manual_seed(int(generator(Purpose.DROPOUT, config.seed, epoch).integers(2**63)))
    batches = iter(loader.epoch(epoch))
    steps = len(loader)
    with tqdm(total=steps, desc=f"epoch {epoch}", unit="step", leave=False, disable=None) as bar:
        for step in range(steps):
            asked = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - asked
            images, targets = mixing(images, labels, epoch, step) if mixing else (images, labels)

            # the last group of an epoch may hold fewer batches
            group_start = step - step % config.grad_accum_steps
            group = min(config.grad_accum_steps, steps - group_start)
            loss = batch_loss(model, criterion, images, targets, config, precision)
            training.scaler.scale(loss / group).backward()
            loss_sum = loss.detach() if loss_sum is None else loss_sum + loss.detach()

            if step + 1 == group_start + group:
                training.update(config.clip_grad)

            images_seen += len(images)
            seconds = time.perf_counter() - began
            bar.update()
            bar.set_postfix_str(f"{images_seen / seconds:.0f} img/s, data wait {waited / seconds:.0%}", refresh=False)
    train_loss = float("nan") if loss_sum is None else loss_sum.item() / steps
    seconds = time.perf_counter() - began
    return {
        "lr": training.schedule.get_last_lr()[0],
        "train_loss": train_loss,
        "images_per_second": images_seen / seconds,
        "data_wait": waited / seconds,
        "seconds": seconds,
    }


def _checked_data(config: Config) -> tuple[Splits, list[BadFile], dict[str, str]]:
    """The images that can be read, those that cannot, and what tells the division of them all."""
    splits = open_data(config)
    division = fingerprint.of_division(splits)
    splits, bad = drop_bad(splits, max_bad_fraction=config.max_bad_fraction, workers=config.workers)
    print(splits.description)
    for file in bad:
        print(f"left out: {file.path}: {file.reason}", file=sys.stderr)
    for warning in (twice_corrected(config, splits.train.class_counts()), frozen_at_random(config)):
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    return splits, bad, division


def _build(
    config: Config,
    splits: Splits,
    heads: Heads | None,
    device: torch.device,
    precision: Precision,
    *,
    starts_fresh: bool,
) -> tuple[Training, Loader]:
    model = build_model(config, len(splits.train.class_names), device, starts_fresh=starts_fresh, heads=heads)
    loader = make_train_loader(
        splits.train,
        config,
        device,
        precision,
        sampler=make_sampler(splits.train, config),
        augmentation=make_augmentation(config),
    )
    return make_training(model, config, precision, math.ceil(len(loader) / config.grad_accum_steps)), loader


def _scalars(metrics: dict[str, Any]) -> Row:
    """The single figures, those of a head as HEAD.NAME."""
    row = {name: value for name, value in metrics.items() if value is None or isinstance(value, float | int)}
    for head, of_head in metrics.get("heads", {}).items():
        row |= {f"{head}.{name}": value for name, value in _scalars(of_head).items()}
    return row


def _is_better(row: Row, best: Row, config: Config) -> bool:
    """By the metric; between equals, which a small validation split makes common, by its loss."""
    prefix, metric = SELECT_ON[config.select_on], config.eval_metric
    new, old = row[f"{prefix}_{metric}"], best[f"{prefix}_{metric}"]
    if metric_is_better(metric.rpartition(".")[2], new, old):
        return True
    return bool(new == old and row[f"{prefix}_loss"] < best[f"{prefix}_loss"])


def _has_stopped_early(config: Config, history: list[Row], best: Row | None) -> bool:
    if config.early_stopping_patience is None or best is None:
        return False
    return history[-1]["epoch"] - best["epoch"] >= config.early_stopping_patience


def _save(
    run_dir: RunDirectory,
    config: Config,
    splits: Splits,
    division: dict[str, str],
    heads: Heads | None,
    training: Training,
    history: list[Row],
    best: Row,
    improved: bool,
) -> None:
    """best.pt goes before last.pt: a run killed between the two repeats the epoch and comes to the same best."""
    state = training.state_dict()
    about = {
        "args": config.as_mapping(),
        "class_names": list(splits.train.class_names),
        "epoch": history[-1]["epoch"],
        "division": division,
    }
    if heads is not None:
        about["heads"] = heads.class_names()
    weights = {"model": state["model"], **about}
    if improved:
        save_checkpoint(run_dir.best, weights)
    if config.keep_epochs:
        run_dir.save_epoch(history[-1]["epoch"], weights)
    data = fingerprint.of_training(splits, config)
    save_checkpoint(run_dir.last, {**state, **about, "history": history, "best": best, "data": data})
    run_dir.write_history(history)


def _write_draws(run_dir: RunDirectory, epoch: int, samples: Samples, loader: Loader) -> None:
    """What the sampler's weights made of the classes in this epoch."""
    assert loader.sampler is not None, "a training loader has one"
    columns = {
        "images": samples.class_counts().tolist(),
        "expected": loader.sampler.expected().round(3).tolist(),
        "drawn": loader.sampler.histogram(epoch).tolist(),
    }
    run_dir.write_draws(epoch, samples.class_names, columns)


def _last_checkpoint(resume: str) -> dict[str, Any]:
    run_dir = RunDirectory.open(resume)
    if not run_dir.last.exists():
        raise UserError(
            f"--resume {resume}: no last.pt there, the run ended before its first epoch did; "
            f"start it again with --recipe {run_dir.path / 'args.yaml'} --output NEW_DIR"
        )
    return load_checkpoint(run_dir.last)


def _require_same_data(checkpoint: dict[str, Any], config: Config, splits: Splits, resume: str) -> None:
    if "history" not in checkpoint:
        raise UserError(f"--resume {resume}: holds weights only; name the run directory, or use --pretrained-path")
    if checkpoint["data"] != fingerprint.of_training(splits, config):
        raise UserError(
            f"--resume {resume}: the images, labels or weights are not those that the run began with; "
            f"put them back, or start a new run with --pretrained-path {resume}"
        )


def _final_score(
    run_dir: RunDirectory,
    config: Config,
    splits: Splits,
    heads: Heads | None,
    model: nn.Module,
    chosen_on: Loader,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """The best epoch's weights on the test split, or on the validation split where there is no test.

    Writes predictions.csv, and adds to best.pt the temperature that the validation split gives. Nothing is fitted on
    the test split, even where the epoch was chosen on it.
    """
    best = load_checkpoint(run_dir.best)
    model.load_state_dict(best["model"])

    def scored_images(samples: Samples | None) -> Scored | None:
        if samples is None:
            return None
        is_at_hand = samples is chosen_on.data
        loader = chosen_on if is_at_hand else make_eval_loader(samples, config, device, precision)
        return score_images(model, loader, splits.train.class_names, precision, heads=heads)

    validation, test = scored_images(splits.val), scored_images(splits.test)
    temperature, of_heads = None, {}
    if validation is not None:
        temperature = fit_temperature(validation.logits, validation.labels)
        of_heads = {name: fit_temperature(own.logits, own.labels) for name, own in validation.heads.items()}
    save_checkpoint(run_dir.best, {**best, "temperature": temperature, "head_temperatures": of_heads})
    split, scored = ("test", test) if test is not None else ("validation", validation)
    assert scored is not None, "the epoch was chosen on one of the two"
    folder = scored_folder(config)
    run_dir.write_predictions(scored.predictions(folder))
    for head, of_head in scored.heads.items():
        run_dir.write_predictions(of_head.predictions(folder), head)
    metrics = final_metrics(
        scored,
        validation,
        split=split,
        temperature=temperature,
        sensitivities=config.sensitivity,
        head_temperatures=of_heads,
    )
    return {"split": split, "epoch": best["epoch"], "selected_on": config.select_on, **metrics}


def _epoch_line(row: Row, config: Config, improved: bool) -> str:
    """The star marks the best epoch so far; a metric that the images leave undefined is not shown."""
    prefix = SELECT_ON[config.select_on]
    names = dict.fromkeys(("loss", "macro_f1", config.eval_metric))
    figures = {name: row[f"{prefix}_{name}"] for name in names}
    metrics = "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items() if figure is not None)
    return (
        f"epoch {row['epoch']:>{len(str(config.epochs))}}/{config.epochs}  loss {row['train_loss']:.4f}  "
        f"{prefix} {metrics} {'*' if improved else ' '}  "
        f"{row['images_per_second']:.0f} img/s, data wait {row['data_wait']:.0%}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
