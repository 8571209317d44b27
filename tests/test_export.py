"""``engine.export``: the files say what the run's own model says, and nothing is left of one that does not."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import export, load
from engine.cli import run
from engine.data import IMAGENET_MEAN, IMAGENET_STD
from engine.inference import fold_norms
from engine.models import MODEL_NAMES, HeadShape, create_model, load_pretrained
from tests.checkpoints import NAMES, write_checkpoint
from tests.data_helpers import picture, save
from tests.test_models import with_lively_batchnorm

ROOT = Path(__file__).parent.parent


def exported(checkpoint: Path, kind: str, output: Path, *flags: str) -> Path:
    assert run(export.main, [str(checkpoint), "--format", kind, "--output", str(output), *flags]) == 0
    assert [path.name for path in output.parent.iterdir() if "unfinished" in path.name] == []
    written_plainly = checkpoint / "best.pt" if checkpoint.is_dir() else checkpoint
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(written_plainly.stat().st_mode)
    return output


def random_images(n: int, size: int = 32) -> Tensor:
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def own_logits(checkpoint: Path, images: Tensor) -> Tensor:
    """Of the model as `load` gives it, fused where the run is, on images normalised here."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        return load(checkpoint, device="cpu").model((images / 255 - mean) / std)


def assert_says_the_same(checkpoint: Path, images: Tensor, probabilities: Tensor, logits: Tensor) -> None:
    wanted = own_logits(checkpoint, images)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(probabilities, wanted.softmax(dim=1), atol=1e-4, rtol=0)
    if len(images) > 1:
        assert np.ptp(wanted.numpy(), axis=0).max() > 0.05  # not the same whatever is shown


