"""Run directories as a training would leave them, written in milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.checkpoint import save_checkpoint
from engine.config import Config
from engine.heads import Heads, restore_heads
from engine.models import create_model
from engine.pooling import pooled_metrics, pooled_predictions, read_fold
from engine.run import RunDirectory
from engine.scoring import Scored, final_metrics
from tests.image_folders import write_image

CLASSES = ("benign", "malignant", "normal")
EPOCHS = 4


def write_run(
    path: Path,
    class_names: tuple[str, ...] = CLASSES,
    *,
    seed: int = 0,
    split: str = "test",
    images: Path | None = None,
    files: tuple[str, ...] | None = None,
    finished: bool = True,
    patients: int | None = None,
    **options: object,
) -> Path:
    """A run on 60 images, of which the classes have fewer and fewer, with ``options`` of `Config`.

    With ``images`` they stand in that folder, and the run has the weights of a model that was never trained; ``files``
    are the first names there. Several seeds are several models of the same images, which are of so many ``patients``.
    """
    heads = restore_heads(Config(**options), {"diagnosis": ["benign", "malignant"], "subtype": ["early", "late"]})
    config = Config(
        **{"model": "resnet18", "img_size": 64, "epochs": EPOCHS, "warmup_epochs": 0, "data_backend": "torchvision"}
        | {"data_dir": None if images is None else str(images), "output": str(path), "workers": 1}
        | options
    )
    run = RunDirectory.create(config)
    names = tuple(heads.ends()) if heads else class_names
    scored = _scored(names, seed, files or ())
    run.write_history([_epoch(epoch) for epoch in range(EPOCHS)])
    for epoch in range(EPOCHS):
        counts = scored.labels.bincount(minlength=len(names)).tolist()
        columns = {"images": counts, "expected": [20.0] * len(names), "drawn": [20 + epoch] * len(names)}
        run.write_draws(epoch, names, columns)
    if images is not None:
        folder = images.absolute()
        scored = Scored(tuple(f"{folder}/{file}" for file in scored.files), names, scored.logits, scored.labels)
        for i, file in enumerate(scored.files):
            write_image(Path(file), (40 * i % 255, 90, 120), seed=i, size=(40, 60))
        model = create_model(config.model, num_classes=len(names), heads=heads.shapes() if heads else None)
        args = {"args": config.as_mapping(), "class_names": list(names), "epoch": 2}
        args |= {"heads": heads.class_names()} if heads else {}
        save_checkpoint(run.best, {"model": model.state_dict(), **args})
    if heads:
        scored = _with_heads(scored, heads, seed)
    if patients is not None:
        groups = tuple(f"patient {i % patients}" for i in range(len(scored.files)))
        scored = dataclasses.replace(scored, groups=groups)
    if finished:
        run.write_predictions(scored.predictions(images or Path("/nowhere")))
        for head, own in scored.heads.items():
            run.write_predictions(own.predictions(Path("/nowhere")), head)
        metrics = final_metrics(scored, scored, split=split, temperature=1.3, sensitivities=(0.9,))
        run.write_metrics({"split": split, "epoch": 2, **metrics})
    run.close()
    return path


def write_cross_validation(path: Path, folds: int = 2, *, images: Path | None = None, **options: object) -> Path:
    """What `engine.cross_validate` leaves behind: the fold of number k is a run on images of its own."""
    read = []
    for fold in range(folds):
        options |= {"folds": folds, "fold": fold}
        files = tuple(f"fold{fold}/{i:03d}.png" for i in range(60))
        run = write_run(path / f"fold{fold}", seed=fold, images=images, files=files, **options)
        read.append(read_fold(run, fold))
    top = RunDirectory(path)
    top.write_predictions(pooled_predictions(read))
    top.write_metrics(pooled_metrics(read))
    return path


def _scored(names: tuple[str, ...], seed: int, files: tuple[str, ...]) -> Scored:
    n = 60
    labels = torch.tensor([min(i % 7, i % 5, len(names) - 1) for i in range(n)])
    noise = torch.randn(n, len(names), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = 2 * F.one_hot(labels, len(names)) + 1.5 * noise
    return Scored(files + tuple(f"test/{i:03d}.png" for i in range(len(files), n)), names, logits, labels)


def _with_heads(scored: Scored, heads: Heads, seed: int) -> Scored:
    own = {name: _scored(task.class_names, seed + k, ()) for k, (name, task) in enumerate(heads.tasks.items())}
    return Scored(scored.files, scored.class_names, scored.logits, scored.labels, own)


def _epoch(epoch: int) -> dict[str, float]:
    scores = {"val_accuracy": 0.5 + 0.1 * epoch, "val_balanced_accuracy": 0.4 + 0.1 * epoch, "val_macro_f1": 0.4}
    return {"epoch": epoch, "lr": 1e-3, "train_loss": 2 / (epoch + 1), "val_loss": 2.2 / (epoch + 1), **scores}
