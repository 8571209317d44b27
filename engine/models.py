"""ResNet and ResNeXt with and without SE on torchvision's ResNet, with timm's state-dict keys; and any model of timm.

SE stands after the last BatchNorm of each residual branch, before the addition.

Sources: He et al., "Deep Residual Learning for Image Recognition" (2015); Xie et al., "Aggregated Residual
Transformations for Deep Neural Networks" (2017) for ResNeXt; Hu et al., "Squeeze-and-Excitation Networks" (2017),
section 4; Goyal et al., "Accurate, Large Minibatch SGD" (2017) for the zero-initialised BatchNorm.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import SqueezeExcitation

from engine.classifier import CosineLinear, DropoutLinear
from engine.errors import UserError
from engine.timm_models import PREFIX, classifier_names, create_timm_model, download_timm_weights
from engine.weights import download_imagenet_weights, read_weights_file

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]


class SEBasicBlock(BasicBlock):
    """Two 3x3 convolutions, SE, addition: the block of SE-ResNet 18 and 34."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.se = squeeze_excitation(self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class SEBottleneck(Bottleneck):
    """1x1, 3x3 and 1x1 convolution, SE, addition: the block of SE-ResNet 50, 101 and 152."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.se = squeeze_excitation(self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def squeeze_excitation(channels: int) -> SqueezeExcitation:
    """The eager SE module: (N, channels, H, W) to the same shape, keys ``fc1`` and ``fc2``, with bias.

    The squeezed channels are a sixteenth of `channels`, rounded to a multiple of 8, and 8 at least: timm's rule.
    """
    return SqueezeExcitation(channels, squeeze_channels=max(8, (channels // 16 + 4) // 8 * 8))


class _Architecture(NamedTuple):
    block: type[BasicBlock | Bottleneck]
    layers: list[int]  # blocks of each stage
    groups: int = 1
    width_per_group: int = 64


_PLAIN = {
    "resnet18": _Architecture(BasicBlock, [2, 2, 2, 2]),
    "resnet34": _Architecture(BasicBlock, [3, 4, 6, 3]),
    "resnet50": _Architecture(Bottleneck, [3, 4, 6, 3]),
    "resnet101": _Architecture(Bottleneck, [3, 4, 23, 3]),
    "resnet152": _Architecture(Bottleneck, [3, 8, 36, 3]),
    "resnext50_32x4d": _Architecture(Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x8d": _Architecture(Bottleneck, [3, 4, 23, 3], 32, 8),
    "resnext101_64x4d": _Architecture(Bottleneck, [3, 4, 23, 3], 64, 4),
}
_WITH_SE: dict[type, type[BasicBlock | Bottleneck]] = {BasicBlock: SEBasicBlock, Bottleneck: SEBottleneck}
_ARCHITECTURES = _PLAIN | {f"se{name}": plain._replace(block=_WITH_SE[plain.block]) for name, plain in _PLAIN.items()}

MODEL_NAMES = tuple(_ARCHITECTURES)


class HeadShape(NamedTuple):
    """Of one head over the pooled features: linear, or linear, ReLU, dropout, linear with ``hidden`` units between."""

    classes: int
    hidden: int | None = None
    drop: float = 0.0


@dataclass(frozen=True)
class LoadReport:
    """What a model took from pretrained weights, and which parts kept a fresh initialisation; str() is one line."""

    source: str
    loaded: int
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        fresh = f"; fresh: {', '.join(self.fresh)}" if self.fresh else ""
        return f"loaded {self.loaded} tensors from {self.source}{fresh}"


def create_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    pretrained_path: PathLike | None = None,
    drop: float = 0.0,
    cosine: bool = False,
    heads: Mapping[str, HeadShape] | None = None,
) -> nn.Module:
    """Builds `name`, one of MODEL_NAMES or ``timm:NAME``: (N, 3, H, W) images to (N, num_classes) logits.

    Initialised as in timm: convolutions by Kaiming's normal fan-out rule, the last BatchNorm weight of each residual
    branch zero. With `pretrained` or `pretrained_path`, ``load_pretrained`` follows and its report is logged. Training
    drops each feature before the classifier with probability `drop`; a `cosine` classifier is a
    `engine.classifier.CosineLinear`, which has no ``fc.bias``. Neither changes the initial weights. With `heads` there
    is no classifier: the model gives {name: (N, classes)}, and has ``heads.NAME.*`` beside the keys of the trunk; the
    last layer of each is then a `cosine` one, and `drop` is theirs.

    Raises:
        UserError: unknown name, fewer than one class, or weights that cannot be had or do not fit.
    """
    require_known(name)
    if num_classes < 1:
        raise UserError(f"--num-classes {num_classes}: must be at least 1")
    model: nn.Module
    if name.startswith(PREFIX):
        model = create_timm_model(name.removeprefix(PREFIX), num_classes=num_classes, drop=drop)
        drop = 0.0  # it is timm's now
    else:
        model = ResNet(**_ARCHITECTURES[name]._asdict(), num_classes=num_classes, zero_init_residual=True)
    if heads:
        _add_heads(model, name, heads, cosine=cosine)
    elif cosine or drop > 0:
        _replace_classifier(model, name, drop, cosine=cosine)
    if pretrained or pretrained_path is not None:
        logger.info("%s", load_pretrained(model, name, pretrained_path))
    return model


def require_known(name: str) -> None:
    """Raises UserError where `name` is no model; of timm's models only that there is a name."""
    if name not in _ARCHITECTURES and not (name.startswith(PREFIX) and name != PREFIX):
        raise UserError(f"--model {name}: unknown; choose one of {', '.join(MODEL_NAMES)}, or {PREFIX}NAME")


