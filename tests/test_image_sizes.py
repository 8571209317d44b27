"""``--train-img-sizes``: sizes that change from epoch to epoch, in every pipeline, through a stop and a resume."""

from __future__ import annotations

import pytest
import torch

from engine import profile, train
from engine.build import build_model
from engine.checkpoint import load_checkpoint
from engine.cli import run
from engine.command_line import parse_args
from engine.config import Config
from engine.data import Augmentation, DaliLoader, ResidentLoader, TorchvisionLoader, WeightedSampler
from engine.errors import UserError
from engine.preview import preview_rows
from tests.data_helpers import make_folder, make_loader, make_samples
from tests.test_train import rows, stop_after_one_epoch

EVERYTHING = Augmentation(
    crop_scale=(0.3, 1), rotation=0.5, sharpness=0.5, blur=0.5, erasing=0.5, auto_augment="trivial"
)


@pytest.mark.parametrize("pipeline", (DaliLoader, ResidentLoader, TorchvisionLoader))
def test_an_epoch_is_that_of_a_loader_of_its_size(tmp_path, pipeline):
    samples = make_samples(tmp_path, (6, 5), height=30, width=40)
    sampler = WeightedSampler(samples.labels, 2, sampling="inverse", seed=5)
    options = {"pipeline": pipeline, "training": True, "sampler": sampler, "augmentation": EVERYTHING, "workers": 1}
    growing = make_loader(samples, img_size=(12, 12, 20), **options)
    alike = make_loader(samples, img_size=20, **options)
    next(growing.epoch(2))  # begun and left
    held = []
    for epoch, size in ((0, 12), (2, 20), (1, 12), (7, 20)):
        ((images, labels),) = growing.epoch(epoch, start=1)
        assert images.shape == (4, 3, size, size)
        held.append((images, images.clone()))
        if size == 20:
            _, (images_alike, labels_alike) = alike.epoch(epoch)
            assert torch.equal(images, images_alike)
            assert torch.equal(labels, labels_alike)
    assert all(torch.equal(images, copy) for images, copy in held), "a batch is good for as long as it is held"


def test_dali_builds_one_pipeline_a_size(tmp_path, monkeypatch):
    built, build = [], DaliLoader._build
    monkeypatch.setattr(DaliLoader, "_build", lambda loader, size: built.append(size) or build(loader, size))
    loader = make_loader(make_samples(tmp_path, (4, 4)), img_size=(8, 8, 12, 12, 16), training=True)
    for epoch in range(6):
        list(loader.epoch(epoch))
    assert built == [8, 12, 16]


def test_stages_are_of_like_length_and_the_last_size_stays():
    sizes = Config(epochs=7, warmup_epochs=0, train_img_sizes=(128, 160, 192))
    assert [sizes.train_img_size(epoch) for epoch in range(9)] == [128] * 3 + [160] * 2 + [192] * 4
    assert Config(img_size=96).train_img_size(3) == 96


def test_a_run_grows_is_scored_at_its_own_size_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "images", {"a": 14, "b": 10})
    seen = []

    def watched_model(*args, **options):
        model = build_model(*args, **options)
        model.register_forward_pre_hook(lambda model, inputs: seen.append((model.training, inputs[0].shape[-1])))
        return model

    monkeypatch.setattr(train, "build_model", watched_model)
    flags = ["--data-dir", str(folder), "--data-backend", "resident", "--model", "resnet18", "-b", "8", "--model-ema"]
    flags += ["--img-size", "40", "--train-img-sizes", "16", "24", "32", "--epochs", "3", "--warmup-epochs", "0"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(train.main, [*flags, "--output", str(whole)]) == 0
    of_training = [size for training, size in seen if training]
    assert of_training == [16] * 2 + [24] * 2 + [32] * 2
    assert {size for training, size in seen if not training} == {40}
    assert rows(whole)[0].keys() == rows(whole)[2].keys()

    stop_after_one_epoch([*flags, "--output", str(stopped)], monkeypatch)
    seen.clear()
    assert run(train.main, ["--resume", str(stopped)]) == 0
    assert [size for training, size in seen if training] == [24] * 2 + [32] * 2
    assert rows(stopped) == rows(whole)
    first, second = (load_checkpoint(path / "last.pt") for path in (whole, stopped))
    assert all(torch.equal(value, second["raw_model"][name]) for name, value in first["raw_model"].items())
    assert (stopped / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()


def test_preview_shows_an_epoch_at_its_size_and_profile_takes_the_last(tmp_path, capsys):
    samples = make_samples(tmp_path, (4, 4))
    config = Config(
        img_size=24, train_img_sizes=(8, 16), epochs=4, warmup_epochs=0, batch_size=4, device="cpu", amp=False
    )
    for epoch, size in ((0, 8), (3, 16)):
        row = preview_rows(config, samples, train.make_sampler(samples, config), epoch)[0]
        assert (row.plain.shape[1:3], row.augmented.shape[1:3]) == ((24, 24), (size, size))

    flags = ["--num-classes", "3", "--model", "resnet18", "--img-size", "24", "--train-img-sizes", "8", "16"]
    assert run(profile.main, [*flags, "-b", "2", "--device", "cpu", "--seconds", "0.01"]) == 0
    assert "steps of 2 images of 16 px" in capsys.readouterr().out


def test_the_flag_takes_whole_numbers_that_do_not_fall(tmp_path):
    assert parse_args(["--train-img-sizes", "128", "160"])[0].train_img_sizes == (128, 160)
    (tmp_path / "a.yaml").write_text("train_img_sizes: [128, 160.5]\n")
    with pytest.raises(UserError, match=r"train_img_sizes: \[128, 160.5\] must be a list of whole numbers"):
        parse_args(["--recipe", str(tmp_path / "a.yaml")])
    for sizes, why in ((["160", "128"], "sizes that never fall"), (["0", "8"], "at least 1 pixel")):
        with pytest.raises(UserError, match=f"--train-img-sizes {' '.join(sizes)} does not work: .*{why}"):
            parse_args(["--train-img-sizes", *sizes])
    with pytest.raises(UserError, match="no more sizes than --epochs"):
        parse_args(["--train-img-sizes", "8", "16", "24", "--epochs", "2", "--warmup-epochs", "0"])
