"""MixUp and CutMix: torchvision's results at the same parameters, the distribution, a pure function of where it is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torchvision.transforms import v2

from engine import train
from engine.cli import run
from engine.errors import UserError
from engine.mixing import Mixing, cut_in, mixed_targets
from tests.image_folders import write_folder

B, K, H, W = 5, 4, 9, 14


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(B, 3, H, W, generator=generator).to(dtype, memory_format=torch.channels_last)
    return images, torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_mixup_is_torchvisions(dtype):
    images, labels = batch(dtype)
    mixing = Mixing(K, seed=3, mixup=0.4)
    mixed, targets = mixing(images, labels, epoch=2, step=7)
    kept = targets[0, 0].item()
    assert 0 < kept < 1
    reference = v2.MixUp(num_classes=K)
    params = {"labels": labels, "batch_size": B, "lam": kept}
    torch.testing.assert_close(mixed, reference.transform(images, params))
    torch.testing.assert_close(targets, reference.transform(labels, params))


@pytest.mark.parametrize(("u", "v"), ((0.5, 0.5), (0.0, 0.99), (0.9, 0.1)))
@pytest.mark.parametrize("kept", (0.0, 0.3, 0.9, 1.0))
def test_cutmix_is_torchvisions(kept, u, v, monkeypatch):
    images, labels = batch()
    reference = v2.CutMix(num_classes=K)
    monkeypatch.setattr(reference, "_dist", SimpleNamespace(sample=lambda _: kept))
    centre = iter((int(u * W), int(v * H)))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(centre)]))
    params = reference.make_params([images])
    pasted, stays = cut_in(images, kept, u, v)
    assert stays == params["lam_adjusted"]
    params |= {"labels": labels, "batch_size": B}
    assert torch.equal(pasted, reference.transform(images, params))
    torch.testing.assert_close(mixed_targets(labels, K, stays), reference.transform(labels, params))


@pytest.mark.parametrize("options", ({"mixup": 0.8}, {"cutmix": 0.8}), ids=("mixup", "cutmix"))
def test_batches_keep_dtype_layout_and_what_was_given(options):
    images, labels = batch(torch.float16)
    before = images.clone()
    mixed, targets = Mixing(K, seed=0, **options)(images, labels, 0, 0)
    assert mixed.dtype == torch.float16
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    torch.testing.assert_close(targets.sum(1), torch.ones(B))


@pytest.mark.parametrize("options", ({"mixup": 0.8}, {"cutmix": 0.8}), ids=("mixup", "cutmix"))
def test_of_indices_it_says_which_images_each_picture_shows_and_how_much_of_them(options):
    indices = torch.tensor([7, 3, 4, 3, 9])
    images = indices[:, None, None, None].expand(-1, 3, H, W).float()
    pictures, shown = Mixing(None, seed=3, **options)(images, indices, epoch=2, step=7)
    assert 0 < shown.kept < 1
    assert torch.equal(shown.own, indices)
    torch.testing.assert_close(pictures.mean((1, 2, 3)), shown.kept * indices + (1 - shown.kept) * shown.partners)


def test_the_coefficient_is_beta_distributed_and_choices_have_their_probabilities():
    images, labels = torch.zeros(2, 1, 64, 64), torch.tensor([0, 1])
    images[1] = 1
    kinds, coefficients = {"none": 0, "mixup": 0, "cutmix": 0}, []
    mixing = Mixing(2, seed=0, mixup=0.4, cutmix=1.0, prob=0.75, switch_prob=0.25)
    steps = 2000
    for step in range(steps):
        mixed, targets = mixing(images, labels, 1, step)
        values = set(mixed[0].unique().tolist())
        kind = "none" if values == {0.0} and targets[0, 0] == 1 else "cutmix" if values <= {0.0, 1.0} else "mixup"
        kinds[kind] += 1
        if kind == "mixup":
            coefficients.append(targets[0, 0].item())
    assert np.allclose([kinds[k] / steps for k in ("none", "mixup", "cutmix")], (0.25, 0.5625, 0.1875), atol=0.05)
    # coefficients that float32 rounds to 0 or 1 look like no mixing: they are missing at the ends alone
    assert kstest(coefficients, beta(0.4, 0.4).cdf).pvalue > 0.001


def test_a_step_is_mixed_alike_whatever_came_before():
    images, labels = batch()
    first, second = (Mixing(K, seed=5, mixup=0.4, cutmix=1.0) for _ in range(2))
    first(images, labels, 0, 0)
    for a, b in zip(first(images, labels, 3, 9), second(images, labels, 3, 9), strict=True):
        assert torch.equal(a, b)
    others = [second(images, labels, 3, 10), second(images, labels, 4, 9)]
    others.append(Mixing(K, seed=6, mixup=0.4, cutmix=1.0)(images, labels, 3, 9))
    assert not any(torch.equal(first(images, labels, 3, 9)[1], targets) for _, targets in others)


def test_without_either_nothing_is_mixed():
    images, labels = batch()
    mixing = Mixing(K, seed=0)
    assert not mixing
    assert not Mixing(K, seed=0, mixup=1.0, prob=0.0)
    mixed, targets = mixing(images, labels, 0, 0)
    assert mixed is images
    assert torch.equal(targets.argmax(1), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"mixup": -1.0}, "--mixup -1.0 does not work"),
        ({"cutmix": float("nan")}, "--cutmix nan does not work"),
        ({"prob": 1.5}, "--mixup-prob 1.5 does not work"),
        ({"switch_prob": -0.1}, "--mixup-switch-prob -0.1 does not work"),
    ),
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Mixing(K, seed=0, **options)


def test_a_run_trains_on_mixed_batches(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", {"blue": 8, "green": 8})
    seen = []
    original = train.nn.CrossEntropyLoss.forward
    monkeypatch.setattr(
        train.nn.CrossEntropyLoss, "forward", lambda self, x, t: (seen.append(t), original(self, x, t))[1]
    )
    flags = ("--model", "seresnet18", "--img-size", "32", "-b", "4", "-j", "1", "--epochs", "1", "--warmup-epochs", "0")
    mixing = ("--mixup", "0.5", "--cutmix", "1.0", "--class-weights", "balanced")
    output = ("--output", str(tmp_path / "run"))
    assert run(train.main, ["--data-dir", str(folder), *flags, *mixing, *output]) == 0
    mixed = [targets for targets in seen if targets.is_floating_point()]
    assert any(((targets > 0) & (targets < 1)).any() for targets in mixed)
