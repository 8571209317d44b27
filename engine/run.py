"""The run directory: args.yaml, about.json, tables, metrics.json, checkpoints, pictures, TensorBoard events."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from engine.checkpoint import save_checkpoint, write_atomically
from engine.config import Config
from engine.errors import UserError
from engine.pictures import (
    draw_class_balance,
    draw_confusion_matrix,
    draw_curves,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    to_png,
)
from engine.predictions import Predictions, predictions_path, write_predictions

Row = dict[str, Any]


class RunDirectory:
    """One training run on disk. Every file is replaced whole, so that a killed run leaves no part of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self._predictions: dict[str | None, Predictions] = {}
        self._events: Any = None

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Makes the directory that ``config.output`` names, or a new one; raises UserError rather than overwrite."""
        path = Path(config.output or f"output/train/{time.strftime('%Y%m%d-%H%M%S')}-{config.model}")
        if (path / "args.yaml").exists():
            raise UserError(
                f"--output {path}: already holds a run; name another directory, or go on with --resume {path}"
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--output {path}: exists and is not an empty directory; name another one")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run._write_text("args.yaml", yaml.safe_dump(config.as_mapping(), sort_keys=False))
        return run

    @classmethod
    def open(cls, path: str) -> RunDirectory:
        """The run at ``path``, its directory or a file in it."""
        return cls(Path(path) if Path(path).is_dir() else Path(path).parent)

    def epoch_checkpoint(self, epoch: int) -> Path:
        return self.path / "epochs" / f"{epoch:04d}.pt"

    def save_epoch(self, epoch: int, state: dict[str, Any]) -> None:
        self.epoch_checkpoint(epoch).parent.mkdir(exist_ok=True)
        save_checkpoint(self.epoch_checkpoint(epoch), state)

    def write_history(self, history: list[Row]) -> None:
        """Writes summary.csv, a row an epoch, and the newest row as TensorBoard events."""
        text = io.StringIO()
        # a run that an earlier version began has fewer columns at first
        columns = dict.fromkeys(name for row in history for name in row)
        writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self._write_text("summary.csv", text.getvalue())
        self._write_events(history[-1])

    def write_draws(self, epoch: int, class_names: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
        """Writes sampling.csv: for each epoch a row a class, the epoch's rows in place of any that it had before.

        ``columns`` have a value a class each and the same names in every epoch.
        """
        path = self.path / "sampling.csv"
        header = ["epoch", "class", *columns]
        rows: list[list[Any]] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as lines:
                rows = [row for row in list(csv.reader(lines))[1:] if int(row[0]) < epoch]
        rows += [[epoch, *values] for values in zip(class_names, *columns.values(), strict=True)]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        self._write_text("sampling.csv", text.getvalue())

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        self._write_text("metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")

    def write_about(self, about: dict[str, Any]) -> None:
        self._write_text("about.json", json.dumps(about, indent=2) + "\n")

    def write_predictions(self, predictions: Predictions, head: str | None = None) -> None:
        self._predictions[head] = predictions
        write_predictions(predictions_path(self.path / "predictions.csv", head), predictions)

    def write_pictures(self, history: list[Row], metrics: dict[str, Any]) -> None:
        """Writes PNG files of the history, the metrics, and the predictions and draws that were written before.

        Those of a head have its name at their end, as ``roc_HEAD.png``.
        """
        if (self.path / "sampling.csv").exists():
            with (self.path / "sampling.csv").open(encoding="utf-8", newline="") as lines:
                self._write_picture("class_balance.png", draw_class_balance(list(csv.DictReader(lines))))
        for head, own in {None: metrics, **metrics.get("heads", {})}.items():
            ending = ".png" if head is None else f"_{head}.png"
            self._write_picture(f"curves{ending}", draw_curves(history, chosen=metrics["epoch"], head=head))
            self._write_picture(f"confusion_matrix{ending}", draw_confusion_matrix(own))
            if head in self._predictions:
                predictions = self._predictions[head]
                roc = draw_roc(predictions, operating_points=own.get("operating_points", ()))
                self._write_picture(f"roc{ending}", roc)
                self._write_picture(f"precision_recall{ending}", draw_precision_recall(predictions))
                temperature = own["temperature"] if "calibrated" in own else None
                self._write_picture(f"reliability{ending}", draw_reliability(predictions, temperature=temperature))

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _write_picture(self, name: str, figure: Figure) -> None:
        write_atomically(self.path / name, lambda unfinished: unfinished.write_bytes(to_png(figure)))

    def _write_events(self, row: Row) -> None:
        if self._events is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # TensorBoard is optional
                return
            self._events = SummaryWriter(str(self.path / "events"))
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self._events.add_scalar(name, value, row["epoch"])

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
