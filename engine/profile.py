"""``python -m engine.profile``: what the model of a training run costs, what its input pipeline delivers, and whether
the one waits for the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from engine.build import build_model, open_data
from engine.cli import run
from engine.command_line import add_run_flags, make_parser, resolve
from engine.config import Config
from engine.data import DATA_BACKENDS, Splits
from engine.data.listing import write_all
from engine.data_profile import Stage, profile_parts, profile_pipeline
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.model_profile import FLOPS_PER_MAC, PHASES, Arithmetic, Times, count_arithmetic, time_training
from engine.output import free_file
from engine.tables import format_table

_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow")


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    if not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds:g} does not work: it must be above 0")
    output = free_file(args.figures, force=args.force) if args.figures else None
    names_data = any(hasattr(args, name) for name in ("data_dir", "csv", "recipe"))
    model_alone = hasattr(args, "num_classes") and not names_data and not args.data_only
    config = resolve(args, default_recipe=None if model_alone else "digits")
    # the last epochs, which are the dearest
    config = dataclasses.replace(config, img_size=config.train_img_size(config.epochs), train_img_sizes=())
    backends = list(dict.fromkeys(args.backends or [config.data_backend]))
    config = dataclasses.replace(config, data_backend=backends[0])
    device = pick_device(config.device)
    precision = Precision(device, config.amp, config.amp_dtype)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.seed)
    splits = None if model_alone else open_data(config)

    figures: dict[str, Any] = {"machine": describe_machine(device), "precision": str(precision)}
    figures["args"] = config.as_mapping()
    speed = None
    if not args.data_only:
        num_classes = len(splits.train.class_names) if splits else int(config.num_classes or 0)
        figures["model"] = _profile_model(config, num_classes, device, precision, args.seconds)
        speed = figures["model"]["images_per_second"]["step"]
    if splits:
        figures["data"] = _profile_data(config, splits, backends, device, precision, args.seconds, speed)
    if output is not None:
        write_all(output.parent, {output.name: (json.dumps(figures, indent=2) + "\n").encode()})
        print(f"\nwritten to {output}")


def _profile_model(
    config: Config, num_classes: int, device: torch.device, precision: Precision, seconds: float
) -> dict[str, Any]:
    """Prints the model's profile and returns its figures."""
    arithmetic = count_arithmetic(config.model, num_classes, config.img_size)
    model = build_model(config, num_classes, device, starts_fresh=False)
    layout = "channels-last" if config.channels_last else "NCHW"
    print(
        f"{config.model}, {num_classes} classes, on {describe_machine(device)['device']}: "
        f"steps of {config.batch_size} images of {config.img_size} px, {precision}, {layout}"
    )
    times = time_training(model, num_classes, config, device, precision, seconds=seconds)
    figures = model_figures(model, arithmetic, times, config.batch_size)
    print(f"\n{format_costs(figures)}\n\n{format_times(figures)}\n\n{format_layers(figures)}")
    return figures


def model_figures(model: nn.Module, arithmetic: Arithmetic, times: Times, batch_size: int) -> dict[str, Any]:
    """What the JSON file holds of a model; times in milliseconds a batch, arithmetic for one image."""
    speed = {"forward": 1000 * batch_size / times.phases["forward"].p50, "step": 1000 * batch_size / times.step.p50}
    return {
        "parameters": _parameters(model),
        "forward_macs": arithmetic.forward // FLOPS_PER_MAC,
        "forward_flops": arithmetic.forward,
        "training_flops": arithmetic.training,
        "training_flops_per_second": arithmetic.training * speed["step"],
        "saved_bytes": times.saved_bytes,
        "saved_bytes_per_image": times.saved_bytes / batch_size,
        "peak_bytes": times.peak_bytes,
        "milliseconds": {
            name: dataclasses.asdict(found) for name, found in {**times.phases, "step": times.step}.items()
        },
        "images_per_second": speed,
        "layers": {
            name: {
                "parameters": _parameters(child),
                "forward_macs": arithmetic.by_layer.get(name, 0) // FLOPS_PER_MAC,
                "forward_milliseconds": times.forward_by_layer[name],
            }
            for name, child in model.named_children()
        },
    }


def format_costs(figures: dict[str, Any]) -> str:
    lines = [
        ["parameters", f"{figures['parameters']:,}"],
        ["MACs of an image, forward", f"{figures['forward_macs'] / 1e9:.3f} G"],
        [f"FLOPs of an image, forward ({FLOPS_PER_MAC} a MAC)", f"{figures['forward_flops'] / 1e9:.3f} G"],
        ["FLOPs of an image, forward and backward", f"{figures['training_flops'] / 1e9:.3f} G"],
        ["FLOPs a second in training", f"{figures['training_flops_per_second'] / 1e9:,.1f} G"],
        ["kept for the backward pass, a batch", f"{figures['saved_bytes'] / 1e6:,.1f} MB"],
        ["kept for the backward pass, an image", f"{figures['saved_bytes_per_image'] / 1e6:,.1f} MB"],
    ]
    if figures["peak_bytes"] is not None:
        lines.append(["most memory on the GPU", f"{figures['peak_bytes'] / 1e6:,.1f} MB"])
    return format_table(lines, range(1, 2))