def _replace_classifier(model: nn.Module, name: str, drop: float, *, cosine: bool) -> None:
    place, *others = classifier_names(model)
    linear = model.get_submodule(place)
    if others or not isinstance(linear, nn.Linear):
        raise UserError(
            f"--loss ldam needs a model that ends in one linear layer, and {name} does not; use another loss"
        )
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, (CosineLinear if cosine else DropoutLinear)(linear, drop))


def _add_heads(model: nn.Module, name: str, heads: Mapping[str, HeadShape], *, cosine: bool) -> None:
    if hasattr(model, "heads"):
        raise UserError(f"heads: {name} has a part of that name already; use another model")
    if isinstance(model, ResNet):
        features = model.fc.in_features
        model.fc = nn.Identity()
    else:
        trunk: Any = model
        features = getattr(trunk, "head_hidden_size", None) or trunk.num_features
        trunk.reset_classifier(0)
    model.heads = nn.ModuleDict({head: _head(features, shape, cosine=cosine) for head, shape in heads.items()})
    # A hook, so that the trunk keeps its class and its keys, whatever library it is of
    model.register_forward_hook(_apply_heads)


def _head(features: int, shape: HeadShape, *, cosine: bool) -> nn.Sequential:
    hidden = [] if shape.hidden is None else [nn.Linear(features, shape.hidden), nn.ReLU()]
    last = nn.Linear(shape.hidden or features, shape.classes)
    return nn.Sequential(*hidden, nn.Dropout(shape.drop), CosineLinear(last, 0.0) if cosine else last)


def _apply_heads(model: nn.Module, args: object, features: Tensor) -> dict[str, Tensor]:
    heads = model.get_submodule("heads")
    return {name: head(features) for name, head in heads.named_children()}


def seresnet18(num_classes: int = 1000, pretrained: bool = False, pretrained_path: PathLike | None = None) -> nn.Module:
    """SE-ResNet-18; arguments and errors of ``create_model``."""
    return create_model("seresnet18", num_classes=num_classes, pretrained=pretrained, pretrained_path=pretrained_path)


def seresnet34(num_classes: int = 1000, pretrained: bool = False, pretrained_path: PathLike | None = None) -> nn.Module:
    """SE-ResNet-34; arguments and errors of ``create_model``."""
    return create_model("seresnet34", num_classes=num_classes, pretrained=pretrained, pretrained_path=pretrained_path)


def seresnet50(num_classes: int = 1000, pretrained: bool = False, pretrained_path: PathLike | None = None) -> nn.Module:
    """SE-ResNet-50; arguments and errors of ``create_model``."""
    return create_model("seresnet50", num_classes=num_classes, pretrained=pretrained, pretrained_path=pretrained_path)


def seresnet101(
    num_classes: int = 1000, pretrained: bool = False, pretrained_path: PathLike | None = None
) -> nn.Module:
    """SE-ResNet-101; arguments and errors of ``create_model``."""
    return create_model("seresnet101", num_classes=num_classes, pretrained=pretrained, pretrained_path=pretrained_path)


def seresnet152(
    num_classes: int = 1000, pretrained: bool = False, pretrained_path: PathLike | None = None
) -> nn.Module:
    """SE-ResNet-152; arguments and errors of ``create_model``."""
    return create_model("seresnet152", num_classes=num_classes, pretrained=pretrained, pretrained_path=pretrained_path)


def seresnext50_32x4d(
    num_classes: int = 1000, pretrained: bool = False, pretrained_path: PathLike | None = None
) -> nn.Module:
    """SE-ResNeXt-50 of 32 groups of 4 channels; arguments and errors of ``create_model``."""
    return create_model(
        "seresnext50_32x4d", num_classes=num_classes, pretrained=pretrained, pretrained_path=pretrained_path
    )