def test_onnx(tmp_path, capsys):
    """Of a fused run with a central crop."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint = write_checkpoint(tmp_path / "best.pt", img_size=32, fused_se=True, temperature=1.25)
    file = exported(tmp_path, "onnx", tmp_path / "new" / "model.onnx")
    assert "its output differs from the model's by" in capsys.readouterr().out

    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert str(ROOT).encode() not in file.read_bytes()

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert [(out.name, out.shape) for out in session.get_outputs()] == [
        ("probabilities", ["batch", 3]),
        ("logits", ["batch", 3]),
    ]
    for n in (1, 5):
        images = random_images(n)
        outputs = session.run(["probabilities", "logits"], {"images": images.numpy()})
        assert_says_the_same(checkpoint, images, *map(torch.from_numpy, outputs))

    told = json.loads(session.get_modelmeta().custom_metadata_map["metadata"])
    assert told["class_names"] == list(NAMES)
    assert (told["img_size"], told["crop_pct"], told["temperature"], told["epoch"]) == (32, None, 1.25, 7)
    assert told["preprocessing"][1] == "resize it to 32 x 32 pixels, bilinear with antialiasing"


def test_torch_export(tmp_path):
    """Of a network with a cosine classifier, whose autocast is nothing for a file, and a central crop."""
    checkpoint = write_checkpoint(
        tmp_path / "best.pt", model="resnet18", img_size=32, loss="ldam", drop=0.5, crop_pct=0.8
    )
    file = exported(checkpoint, "torch-export", tmp_path / "model.pt2")
    extra: dict[str, Any] = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra)
    told = json.loads(extra["metadata.json"])
    assert told["class_names"] == list(NAMES)
    assert (told["classifier"], told["crop_pct"]) == ("cosine", 0.8)

    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    assert all(isinstance(target, torch._ops.OpOverload) for target in called)
    assert not any("batch_norm" in str(target) for target in called)
    with zipfile.ZipFile(file) as archive:
        assert not any(str(ROOT).encode() in archive.read(name) for name in archive.namelist())

    for n in (1, 5):
        images = random_images(n)
        assert_says_the_same(checkpoint, images, *program.module()(images))

    # a picture that is prepared as the file says is seen as engine.predict sees it, but for rounding to 8 bits
    path = save(tmp_path / "image.png", picture(70, 90, noise=0))
    assert told["preprocessing"][1] == "cut out the central square of 0.8 times the shorter side"
    image = Image.open(path).crop((17, 7, 73, 63)).resize((32, 32), Image.Resampling.BILINEAR)
    found, _ = program.module()(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    np.testing.assert_allclose(found, load(checkpoint, device="cpu").predict(path).probabilities, atol=2e-3)


def test_weights_are_timms(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pt", img_size=32, fused_se=True)
    file = exported(checkpoint, "safetensors", tmp_path / "model.safetensors")
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["metadata"])
    assert told["class_names"] == list(NAMES)
    assert told["preprocessing"][-1].startswith("divide by 255, subtract mean and divide by std")

    theirs = timm.create_model("seresnet18", num_classes=3, checkpoint_path=str(file)).eval()
    mean, std = (torch.tensor(told[name])[:, None, None] for name in ("mean", "std"))
    images = random_images(3)
    with torch.inference_mode():
        logits = theirs((images / 255 - mean) / std)
    assert_says_the_same(checkpoint, images, logits.softmax(dim=1), logits)


def test_weights_start_another_run(tmp_path):
    """Those of a cosine classifier, which timm has none of, too."""
    checkpoint = write_checkpoint(tmp_path / "best.pt", model="resnet18", img_size=32, loss="ldam")
    file = exported(checkpoint, "safetensors", tmp_path / "model.safetensors")
    model = create_model("resnet18", num_classes=3, cosine=True)
    assert load_pretrained(model, "resnet18", file).fresh == ()
    assert all(torch.equal(tensor, load_file(file)[name]) for name, tensor in model.state_dict().items())


TREE = {
    "diagnosis": {"column": "label", "hidden": 8},
    "kind": {"column": "label_kind", "when": {"diagnosis": "ill"}},
}


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory) -> Path:
    classes = {"diagnosis": ("well", "ill"), "kind": ("a", "b", "c")}
    options = {"model": "resnet18", "img_size": 32, "fused_se": True, "temperature": 1.25}
    return write_checkpoint(tmp_path_factory.mktemp("heads") / "best.pt", heads=TREE, head_classes=classes, **options)


def assert_says_what_heads_predict(checkpoint: Path, told: dict[str, Any], found: Callable[[Tensor], Any]) -> None:
    """``found`` of images, by the names of the outputs, is what `engine.predict` says of them."""
    shown = np.stack([picture(32, 32, seed=i) for i in range(3)])
    outputs = found(torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous())
    of = dict(zip(told["outputs"], map(torch.as_tensor, outputs), strict=True))
    predicted = load(checkpoint, device="cpu").predict(list(shown))
    assert np.ptp(predicted.probabilities, axis=0).max() > 0.05
    np.testing.assert_allclose(of["probabilities"], predicted.probabilities, atol=1e-4)
    for head, (_, probabilities) in predicted.heads.items():
        np.testing.assert_allclose(of[f"probabilities_{head}"], probabilities, atol=1e-4)
        np.testing.assert_allclose(of[f"logits_{head}"].softmax(dim=1), probabilities, atol=1e-4)


def test_a_program_of_heads_gives_each_and_what_they_say_together(with_heads, tmp_path):
    extra: dict[str, Any] = {"metadata.json": ""}
    file = exported(with_heads, "torch-export", tmp_path / "model.pt2")
    program = torch.export.load(file, extra_files=extra)
    told = json.loads(extra["metadata.json"])
    assert told["class_names"] == ["well", "a", "b", "c"]
    assert told["heads"]["diagnosis"] == {"class_names": ["well", "ill"], "when": None, "temperature": 2.5}
    assert told["heads"]["kind"] == {"class_names": ["a", "b", "c"], "when": {"diagnosis": "ill"}, "temperature": 5.0}
    assert_says_what_heads_predict(with_heads, told, program.module())


@pytest.mark.slow
def test_onnx_of_heads_names_the_outputs_of_each(with_heads, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = exported(with_heads, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["metadata"])
    names = [out.name for out in session.get_outputs()]
    assert names == list(told["outputs"])
    assert_says_what_heads_predict(with_heads, told, lambda images: session.run(names, {"images": images.numpy()}))


def test_weights_of_heads_start_another_run(with_heads, tmp_path):
    file = exported(with_heads, "safetensors", tmp_path / "model.safetensors")
    name, heads = "resnet18", {"diagnosis": HeadShape(2, 8), "kind": HeadShape(3)}
    assert load_pretrained(create_model(name, num_classes=2, heads=heads), name, file).fresh == ()
    (fresh,) = load_pretrained(create_model(name, num_classes=2), name, file).fresh
    assert fresh == "classifier (0 classes in the weights, 2 here)"


def refused(capsys, *argv: str | Path) -> str:
    capsys.readouterr()
    assert run(export.main, [str(argument) for argument in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("factor", (1.01, float("nan")))
def test_a_file_that_says_something_else_is_not_kept(tmp_path, capsys, monkeypatch, factor):
    checkpoint = write_checkpoint(tmp_path / "best.pt", img_size=32)
    output = tmp_path / "model.safetensors"
    output.write_bytes(b"precious")

    def load_damaged(path: Path) -> dict[str, Tensor]:
        weights = load_file(path)
        weights["layer4.1.bn1.weight"] *= factor
        return weights

    monkeypatch.setattr(export, "load_file", load_damaged)
    line = refused(capsys, checkpoint, "--format", "safetensors", "--output", output, "--force")
    assert "model.safetensors: the file's output differs from the model's by" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "model.safetensors"]
    assert output.read_bytes() == b"precious"


def test_the_largest_difference():
    """Of probabilities as it is, of logits by the largest one above 1; what is not a number is never lost."""
    wanted = torch.tensor([[0.25, 0.75]]), torch.tensor([[-8.0, 2.0]])
    difference = partial(export.largest_difference, ("probabilities", "logits_kind"))
    assert difference(wanted, wanted) == 0
    assert difference((wanted[0] + 0.125, wanted[1]), wanted) == 0.125
    assert difference((wanted[0], wanted[1] - 2), wanted) == 0.25
    assert difference((wanted[0], wanted[1] - 2), (wanted[0], wanted[1] / 16)) == pytest.approx(9.5)
    for i in range(2):
        broken = [*wanted]
        broken[i] = torch.tensor([[float("nan"), 0.0]])
        assert not difference((broken[0], broken[1]), wanted) <= export.TOLERANCE


def test_mistakes_are_named_in_one_line(tmp_path, capsys, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "best.pt", img_size=32)
    as_onnx = (checkpoint, "--format", "onnx", "--output")
    weights = (checkpoint, "--format", "safetensors", "--output")
    assert "readers know safetensors by its ending; name it m.safetensors" in refused(
        capsys, *weights, tmp_path / "new" / "m.bin"
    )
    (tmp_path / "old.safetensors").write_bytes(b"precious")
    line = refused(capsys, *weights, tmp_path / "old.safetensors")
    assert "old.safetensors: exists; name another file, or add --force" in line
    (tmp_path / "old.safetensors").unlink()
    assert "(File exists); name another" in refused(capsys, *weights, checkpoint / "m.safetensors")
    assert "m.pt: no such checkpoint" in refused(capsys, "m.pt", *weights[1:], tmp_path / "m.safetensors")
    assert "does not keep that epoch" in refused(
        capsys, tmp_path, *weights[1:], tmp_path / "m.safetensors", "--epoch", "3"
    )
    monkeypatch.setitem(export.sys.modules, "onnxruntime", None)
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(export.sys.modules, package, export)
    line = refused(capsys, *as_onnx, tmp_path / "m.onnx")
    assert "--format onnx needs onnxruntime" in line
    assert "pip install 'fused-se-engine[export]'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


class Convolutions(nn.Module):
    """Two BatchNorms that can be folded; not those of an output read twice, of two layers, of a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, bias=i == 1) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        plain, biased, twice, *of_one, computed = self.convolutions
        x = self.norms[1](biased(self.norms[0](plain(x))))
        x = self.norms[2](twice(x)) + twice(x)
        for convolution in of_one:
            x = self.norms[3](convolution(x))
        return self.norms[4](nn.functional.conv2d(x, 2 * computed.weight))


