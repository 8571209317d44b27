"""``python -m engine.export``: a trained classifier as one file for other programs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from engine.checkpoint import write_atomically
from engine.cli import ArgumentParser, run
from engine.config import Config
from engine.data import IMAGENET_MEAN, IMAGENET_STD
from engine.errors import UserError
from engine.fusion import fuse
from engine.heads import Heads
from engine.inference import InferenceModel, fold_norms, output_names
from engine.models import create_model
from engine.output import free_file
from engine.trained import add_checkpoint_flags, heads_of, read_trained, restore

OPSET = 18
TOLERANCE = 1e-4
"""The largest difference from the run's own model that a file may show."""

_CPU = torch.device("cpu")
_INPUT, _METADATA = "images", "metadata"

Outputs = tuple[Tensor, ...]
"""Those that `output_names` names."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint and its configuration, with nothing fused and plain strides, as every machine can run it."""

    checkpoint: dict[str, Any]
    config: Config

    @property
    def heads(self) -> Heads | None:
        return heads_of(self.checkpoint, self.config)

    def model(self) -> nn.Module:
        plain = dataclasses.replace(self.config, fused_se=False, channels_last=False)
        return restore(self.checkpoint, plain, _CPU)[0]

    def description(self) -> dict[str, Any]:
        """What the user of a file has to know; plain values."""
        config, checkpoint, heads = self.config, self.checkpoint, self.heads
        about = {
            "class_names": list(checkpoint["class_names"] if heads is None else heads.ends()),
            "model": config.model,
            "epoch": checkpoint["epoch"],
            "classifier": "cosine" if config.loss == "ldam" else "linear",
            "img_size": config.img_size,
            "crop_pct": config.crop_pct,
            "interpolation": "bilinear, antialiased",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "temperature": checkpoint.get("temperature"),
        }
        if heads is not None:
            temperatures = checkpoint.get("head_temperatures", {})
            about["heads"] = {
                name: {
                    "class_names": list(task.class_names),
                    "when": task.spec.when and dict([task.spec.when]),
                    "temperature": temperatures.get(name),
                }
                for name, task in heads.tasks.items()
            }
        return about


