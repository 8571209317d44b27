"""MixUp and CutMix of models with several heads: the joint loss image by image, its limits, and a run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from engine import train
from engine.cli import run
from engine.config import Config
from engine.data.sampler import effective_weights
from engine.heads import NO_LABEL, JointLoss
from engine.losses import make_criterion
from engine.mixing import MixedIndices
from tests.against_sklearn import require_sklearns_figures
from tests.image_folders import COLOURS, write_image
from tests.test_train_step import HostReads

CPU = torch.device("cpu")
FACTORS = {"diagnosis": 1.0, "subtype": 0.5, "stain": 2.0}
COUNTS = {"diagnosis": np.array([30, 12]), "subtype": np.array([7, 1, 4]), "stain": np.array([5, 9])}
TABLE = torch.tensor(  # a subtype of what is malignant, where it is known; some stains
    [[0, -1, -1], [0, -1, 1], [1, 2, 0], [1, 0, -1], [1, -1, 1], [0, -1, -1], [1, 1, 1], [-1, -1, -1]]
)
BATCH = [3, 0, 6, 6, 7, 1, 4, 2, 5]  # an image may be drawn twice, and meet itself


def joint_loss(dtype: torch.dtype, **options: object) -> JointLoss:
    config = Config(**options)
    return JointLoss({name: make_criterion(config, n, CPU, dtype)(0) for name, n in COUNTS.items()}, FACTORS, TABLE)


def drawn_logits(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.randn(len(BATCH), len(n), generator=generator, dtype=dtype).mul(3).requires_grad_()
        for name, n in COUNTS.items()
    }


def mixed(indices: list[int], kept: float) -> MixedIndices:
    return MixedIndices(torch.tensor(indices), torch.tensor(indices).roll(1), kept)


def cross_entropy(z: Tensor, k: int, counts: np.ndarray) -> Tensor:
    return z.exp().sum().log() - z[k]


def focal(z: Tensor, k: int, counts: np.ndarray) -> Tensor:
    p = z[k].exp() / z.exp().sum()
    return -((1 - p) ** 1.5) * p.log()


def balanced_softmax(z: Tensor, k: int, counts: np.ndarray) -> Tensor:
    n = torch.from_numpy(counts).double()
    return (n * z.exp()).sum().log() - n[k].log() - z[k]


def image_by_image(logits: dict[str, Tensor], kept: float, formula, smoothing: float, weights_of) -> Tensor:
    """The definition: a weighted mean over both labels of every image, those that count, by their shares."""
    total = torch.zeros((), dtype=torch.float64)
    for column, (head, counts) in enumerate(COUNTS.items()):
        weights, classes = weights_of(counts), len(counts)
        losses, shares = torch.zeros((), dtype=torch.float64), 0.0
        for i, z in enumerate(logits[head]):
            for share, index in ((kept, BATCH[i]), (1 - kept, BATCH[i - 1])):
                y = int(TABLE[index, column])
                if y == NO_LABEL:
                    continue
                of_class = [weights[k] * formula(z, k, counts) for k in range(classes)]
                losses = losses + share * ((1 - smoothing) * of_class[y] + smoothing * sum(of_class) / classes)
                shares += share * weights[y]
        total = total + FACTORS[head] * losses / shares
    return total


@pytest.mark.parametrize(
    ("formula", "options", "weights_of"),
    (
        (cross_entropy, {}, np.ones_like),
        (cross_entropy, {"smoothing": 0.2, "class_weights": "balanced"}, lambda n: n.sum() / (len(n) * n)),
        (
            focal,
            {"loss": "focal", "focal_gamma": 1.5, "smoothing": 0.05, "class_weights": "effective"},
            lambda n: effective_weights(n, 0.999) * len(n) / effective_weights(n, 0.999).sum(),
        ),
        (balanced_softmax, {"loss": "logit-adjustment"}, np.ones_like),
    ),
    ids=("cross-entropy", "smoothing and weights", "focal", "logit adjustment"),
)
def test_a_mixed_batch_weighs_both_labels_of_every_image_that_count(formula, options, weights_of):
    smoothing = options.get("smoothing", 0.1 if "loss" not in options else 0.0)
    loss, generator = joint_loss(torch.float64, **options), torch.Generator().manual_seed(0)
    for kept in (*torch.rand(2, generator=generator).tolist(), 0.0):
        logits = drawn_logits(generator, torch.float64)
        targets = mixed(BATCH, kept)
        with HostReads() as reads:
            got = loss(logits, targets)
        assert reads.count == 0
        expected = image_by_image(logits, kept, formula, smoothing, weights_of)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        gradients, wanted = (torch.autograd.grad(value, list(logits.values())) for value in (got, expected))
        torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-14)


def test_a_pair_gives_a_head_the_one_term_that_meets_its_condition():
    """A benign and a malignant image: of the subtype there is one label, shown by 0.7 in one and 0.3 in the other."""
    logits = drawn_logits(torch.Generator().manual_seed(1), torch.float32)
    pair = {name: z[:2] for name, z in logits.items()}
    joint_loss(torch.float32, smoothing=0.0)(pair, mixed([6, 5], 0.7)).backward()
    of_label = logits["subtype"].detach()[:2].softmax(1) - torch.tensor([0.0, 1.0, 0.0])
    expected = FACTORS["subtype"] * torch.tensor([[0.7], [0.3]]) * of_label
    torch.testing.assert_close(logits["subtype"].grad[:2], expected)


@pytest.mark.parametrize("loss", ("cross-entropy", "focal", "logit-adjustment"))
def test_an_image_kept_whole_gives_the_loss_of_the_unmixed_batch_to_the_bit(loss):
    logits = drawn_logits(torch.Generator().manual_seed(2), torch.float32)
    of = joint_loss(torch.float32, loss=loss, smoothing=0.1, class_weights="sqrt")
    plain, whole = of(logits, torch.tensor(BATCH)), of(logits, mixed(BATCH, 1.0))
    assert torch.equal(plain, whole)
    gradients = [torch.autograd.grad(value, list(logits.values())) for value in (plain, whole)]
    assert all(torch.equal(expected, got) for expected, got in zip(*gradients, strict=True))


def test_a_mixed_batch_in_which_nothing_counts_has_no_loss_and_no_gradient():
    logits = drawn_logits(torch.Generator().manual_seed(3), torch.float32)
    loss = joint_loss(torch.float32, class_weights="balanced")(
        {name: z[:3] for name, z in logits.items()}, mixed([7, 7, 7], 0.4)
    )
    loss.backward()
    assert loss == 0
    assert all(torch.equal(z.grad, torch.zeros_like(z)) for z in logits.values())

    benign = joint_loss(torch.float32)({name: z[:2] for name, z in logits.items()}, mixed([1, 5], 0.4))
    benign.backward()
    assert logits["diagnosis"].grad[:2].all()
    assert not logits["subtype"].grad.any()


@pytest.fixture
def smears(tmp_path) -> Path:
    """Of a benign image, and of one in four malignant ones, there is no kind."""
    lines = ["filename,label,label_kind,split\n"]
    for number, (name, colour) in enumerate(COLOURS.items()):
        for i in range(12):
            write_image(tmp_path / name / f"{i}.png", colour, seed=100 * number + i)
            kind = name if number and i % 4 else ""
            split = "train" if i < 8 else "val"
            lines.append(f"{name}/{i}.png,{'malignant' if number else 'benign'},{kind},{split}\n")
    (tmp_path / "smears.csv").write_text("".join(lines))
    return tmp_path


def test_a_run_with_heads_learns_from_mixed_batches(smears, monkeypatch):
    heads = {"diagnosis": {}, "kind": {"when": {"diagnosis": "malignant"}, "hidden": 16}}
    (smears / "heads.yaml").write_text(yaml.safe_dump({"heads": heads}))
    steps = []
    forward = JointLoss.forward

    def noted(self: JointLoss, logits: dict[str, Tensor], targets: MixedIndices) -> Tensor:
        loss = forward(self, logits, targets)
        steps.append((targets, loss.item()))
        return loss

    monkeypatch.setattr(JointLoss, "forward", noted)
    output = smears / "run"
    files = ("--recipe", str(smears / "heads.yaml"), "--csv", str(smears / "smears.csv"), "--output", str(output))
    small = ("--model", "resnet18", "--img-size", "16", "-b", "6", "-j", "1", "--epochs", "6", "--warmup-epochs", "0")
    mixing = ("--mixup", "0.4", "--cutmix", "1.0", "--mixup-prob", "0.8")
    loss = ("--class-weights", "sqrt", "--smoothing", "0.05")
    assert run(train.main, [*files, *small, *mixing, *loss]) == 0

    shares = [targets.kept for targets, _ in steps]
    assert 1.0 in shares
    assert len({share for share in shares if 0 < share < 1}) > len(steps) / 2
    assert all(torch.equal(targets.partners, targets.own.roll(1)) for targets, _ in steps)
    with (output / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, of_epoch in zip(rows, np.array([loss for _, loss in steps]).reshape(len(rows), -1), strict=True):
        assert float(row["train_loss"]) == pytest.approx(of_epoch.mean(), rel=1e-5)
    assert min(own["accuracy"] for own in require_sklearns_figures(output)["heads"].values()) > 0.8