def test_norms_are_folded_where_a_convolution_is_theirs_alone():
    torch.manual_seed(0)
    model = with_lively_batchnorm(Convolutions()).eval().requires_grad_(False)
    images = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (images,))
    assert fold_norms(program) == 2
    torch.testing.assert_close(program.module()(images), model(images))


def test_every_norm_of_a_model_of_timm_is_folded():
    """Whose modules stand in another order than they run in."""
    torch.manual_seed(0)
    model = with_lively_batchnorm(create_model("timm:mobilenetv3_small_050", num_classes=2)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).detach()
    program = torch.export.export(model.requires_grad_(False), (images,))
    assert fold_norms(program) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 30
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)


# Deeper models repeat the same blocks: each kind in one of the two ways, one of them in both
SHALLOW = [name for name in MODEL_NAMES if "101" not in name and "152" not in name]
ROUND_TRIPS = [(model, i % 2 == 1) for i, model in enumerate(SHALLOW)]
ROUND_TRIPS += [("seresnet50", True), ("timm:seresnet50", True), ("timm:efficientnet_b0", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "fused"), ROUND_TRIPS)
def test_round_trips_of_every_kind_of_model(model, fused, tmp_path):
    """The command itself compares what it reads back with the run's model."""
    pytest.importorskip("onnxscript")
    checkpoint = write_checkpoint(tmp_path / "best.pt", img_size=32, model=model, fused_se=fused)
    for kind, made in export.FORMATS.items():
        exported(checkpoint, kind, tmp_path / f"model{made.suffix}").unlink()  # 240 MB at most, and pytest keeps them
    checkpoint.unlink()