def load_pretrained(model: nn.Module, name: str, path: PathLike | None = None) -> LoadReport:
    """Loads weights from `path` into `model` as ``create_model(name, ...)`` made it.

    Without a `path` it takes torchvision's ImageNet weights, and for ``timm:NAME`` those that timm has for it.

    `path` is a file of torchvision, timm or this project (see ``engine.weights.read_weights_file``). The classifier
    stays fresh where the file has none, one of another number of classes, or a linear one for a cosine. A plain
    ResNet's weights serve its SE-ResNet: the SE gates then start nearly open.

    Raises:
        UserError: the weights cannot be had, or anything else is missing, unexpected or of another shape; `model` is
            then unchanged.
    """
    if path is not None:
        return _load(model, name, read_weights_file(path), str(path))
    if name.startswith(PREFIX):
        return _load(
            model, name, download_timm_weights(name.removeprefix(PREFIX)), f"timm's {name.removeprefix(PREFIX)}"
        )
    plain = name.removeprefix("se")
    return _load(model, name, download_imagenet_weights(plain), f"torchvision's {plain}")


def _load(model: nn.Module, name: str, given: StateDict, source: str) -> LoadReport:
    expected, last = model.state_dict(), (*classifier_names(model), "heads")
    fresh = []

    difference = _other_classifier(given, expected, last[0])
    if difference is not None:
        fresh.append(f"classifier ({difference})")
        expected, given = _trunk(expected, last), _trunk(given, last)

    se_keys = {key for key in expected if ".se." in key}
    without_se = bool(se_keys) and se_keys.isdisjoint(given)
    if without_se:
        fresh.append("SE gates (none in the weights; they start nearly open)")
        expected = {key: tensor for key, tensor in expected.items() if key not in se_keys}

    problem = _mismatch(expected, given)
    if problem:
        raise UserError(f"{source}: does not fit {name} ({problem}); {_way_out(name, given)}")
    # Not strict: the classifier and the SE gates may be left out, and files from before torch 0.4.1 have no
    # num_batches_tracked.
    model.load_state_dict(given, strict=False)
    if without_se:
        _open_se_gates(model)
    return LoadReport(source, len(given), tuple(fresh))


def _open_se_gates(model: nn.Module) -> None:
    # sigmoid(4) = 0.98: the pretrained function is nearly kept, and the sigmoid's slope there, 0.018, still lets
    # the gates learn. With W2 zero every sample starts with the same gate; W2 has a gradient from the first step.
    for key, parameter in model.named_parameters():
        if key.endswith(".se.fc2.weight"):
            nn.init.zeros_(parameter)
        elif key.endswith(".se.fc2.bias"):
            nn.init.constant_(parameter, 4.0)


def _other_classifier(given: StateDict, expected: StateDict, place: str) -> str | None:
    """Why the classifier of the weights is not that of the model; None: it is, as far as this goes."""
    heads, given_heads = (
        {key: tensor.shape for key, tensor in state.items() if key.startswith("heads.")} for state in (expected, given)
    )
    if heads and given_heads != heads:
        return "the weights have other heads, or none"
    classes, given_classes = (_classes(state, place) for state in (expected, given))
    if given_classes != classes:
        return f"{given_classes} classes in the weights, {classes} here"
    bias = f"{place}.bias"
    kind, given_kind = ("linear" if bias in state else "cosine" for state in (expected, given))
    return None if given_kind == kind or not classes else f"{given_kind} in the weights, {kind} here"


def _classes(state: StateDict, place: str) -> int:
    classifier = state.get(f"{place}.weight")
    return 0 if classifier is None or classifier.dim() == 0 else classifier.shape[0]


def _trunk(state: StateDict, last: tuple[str, ...] = ("fc", "heads")) -> StateDict:
    prefixes = tuple(f"{place}." for place in last)
    return {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)}


def _mismatch(expected: StateDict, given: StateDict) -> str:
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected]
    reshaped = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": reshaped}
    return "; ".join(f"{what}: {_first(keys)}" for what, keys in problems.items() if keys)


def _first(keys: list[str], shown: int = 2) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more


def _way_out(name: str, given: StateDict) -> str:
    lookalike = _lookalike(given)
    if lookalike is None or lookalike == name:
        return f"it looks like none of {', '.join(MODEL_NAMES)}: pass another --pretrained-path"
    serves = lookalike if lookalike.startswith("se") else f"{lookalike} or se{lookalike}"
    return f"it looks like {lookalike}: pass --model {serves}, or another --pretrained-path"


def _lookalike(given: StateDict) -> str | None:
    blocks = {match[0] for match in map(re.compile(r"layer\d+\.\d+\.").match, given) if match}
    layers = [sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4)]
    for name, architecture in _ARCHITECTURES.items():
        if architecture.layers != layers:
            continue
        with torch.device("meta"):
            candidate = create_model(name, num_classes=1)
        if not _mismatch(_trunk(candidate.state_dict()), _trunk(given)):
            return name
    return None