class Format(NamedTuple):
    """How a file of one kind is made, and what it says of (N, 3, S, S) uint8 images when it is read back."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Trained, Path], None]
    outputs: Callable[[Trained, Path, Tensor], Outputs]


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    kind = FORMATS[args.format]
    _require_suffix(args, kind)
    for package in kind.packages:
        _require(package, args.format)
    trained = Trained(*read_trained(args.checkpoint, args.epoch))
    output = free_file(args.output, force=args.force)
    difference = export(trained, kind, output)
    print(f"{trained.config.model}, weights of epoch {trained.checkpoint['epoch']}, written to {output}")
    print(f"{output.stat().st_size / 1e6:.1f} MB; read back, its output differs from the model's by {difference:.1e}")


def export(trained: Trained, kind: Format, output: Path) -> float:
    """Writes ``output`` whole or not at all, and returns its largest difference from the run's own model.

    The difference is that of the probabilities, and of the logits in proportion to the largest one above 1, on random
    images, in float32 on the CPU.

    Raises:
        UserError: the file cannot be written, or differs by more than ``TOLERANCE``; none is left then.
    """
    size = trained.config.img_size
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    difference = float("nan")

    def write_and_compare(unfinished: Path) -> None:
        nonlocal difference
        kind.write(trained, unfinished)
        found, wanted = kind.outputs(trained, unfinished, images), _own_outputs(trained, images)
        difference = largest_difference(output_names(trained.heads), found, wanted)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{output}: the file's output differs from the model's by {difference:.1e}, more than {TOLERANCE:g}, "
                "and was not kept; use another --format"
            )

    try:
        write_atomically(output, write_and_compare)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}); name another") from error
    return difference


def largest_difference(names: Sequence[str], found: Outputs, wanted: Outputs) -> float:
    """See `export`; NaN where there is one."""
    differences = []
    for name, a, b in zip(names, found, wanted, strict=True):
        scale = b.abs().max().clamp(min=1) if name.startswith("logits") else 1
        differences.append((a - b).abs().max() / scale)
    return torch.stack(differences).max().item()


@torch.inference_mode()
def _own_outputs(trained: Trained, images: Tensor) -> Outputs:
    model = trained.model()
    if trained.config.fused_se:
        fuse(model, trained.config)
    return _inference(trained, model)(images)


def _inference(trained: Trained, model: nn.Module) -> InferenceModel:
    return InferenceModel(model, trained.heads, IMAGENET_MEAN, IMAGENET_STD).eval()


def _program(trained: Trained) -> torch.export.ExportedProgram:
    """The graph, for any number of images."""
    inference = _inference(trained, trained.model()).requires_grad_(False)
    size = trained.config.img_size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    program = torch.export.export(inference, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    fold_norms(program)
    return program


def _graph_description(trained: Trained) -> str:
    size = trained.config.img_size
    return json.dumps(
        trained.description()
        | {
            "preprocessing": [*_steps(trained.config), f"to {_INPUT} (N, 3, {size}, {size}) uint8; the rest is inside"],
            "outputs": _output_descriptions(trained.heads),
        }
    )


def _output_descriptions(heads: Heads | None) -> dict[str, str]:
    of_one, calibrated = (
        "(N, classes) float32",
        "where temperature is a number, softmax({} / temperature) is calibrated",
    )
    if heads is None:
        return {
            "probabilities": f"{of_one}, softmax(logits), as engine.predict writes them",
            "logits": f"{of_one}; {calibrated.format('logits')}",
        }
    told = {
        "probabilities": f"{of_one} of class_names, those of the heads multiplied along each way to its end, as "
        f"engine.predict writes them; {calibrated.format('log(probabilities)')}"
    }
    for name in heads.tasks:
        told[f"probabilities_{name}"] = f"{of_one}, softmax(logits_{name})"
        told[f"logits_{name}"] = f"{of_one}; with the head's own temperature as above"
    return told


def _steps(config: Config) -> list[str]:
    size = config.img_size
    crop = f"cut out the central square of {config.crop_pct:g} times the shorter side" if config.crop_pct else ""
    steps = (
        "turn the image upright as its EXIF orientation says, and to RGB",
        crop,
        f"resize it to {size} x {size} pixels, bilinear with antialiasing",
    )
    return [step for step in steps if step]


def _write_onnx(trained: Trained, path: Path) -> None:
    with warnings.catch_warnings():  # of what torch itself calls there
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            _program(trained),
            dynamo=True,
            opset_version=OPSET,
            input_names=[_INPUT],
            output_names=output_names(trained.heads),
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert made is not None
    for node in made.model.graph:  # where it comes from in the code, down to the folders of this machine
        node.metadata_props.clear()
    made.model.metadata_props[_METADATA] = _graph_description(trained)
    made.save(path, external_data=False)


def _onnx_outputs(trained: Trained, path: Path, images: Tensor) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return tuple(map(torch.from_numpy, session.run(output_names(trained.heads), {_INPUT: images.numpy()})))


def _write_program(trained: Trained, path: Path) -> None:
    program = _program(trained).run_decompositions({})  # which leaves nothing of a cosine classifier's autocast
    for node in program.graph.nodes:  # as in ONNX
        node.meta.pop("stack_trace", None)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={f"{_METADATA}.json": _graph_description(trained)})


def _program_outputs(trained: Trained, path: Path, images: Tensor) -> Outputs:
    with path.open("rb") as file:
        outputs: Outputs = torch.export.load(file).module()(images)
    return outputs


def _write_weights(trained: Trained, path: Path) -> None:
    steps = [
        *_steps(trained.config),
        "divide by 255, subtract mean and divide by std of each channel, to (N, 3, H, W) float32",
    ]
    description = json.dumps(trained.description() | {"preprocessing": steps})
    weights = {name: tensor.contiguous() for name, tensor in trained.checkpoint["model"].items()}
    # in place of save_file, which makes a file that nobody else may read
    path.write_bytes(save(weights, metadata={"format": "pt", _METADATA: description}))


@torch.inference_mode()
def _weights_outputs(trained: Trained, path: Path, images: Tensor) -> Outputs:
    config, heads, classes = trained.config, trained.heads, len(trained.checkpoint["class_names"])
    shapes = None if heads is None else heads.shapes()
    model = create_model(config.model, num_classes=classes, heads=shapes, **config.model_options())
    model.load_state_dict(load_file(path))
    outputs: Outputs = _inference(trained, model)(images)
    return outputs


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _onnx_outputs),
    "torch-export": Format(".pt2", (), _write_program, _program_outputs),
    "safetensors": Format(".safetensors", (), _write_weights, _weights_outputs),
}


def _require_suffix(args: argparse.Namespace, kind: Format) -> None:
    path = Path(args.output)
    if path.suffix != kind.suffix and not path.is_dir():
        raise UserError(f"--output {path}: readers know {args.format} by its ending; name it {path.stem}{kind.suffix}")


def _require(package: str, wanted_by: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"--format {wanted_by} needs {package}, which cannot be imported ({error}): "
            "pip install 'fused-se-engine[export]'"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.export",
        description="Write a trained classifier as one file that other programs read.",
        allow_abbrev=False,
    )
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help=f"onnx (opset {OPSET}) and torch-export: uint8 images to probabilities, BatchNorm folded, normalisation "
        "inside; safetensors: the weights under timm's keys",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help=f"file to write: {', '.join(f'*{kind.suffix}' for kind in FORMATS.values())}",
    )
    parser.add_argument("--force", action="store_true", help="replace --output where it exists")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
