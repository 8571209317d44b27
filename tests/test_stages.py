"""Freezing, gradual unfreezing and the decay of the learning rate by stage, on eager and fused networks."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import ResNet

from engine.command_line import parse_args
from engine.config import Config
from engine.device import Precision
from engine.ema import ModelEma
from engine.errors import UserError
from engine.fusion import fuse
from engine.models import SEBottleneck, create_model
from engine.optim import make_optimizer, make_schedule
from engine.stages import frozen_at_random, make_freezing, stages
from engine.step import Training
from engine.train import train_epoch
from tests.test_train_step import FLOAT32, Batches, random_batches

STEM = ["conv1", "bn1"]


def network(*, fused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(SEBottleneck, [1, 1, 2, 1], num_classes=3, width_per_group=4).double()
    for module in model.modules():  # every branch alive, and statistics that are not a batch's
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, 0, 0.1)
    if fused:
        fuse(model, Config(model="seresnet18"))
    return model.to(memory_format=torch.channels_last)


def batches(count: int) -> Batches:
    return Batches([(images.double(), labels) for images, labels in random_batches(count)])


def training(model: nn.Module, config: Config) -> Training:
    freezing = make_freezing(model, config)
    optimizer = make_optimizer(model, config)
    ema = ModelEma(model, 0.5) if config.model_ema else None
    schedule = make_schedule(optimizer, config, 2)
    return Training(model, optimizer, schedule, Precision.scaler(FLOAT32), ema, freezing)


def train_epochs(run: Training, config: Config, epochs: range) -> dict[str, torch.Tensor]:
    for epoch in epochs:
        train_epoch(run, nn.CrossEntropyLoss(), batches(2), epoch, config, FLOAT32)
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The layers, at the top level, of which anything is another than before, counts and statistics too."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


OPTIONS = {"epochs": 5, "warmup_epochs": 0, "opt": "sgd", "lr": 0.05, "sched": "constant", "amp": False}


def test_frozen_layers_stand_still_and_a_fused_network_trains_as_the_eager_one():
    config = Config(**OPTIONS, freeze_until="layer2", freeze=("layer3.0",))
    eager, fused = (training(network(fused=fused), config) for fused in (False, True))
    before = copy.deepcopy(eager.model.state_dict())
    expected, got = (train_epochs(run, config, range(2)) for run in (eager, fused))
    assert changed(before, expected) == {"layer3", "layer4", "fc"}
    assert all(torch.equal(before[name], expected[name]) for name in before if name.startswith("layer3.0."))
    torch.testing.assert_close(got, expected)
    held = {id(p) for group in eager.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in eager.model.parameters() if p.requires_grad}


def test_stages_are_let_go_one_after_the_other_and_a_resumed_run_goes_on_alike():
    config = Config(**OPTIONS, freeze_until="layer4", unfreeze_epochs=2, model_ema=True)
    run = training(network(fused=True), config)
    states, moved = [copy.deepcopy(run.model.state_dict())], []
    saved = {}
    for epoch in range(5):
        states.append(train_epochs(run, config, range(epoch, epoch + 1)))
        moved.append(changed(*states[-2:]))
        if epoch == 2:
            saved = copy.deepcopy(run.state_dict())
    assert moved == [{"fc"}, {"fc"}, {"fc", "layer4"}, {"fc", "layer4"}, {"fc", "layer4", "layer3"}]

    resumed = training(network(fused=True), config)
    resumed.load_state_dict(saved)
    assert all(torch.equal(states[-1][k], t) for k, t in train_epochs(resumed, config, range(3, 5)).items())
    assert all(torch.equal(run.scored.state_dict()[k], t) for k, t in resumed.scored.state_dict().items())
    assert run.freezing.names(100) == set()


def test_the_learning_rate_falls_from_the_head_to_the_stem():
    model = network()
    config = Config(**OPTIONS | {"lr": 1.0}, layer_decay=0.5)
    optimizer = make_optimizer(model, config)
    name_of = {id(p): name for name, p in model.named_parameters()}
    rates = {name_of[id(p)].split(".")[0]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"fc": 1.0, "layer4": 0.5, "layer3": 0.25, "layer2": 0.125, "layer1": 0.0625}
    assert rates == expected | dict.fromkeys(STEM, 0.03125)
    assert make_schedule(optimizer, config, 2).get_last_lr()[0] == 1.0  # the one that is reported
    decayed = {name_of[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {name for name, p in model.named_parameters() if p.dim() > 1}


def test_stages_of_timms_models_are_timms():
    with torch.device("meta"):
        ours, theirs = (stages(make("seresnet18", num_classes=3)) for make in (create_model, timm.create_model))
        blocks = stages(timm.create_model("efficientnet_b0", num_classes=3))
    assert list(map(set, ours)) == list(map(set, theirs))
    assert [len({name.split(".")[0] for name in stage}) for stage in ours] == [2, 1, 1, 1, 1, 1]
    assert blocks[0][0].startswith("conv_stem.")
    assert blocks[1][0].startswith("blocks.0.")
    assert blocks[-1] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"freeze_until": "layer9"}, "--freeze-until layer9: the model has no such layer; it has conv1, bn1, layer1"),
        ({"freeze": ("layer",)}, "--freeze layer: the model has no such layer"),
        ({"freeze_until": "fc"}, "leave nothing to train"),
    ),
)
def test_what_cannot_be_frozen_is_said(options, message):
    with pytest.raises(UserError, match=message):
        make_freezing(network(), Config(**options))


def test_flags_of_freezing():
    config, _ = parse_args(["--freeze", "conv1", "bn1", "--unfreeze-epochs", "2", "--layer-decay", "0.7"])
    assert (config.freeze, config.unfreeze_epochs, config.layer_decay) == (("conv1", "bn1"), 2, 0.7)
    assert Config.from_mapping({"freeze": ["conv1", "bn1"]}, "a recipe").freeze == ("conv1", "bn1")
    assert "--pretrained" in str(frozen_at_random(config))
    assert frozen_at_random(Config(freeze_until="layer2", pretrained=True)) is None
    for values, message in (({"freeze": "conv1"}, "list of names"), ({"unfreeze_epochs": 2}, "nothing is frozen")):
        with pytest.raises(UserError, match=message):
            Config.from_mapping(values, "a recipe")