def format_times(figures: dict[str, Any]) -> str:
    lines = [["a batch, ms", "p20", "p50", "p80", "img/s"]]
    for name in (*PHASES, "step"):
        speed = figures["images_per_second"].get(name)
        milliseconds = [f"{value:.2f}" for value in figures["milliseconds"][name].values()]
        lines.append([name, *milliseconds, "" if speed is None else f"{speed:,.1f}"])
    return format_table(lines, range(1, 5))


def format_layers(figures: dict[str, Any]) -> str:
    forward = figures["milliseconds"]["forward"]["p50"]
    lines = [["layer", "parameters", "MMACs an image", "forward, ms", "share"]]
    for name, layer in figures["layers"].items():
        spent = layer["forward_milliseconds"]
        macs = f"{layer['forward_macs'] / 1e6:,.1f}"
        lines.append([name, f"{layer['parameters']:,}", macs, f"{spent:.2f}", f"{spent / forward:.1%}"])
    return format_table(lines, range(1, 5))


def _profile_data(
    config: Config,
    splits: Splits,
    backends: Sequence[str],
    device: torch.device,
    precision: Precision,
    seconds: float,
    train_speed: float | None,
) -> dict[str, Any]:
    """Prints the input pipelines' profile and returns its figures; ``train_speed`` in images a second."""
    print(
        f"{'' if train_speed is None else chr(10)}{splits.description}\n"
        f"batches of {config.batch_size} images of {config.img_size} px, {config.workers} workers, for {device}\n"
    )
    stages = list(profile_parts(config, splits.train, device, precision, seconds=seconds))
    pipelines: dict[str, Any] = {}
    for backend in backends:
        of_backend = dataclasses.replace(config, data_backend=backend)
        plain, whole = profile_pipeline(of_backend, splits.train, device, precision, seconds=seconds)
        stages += [plain, whole]
        pipelines[backend] = {"images_per_second": whole.images_per_second}
        if train_speed is not None:
            pipelines[backend]["waited"] = max(0.0, 1 - whole.images_per_second / train_speed)
    print(format_stages(stages))
    if train_speed is not None:
        print(f"\n{_format_waiting(pipelines, train_speed, device)}")
    return {"stages": [dataclasses.asdict(stage) for stage in stages], "pipelines": pipelines}


def format_stages(stages: Sequence[Stage]) -> str:
    lines = [["stage, by itself", "img/s", "a batch, ms: p20", "p50", "p80", "CPU cores"]]
    for stage in stages:
        cores = "-" if stage.cores is None else f"{stage.cores:.2f}"
        milliseconds = [f"{value:.2f}" for value in dataclasses.astuple(stage.batch)]
        lines.append([stage.name, f"{stage.images_per_second:,.0f}", *milliseconds, cores])
    return format_table(lines, range(1, 6))


def _format_waiting(pipelines: dict[str, Any], train_speed: float, device: torch.device) -> str:
    least, why = ("", "") if device.type == "cuda" else ("at least ", ": the two share the CPU")
    return "\n".join(
        f"{backend}: training at {train_speed:,.1f} img/s would wait for {least}{found['waited']:.0%} of a step{why}"
        for backend, found in pipelines.items()
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the arguments."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({torch.get_num_threads()} threads)",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "python -m engine.profile",
        "Measure the model of a training run and its input pipeline. Without data that of the embedded digits; with "
        "--num-classes and no data the model alone.",
    )
    parser.add_argument("--data-only", action="store_true", default=False, help="measure the input pipeline alone")
    parser.add_argument(
        "--seconds", type=float, metavar="FLOAT", default=5.0, help="to measure each thing for (default: 5)"
    )
    parser.add_argument(
        "--output", dest="figures", metavar="FILE", default=None, help="also write the figures, as JSON"
    )
    parser.add_argument("--force", action="store_true", default=False, help="replace an older file of figures")
    parser.add_argument(
        "--data-backend",
        dest="backends",
        nargs="+",
        choices=DATA_BACKENDS,
        default=None,
        help="one or more input pipelines (default: the run's, dali)",
    )
    run_flags = parser.add_argument_group("flags of a training run", "as engine.train's")
    add_run_flags(run_flags, without=("output", "data_backend"))
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
