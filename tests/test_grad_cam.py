"""Grad-CAM is what its paper says, whatever the model; and the pictures show the images and where its evidence is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from engine.config import Config
from engine.data import decoded
from engine.data.decode import BadImage
from engine.errors import UserError
from engine.grad_cam import explain, explained_examples, grad_cam
from engine.models import HeadShape, create_model
from engine.originals import Originals
from engine.pictures import draw_evidence, draw_mistakes, typical_hits, worst_mistakes
from engine.pictures.mistakes import overlay
from engine.predictions import Predictions
from kernels import fuse_tails
from tests.tail_models import drawn

SIDE = 96


def model_of(name: str = "seresnet18", **options) -> nn.Module:
    torch.manual_seed(0)
    return drawn(create_model(name, num_classes=3, **options)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def features_of(model: nn.Module, x: Tensor) -> Tensor:
    for part in (model.conv1, model.bn1, model.relu, model.maxpool):
        x = part(x)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
    return x


def enlarged(maps: Tensor) -> Tensor:
    maps = F.interpolate(maps.relu()[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)


def test_with_one_linear_layer_it_is_the_class_activation_map(images):
    model = model_of()
    with torch.no_grad():
        of_classes = torch.einsum("kc,nchw->nkhw", model.fc.weight, features_of(model, images))
    labels = of_classes.amax(dim=(2, 3)).argmax(dim=1)
    maps = of_classes[torch.arange(2), labels]
    found = grad_cam(model, images, labels)
    assert (found.shape, found.dtype) == ((2, SIDE, SIDE), torch.float32)
    torch.testing.assert_close(found, enlarged(maps))
    assert found.amin() >= 0 and (found.amax(dim=(1, 2)) == 1).all()


def test_of_a_head_with_a_hidden_layer_it_is_the_papers_formula(images):
    model = model_of(heads={"first": HeadShape(2), "second": HeadShape(3, hidden=8, drop=0.5)})
    features = features_of(model, images).detach().requires_grad_()
    logits = model.heads["second"](features.mean(dim=(2, 3)))
    labels = logits.argmax(dim=1)
    slope = torch.stack(
        [torch.autograd.grad(logits[i, label], features, retain_graph=True)[0][i] for i, label in enumerate(labels)]
    )
    maps = (slope.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)
    found = grad_cam(model, images, head="second")
    assert found.amax() == 1
    torch.testing.assert_close(found, enlarged(maps.detach()))
    for head, named in (("third", "first, second"), (None, "first, second")):
        with pytest.raises(UserError, match=named):
            grad_cam(model, images, head=head)


def test_it_is_the_same_fused_and_leaves_the_model_as_it_was(images):
    model, fused = model_of(), model_of()
    assert fuse_tails(fused) == 9
    fused.train()
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():  # evidence for every class
        model.fc.weight.abs_()
        fused.fc.weight.abs_()
    found = grad_cam(fused, images, torch.tensor([1, 2]))
    assert found.amax() == 1
    torch.testing.assert_close(found, grad_cam(model, images, torch.tensor([1, 2])), atol=1e-4, rtol=1e-4)
    assert not fused.training
    assert all(parameter.grad is None for parameter in [*model.parameters(), *fused.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), atol=1e-4, rtol=1e-4)
    assert not fused.layer4._forward_hooks


def test_it_is_the_same_under_inference_mode(images):
    model = model_of()
    expected = grad_cam(model, images, torch.tensor([1, 0]))
    with torch.inference_mode():
        assert torch.equal(grad_cam(model, images.clone(), torch.tensor([1, 0])), expected)


def test_an_image_without_evidence_for_the_class_is_zero(images):
    model = model_of()
    with torch.no_grad():
        model.fc.weight[1] = -model.fc.weight[1].abs()
    assert (grad_cam(model, images, torch.tensor([1, 1])) == 0).all()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_timms_models_with_stages_are_explained(name):
    options = {"img_size": 64, "depths": (1, 1, 1, 1)} if "swin" in name else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        features = model.forward_features(images)
    if "swin" in name:
        features = features.permute(0, 3, 1, 2)
    found = grad_cam(model, images, torch.tensor([1]))
    assert found.shape == (1, 64, 64)
    assert features.shape[2:] == (2, 2)
    torch.testing.assert_close(model(images), expected)
    maps = torch.einsum("c,nchw->nhw", model.get_classifier().weight[1].detach(), features)
    grown = F.interpolate(maps.relu()[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0]
    assert found.max() == 1
    torch.testing.assert_close(found, grown / grown.max())


def test_what_has_no_feature_map_is_refused(images):
    with pytest.raises(UserError, match="VisionTransformer has none"):
        grad_cam(timm.create_model("test_vit", num_classes=2, img_size=96), images)
    with pytest.raises(UserError, match=r"single place.*--img-size"):
        grad_cam(model_of(), images[..., :32, :32])
    with pytest.raises(UserError, match="Sequential is neither"):
        grad_cam(nn.Sequential(nn.Conv2d(3, 3, 1)), images)


# the pictures


@pytest.fixture
def run(tmp_path) -> tuple[Predictions, Config]:
    """Seven images in two classes, 2 and 5 called wrongly, the second of which is gone."""
    for i in range(7):
        Image.new("RGB", (40, 20 + i), (30 * i, 10, 200)).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").unlink()
    probability = torch.tensor([0.9, 0.6, 0.2, 0.3, 0.1, 0.95, 0.25], dtype=torch.float64)
    probabilities = torch.stack([probability, 1 - probability], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    files = tuple(f"{i}.png" for i in range(7))
    found = Predictions(files, ("benign", "$alignant"), labels, probabilities.argmax(1), probabilities)
    return found, Config(data_dir=str(tmp_path), img_size=SIDE, model="seresnet18", data_backend="resident", workers=1)


def texts(figure) -> str:
    return "\n".join(text.get_text() for axes in (figure, *figure.axes) for text in axes.texts)


def test_worst_mistakes_stand_by_their_confidence(run):
    predictions, _ = run
    assert worst_mistakes(predictions) == [5, 2]
    assert worst_mistakes(predictions, 1) == [5]
    assert worst_mistakes(predictions, label=0) == [2]
    assert sorted(typical_hits(predictions, 0, 5)) == [0, 1]
    assert typical_hits(predictions, 1, 2) == [6, 3]


def test_mistakes_show_the_image_the_truth_and_what_was_said(run):
    predictions, config = run
    figure = draw_mistakes(predictions, Originals(config).pixels)
    lost, seen = figure.axes
    assert "cannot be read" in lost.texts[0].get_text() and "No such file" in lost.texts[0].get_text()
    np.testing.assert_array_equal(seen.images[0].get_array()[0, 0], [60, 10, 200])
    assert "truth $alignant\npredicted benign (0.950)\n5.png\n" in texts(figure)
    assert "truth benign\npredicted $alignant (0.800)" in texts(figure)
    assert "2 of 7 images are wrong" in texts(figure)


def test_a_run_without_mistakes_says_so(run):
    predictions, config = run
    right = dataclasses.replace(predictions, labels=predictions.predictions)
    assert "every image is right" in texts(draw_mistakes(right, Originals(config).pixels))


def test_examples_are_explained_class_by_class(run, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "cache_folder", lambda: tmp_path / "cache")
    predictions, config = run
    model = model_of()
    originals = Originals(config)
    rows = explained_examples(model, predictions, originals, config, torch.device("cpu"), right=1)
    assert {name: [shown.file for shown in own] for name, own in rows.items()} == {
        "benign": ["2.png", "0.png"],
        "$alignant": ["5.png", "6.png"],
    }
    wrong, right = rows["benign"]
    assert (wrong.is_right, right.is_right) == (False, True)
    shown = explain(model, originals.samples(["2.png"]), config, torch.device("cpu"), labels=[1])
    np.testing.assert_allclose(wrong.evidence, shown.maps[0], atol=1e-5)
    np.testing.assert_allclose(wrong.image[50, 50], np.array([60, 10, 200]) / 255, atol=1e-3)
    assert rows["$alignant"][0].image is None and "No such file" in rows["$alignant"][0].reason

    assert list((tmp_path / "cache" / "decoded").iterdir()) == []  # which is for the sets of a run
    figure = draw_evidence(rows)
    assert "images of $alignant" in texts(figure)
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(drawn) == 6  # of each of three images itself and the overlay
    np.testing.assert_array_equal(drawn[1], overlay(wrong.image, wrong.evidence))


def test_each_image_has_its_own_evidence_where_one_before_it_is_lost(run, monkeypatch):
    predictions, config = run
    config, device = dataclasses.replace(config, batch_size=2), torch.device("cpu")
    model, originals = model_of(), Originals(config)
    with torch.no_grad():  # evidence for every class
        model.fc.weight.abs_()
    names, labels = ["6.png", "5.png", "0.png", "3.png"], [1, 0, 2, 0]
    found = explain(model, originals.samples(names), config, device, labels=labels)
    assert list(found.reasons) == [1]
    assert np.isnan(found.maps[1]).all() and np.isnan(found.images[1]).all()
    for i in (0, 2, 3):
        alone = explain(model, originals.samples([names[i]]), config, device, labels=[labels[i]])
        np.testing.assert_allclose(found.maps[i], alone.maps[0], atol=1e-4)
        np.testing.assert_allclose(found.images[i], alone.images[0], atol=1e-6)
        np.testing.assert_allclose(found.images[i][50, 50, 0], 30 * int(names[i][0]) / 255, atol=1e-3)

    monkeypatch.setattr(Originals, "pixels", lambda *_: None)  # it is lost between the two times that it is read
    rows = explained_examples(model, predictions, originals, config, device, classes=1)
    assert [shown.file for shown in rows["benign"]] == ["2.png", "0.png", "1.png"], "two in three are recognised"
    assert len(rows) == 1
    (lost,) = [
        shown
        for own in explained_examples(model, predictions, originals, config, device, right=1).values()
        for shown in own
        if shown.image is None
    ]
    assert (lost.file, "No such file" in lost.reason) == ("5.png", True)


def test_an_overlay_leaves_what_says_nothing_grey():
    image = np.full((2, 2, 3), [1.0, 0.5, 0.0], dtype=np.float32)
    evidence = np.array([[0, 1], [0, 0]], dtype=np.float32)
    shown = overlay(image, evidence)
    np.testing.assert_allclose(shown[1], 0.299 + 0.587 * 0.5, atol=1e-6)
    red, green, blue = shown[0, 1]
    assert min(red, green) > blue + 0.1


def test_images_of_an_npz_file_are_found_by_their_names(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (n, 6, 6, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 2
    np.savez(tmp_path / "set.npz", **arrays)
    originals = Originals(Config(data_dir=str(tmp_path / "set.npz")))
    names = [name for name in originals._arrays if "test" in name]
    np.testing.assert_array_equal(originals.pixels(names[3]), arrays["test_images"][3])
    np.testing.assert_array_equal(originals.samples([names[3], names[1]]).pixels, arrays["test_images"][[3, 1]])
    with pytest.raises(BadImage):
        originals.pixels("elsewhere")
