"""Several named classifiers over the features of one trunk: their labels, their modules and their joint loss.

A loader made with ``by_index`` gives the images' indices in place of labels; the labels are looked up on the device in
a table (n, heads) that holds -1 where an image does not count for a head: it has no label there, or the head's
condition is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import Config
from engine.data import Samples, Splits
from engine.data.samples import shorten
from engine.errors import UserError
from engine.head_specs import MAIN_COLUMN, HeadSpec, read_head_specs
from engine.losses import CrossEntropyLoss, make_criterion
from engine.metrics import check_metric_name
from engine.mixing import MixedIndices
from engine.models import HeadShape

NO_LABEL = -1
Path = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class HeadTask:
    """A head as it is described, and its classes."""

    spec: HeadSpec
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """All heads of a model by name, each after the one that its condition names."""

    tasks: Mapping[str, HeadTask]

    def shapes(self) -> dict[str, HeadShape]:
        return {
            name: HeadShape(len(task.class_names), task.spec.hidden, task.spec.drop)
            for name, task in self.tasks.items()
        }

    def class_names(self) -> dict[str, list[str]]:
        """As a checkpoint keeps them."""
        return {name: list(task.class_names) for name, task in self.tasks.items()}

    def labels(self, samples: Samples) -> dict[str, np.ndarray]:
        """(n,) int64 by head, ``NO_LABEL`` where an image does not count.

        Raises UserError where the images lack a head's column, or hold a value in it that is not known.
        """
        found: dict[str, np.ndarray] = {}
        for name, task in self.tasks.items():
            column, names, values = _column(samples, name, task.spec)
            own = _known_labels(name, task, column, names)[values]
            if task.spec.when is not None:
                parent, label = task.spec.when
                own = np.where(found[parent] == self.tasks[parent].class_names.index(label), own, NO_LABEL)
            found[name] = own
        return found

    def children(self, parent: str) -> dict[int, str]:
        """The head that divides each class of ``parent``, by label, where there is exactly one."""
        names = self.tasks[parent].class_names
        under = [
            (names.index(task.spec.when[1]), name)
            for name, task in self.tasks.items()
            if task.spec.when is not None and task.spec.when[0] == parent
        ]
        labels = [label for label, _ in under]
        return {label: name for label, name in under if labels.count(label) == 1}

    def ends(self) -> dict[str, Path]:
        """End to end, the classes of the tree of conditions below one head, and the (head, label) on the way to each.

        That head is the first that another one divides, else the first of all, whose classes they then are.
        """
        divided = (name for name in self.tasks if self.children(name))
        paths = self._paths(next(divided, next(iter(self.tasks))))
        steps = [[self.tasks[head].class_names[label] for head, label in path] for path in paths]
        last = [names[-1] for names in steps]
        unique = len(set(last)) == len(last)
        return {(names[-1] if unique else " / ".join(names)): path for names, path in zip(steps, paths, strict=True)}

    def together(self, logits: Mapping[str, Tensor]) -> Tensor:
        """{head: (n, classes)} logits -> (n, ends) logarithms of probabilities, products along each way."""
        log_p = {name: own.log_softmax(dim=1) for name, own in logits.items()}
        paths = self.ends().values()
        ways = [torch.stack([log_p[head][:, label] for head, label in path]) for path in paths]
        return torch.stack([way.sum(dim=0) for way in ways], dim=1)

    def _paths(self, root: str) -> list[Path]:
        paths: list[Path] = []
        children = self.children(root)
        for label in range(len(self.tasks[root].class_names)):
            below = self._paths(children[label]) if label in children else [()]
            paths += [((root, label), *path) for path in below]
        return paths


def checked_heads(config: Config, splits: Splits) -> Heads | None:
    """The heads that a run trains; None: it trains one classifier.

    Raises UserError where the images do not serve them, or ``config.eval_metric`` has no meaning for its classes.
    """
    heads = open_heads(config, splits.train)
    if heads is not None:
        require_labels(heads, splits)
    head, _, metric = config.eval_metric.rpartition(".")
    classes = len(splits.train.class_names)
    if heads is not None:
        classes = len(heads.tasks[head].class_names if head else heads.ends())
    check_metric_name(metric, classes)
    return heads


def open_heads(config: Config, samples: Samples) -> Heads | None:
    """The heads that ``config`` describes, with the classes that the training images have; None: it describes none.

    Raises UserError where the data has not what they need.
    """
    tasks: dict[str, HeadTask] = {}
    for name, spec in read_head_specs(config.heads).items():
        column, names, _ = _column(samples, name, spec)
        for class_name, merged in (spec.classes or {}).items():
            if not set(merged) & set(names):
                raise UserError(
                    f"heads: {name}: {column} holds nothing of class {class_name} ({shorten(merged)}); "
                    f"it holds {shorten(names)}"
                )
        tasks[name] = HeadTask(spec, tuple(spec.classes) if spec.classes is not None else names)
        if spec.when is not None and spec.when[1] not in tasks[spec.when[0]].class_names:
            known = shorten(tasks[spec.when[0]].class_names)
            raise UserError(f"heads: {name}: when: {spec.when[0]} has no class {spec.when[1]} (its classes: {known})")
    return Heads(tasks) if tasks else None


def restore_heads(config: Config, class_names: Mapping[str, Sequence[str]]) -> Heads | None:
    """The heads of a checkpoint, which keeps their ``class_names``."""
    specs = read_head_specs(config.heads)
    return Heads({name: HeadTask(spec, tuple(class_names[name])) for name, spec in specs.items()}) if specs else None


def require_labels(heads: Heads, splits: Splits) -> None:
    """Raises UserError where a split leaves a head without an image, or training one of its classes."""
    for split, samples in (("train", splits.train), ("validation", splits.val), ("test", splits.test)):
        if samples is None:
            continue
        for name, labels in heads.labels(samples).items():
            counts = _counts(labels, len(heads.tasks[name].class_names))
            if not counts.any() or (split == "train" and not counts.all()):
                absent = [c for c, count in zip(heads.tasks[name].class_names, counts, strict=True) if not count]
                raise UserError(
                    f"heads: {name}: the {split} images hold none of {shorten(absent)}; give other splits or classes"
                )


def criterion_for(
    config: Config, samples: Samples, heads: Heads | None, device: torch.device
) -> Callable[[int], nn.Module]:
    """The criterion of each epoch, for the training images; with heads it takes their indices in place of labels."""
    if heads is None:
        return make_criterion(config, samples.class_counts(), device)
    return make_joint_criterion(config, heads, samples, device)


def make_joint_criterion(
    config: Config, heads: Heads, samples: Samples, device: torch.device
) -> Callable[[int], JointLoss]:
    """The criterion of each epoch, as ``engine.losses.make_criterion``; class counts are those of each head."""
    labels = heads.labels(samples)
    table = torch.from_numpy(np.stack(list(labels.values()), axis=1)).to(device)
    of_head = {
        name: make_criterion(config, _counts(labels[name], len(task.class_names)), device)
        for name, task in heads.tasks.items()
    }
    weights = {name: task.spec.weight for name, task in heads.tasks.items()}
    return lambda epoch: JointLoss({name: of(epoch) for name, of in of_head.items()}, weights, table)


class JointLoss(nn.Module):
    """sum over the heads of weight * mean loss over the images of the batch that count there, 0 where none does.

    A mean is taken as by ``nn.CrossEntropyLoss``: with class weights, over the sum of the weights of the labels.

    Of a mixed batch it is kept * the loss by the images' own labels + (1 - kept) * the loss by their partners', as in
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. For a head that is one weighted mean over the
    labels that count there, each with its class weight times its share of the image. Each label of the batch is an own
    one once and a partner's once, so that the shares always add up to the weights of the unmixed batch: how much a
    head counts hangs neither on ``kept`` nor on which images met, and kept = 1 gives the unmixed loss.

    Shape: logits {head: (B, classes)}; indices (B,) int64, or of a mixed batch both, rows of ``table`` (n, heads)
    int64; to a scalar.
    """

    def __init__(self, criteria: Mapping[str, nn.Module], weights: Mapping[str, float], table: Tensor) -> None:
        super().__init__()
        self.criteria = {name: cast(CrossEntropyLoss, criterion) for name, criterion in criteria.items()}
        for criterion in self.criteria.values():
            criterion.reduction = "none"
        self.weights = dict(weights)
        self.table = table

    def forward(self, logits: Mapping[str, Tensor], indices: Tensor | MixedIndices) -> Tensor:
        if isinstance(indices, Tensor):
            return self._loss(logits, indices)
        own, partners = (self._loss(logits, of) for of in (indices.own, indices.partners))
        return indices.kept * own + (1 - indices.kept) * partners

    def _loss(self, logits: Mapping[str, Tensor], indices: Tensor) -> Tensor:
        # no image is picked out, since the host would have to wait to learn how many there are
        columns = self.table[indices].unbind(1)
        losses = []
        for (name, criterion), labels in zip(self.criteria.items(), columns, strict=True):
            counts, labels = (labels != NO_LABEL).float(), labels.clamp(min=0)
            summed = (counts * criterion(logits[name], labels)).sum()
            total = counts.sum() if criterion.weight is None else (counts * criterion.weight[labels]).sum()
            losses.append(self.weights[name] * summed / torch.where(total > 0, total, 1.0))
        return torch.stack(losses).sum()


def _column(samples: Samples, name: str, spec: HeadSpec) -> tuple[str, tuple[str, ...], np.ndarray]:
    """The column of a head, its values by name, and the (n,) index of each image's, -1 where it has none."""
    columns = {MAIN_COLUMN: (samples.class_names, samples.labels)}
    columns |= {f"{MAIN_COLUMN}_{other}": (head.class_names, head.labels) for other, head in samples.heads.items()}
    column = spec.column or (f"{MAIN_COLUMN}_{name}" if name in samples.heads else MAIN_COLUMN)
    if column not in columns:
        raise UserError(f"heads: {name}: the images have no column {column}; they have {', '.join(columns)}")
    return column, *columns[column]


def _known_labels(name: str, task: HeadTask, column: str, names: Sequence[str]) -> np.ndarray:
    """(values + 1,) int64: the label of each value of the column, and last of all that of none."""
    if task.spec.classes is None:
        label_of = {value: label for label, value in enumerate(task.class_names)}
        for value in names:
            if value not in label_of:
                known = shorten(task.class_names)
                raise UserError(f"heads: {name}: unknown {column} {value!r} (known: {known})")
    else:
        label_of = {v: label for label, merged in enumerate(task.spec.classes.values()) for v in merged}
    return np.array([*(label_of.get(value, NO_LABEL) for value in names), NO_LABEL], dtype=np.int64)


def _counts(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels[labels != NO_LABEL], minlength=classes)
