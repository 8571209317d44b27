"""One epoch of the trainer on a hand-made loader, and what surrounds it: optimizer, schedule, configuration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.command_line import parse_args, read_recipe
from engine.config import Config
from engine.device import Precision, pick_device
from engine.ema import ModelEma
from engine.errors import UserError
from engine.losses import make_criterion
from engine.metrics import classification_metrics
from engine.optim import make_optimizer, make_schedule
from engine.step import Training
from engine.train import _epoch_line, _is_better, _scalars, train_epoch

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, amp=False, amp_dtype="bfloat16")


class Batches:
    """A loader of given batches."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        return iter(self.batches[start:])


def make_training(config: Config, steps_per_epoch: int) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    optimizer = make_optimizer(model, config)
    ema = ModelEma(model, config.model_ema_decay) if config.model_ema else None
    return Training(model, optimizer, make_schedule(optimizer, config, steps_per_epoch), FLOAT32.scaler(), ema)


def random_batches(count: int, size: int = 4) -> list:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def trained_weights(batches, scale: float = 1.0, **options) -> torch.Tensor:
    config = Config(epochs=1, warmup_epochs=0, opt="sgd", sched="constant", lr=0.1, **options)
    training = make_training(config, math.ceil(len(batches) / config.grad_accum_steps))
    training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    train_epoch(training, nn.CrossEntropyLoss(), Batches(batches), 0, config, FLOAT32)
    return nn.utils.parameters_to_vector(training.model.parameters()).detach()


def test_accumulated_gradients_are_those_of_the_joined_batch():
    """Five batches in groups of two: the last group holds one, and counts as a whole batch."""
    batches = random_batches(5)
    pairs = [tuple(map(torch.cat, zip(*batches[i : i + 2], strict=True))) for i in (0, 2)]
    torch.testing.assert_close(trained_weights(batches, grad_accum_steps=2), trained_weights([*pairs, batches[4]]))


def test_clipping_bounds_the_gradient():
    batches = random_batches(1)
    start = nn.utils.parameters_to_vector(make_training(Config(), 1).model.parameters()).detach()
    for scale in (1.0, 2.0**12):  # of float16's gradients, which is taken out before
        moved = (trained_weights(batches, scale, clip_grad=1e-3, momentum=0, weight_decay=0) - start).norm()
        assert moved == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert (trained_weights(batches, momentum=0, weight_decay=0) - start).norm() > 10 * moved


class HostReads(TorchDispatchMode):
    """Counts the operators by which the host reads a tensor's value, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    (
        {"opt": "sgd"},
        {"opt": "adamw", "model_ema": True, "l2_loss": 0.1},
        {"loss": "focal", "class_weights": "balanced"},
        {"loss": "ldam", "class_weights": "balanced"},
        {"loss": "logit-adjustment", "class_weights": "balanced"},
    ),
    ids=lambda options: options.get("loss", options.get("opt")),
)
def test_the_host_reads_one_value_an_epoch(options):
    config = Config(epochs=1, warmup_epochs=0, clip_grad=1.0, **options)
    training = make_training(config, 6)
    criterion = make_criterion(config, np.array([3, 2, 1]), CPU)(0)
    with HostReads() as reads:
        train_epoch(training, criterion, Batches(random_batches(6)), 0, config, FLOAT32)
    assert reads.count == 1  # the mean loss, when the epoch is over


@pytest.mark.parametrize("scale", (1.0, 2.0**12))
def test_the_regularised_loss_steps_as_sgd_with_that_weight_decay_on_everything(scale):
    """Norms and biases too, with accumulated and with scaled gradients; what is reported is the loss with the sum."""
    batches, criterion = random_batches(5), nn.CrossEntropyLoss()
    common = {"epochs": 1, "warmup_epochs": 0, "opt": "momentum", "sched": "constant", "grad_accum_steps": 2}
    decayed = Config(**common, lr=0.1, weight_decay=0.3, decay_all=True)
    regularised = Config(**common, lr=0.1, weight_decay=0.0, l2_loss=0.3)
    expected, got = make_training(decayed, 3), make_training(regularised, 3)
    got.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for training, config in ((expected, decayed), (got, regularised)):
        train_epoch(training, criterion, Batches(batches), 0, config, FLOAT32)
    for a, b in zip(got.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    still = Config(**common, lr=1e-30, weight_decay=0.0, l2_loss=0.3)
    plain = Config(**common, lr=1e-30, weight_decay=0.0)
    with_sum, without = (
        train_epoch(make_training(config, 3), criterion, Batches(batches), 0, config, FLOAT32)["train_loss"]
        for config in (still, plain)
    )
    squares = sum((p.detach() ** 2).sum().item() for p in make_training(plain, 3).model.parameters())
    assert with_sum - without == pytest.approx(0.15 * squares, rel=1e-5)


def test_schedule_warms_up_linearly_and_falls_as_a_cosine():
    config = Config(epochs=10, warmup_epochs=2, lr=0.4, min_lr=0.04, opt="sgd")
    training = make_training(config, 5)
    rates = []
    for _ in range(50):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.optimizer.step()
        training.schedule.step()
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx((0.4 + 0.04) / 2)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_biases_and_norms_are_not_decayed_unless_all_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, others = make_optimizer(model, Config(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert [p.dim() for p in decayed["params"]] == [4]
    assert len(others["params"]) == 3
    everything = make_optimizer(model, Config(weight_decay=0.3, decay_all=True)).param_groups
    assert [group["weight_decay"] for group in everything] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("opt", "reference"),
    (
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)),
    ),
    ids=("adam", "adamw", "momentum", "sgd"),
)
def test_with_everything_decayed_an_optimizer_is_torchs_own(opt, reference):
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = Config(opt=opt, lr=0.01, weight_decay=0.1, decay_all=True)
    for model, optimizer in zip(
        models, (make_optimizer(models[0], config), reference(models[1].parameters())), strict=True
    ):
        for i in range(4):
            optimizer.zero_grad()
            (model(torch.full((1, 3), float(i))) ** 2).sum().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_apex_is_asked_for_by_name_and_missed_by_name():
    try:
        import apex.optimizers  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="NVIDIA Apex"):
            make_optimizer(nn.Linear(2, 2), Config(opt="fusedsgd"))
    else:
        assert type(make_optimizer(nn.Linear(2, 2), Config(opt="fusedsgd"))).__module__.startswith("apex")


def test_command_line_overrides_recipe_overrides_defaults(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lr: 1e-2\nepochs: 7\nmodel: seresnet34\n")
    config, resume = parse_args(["--recipe", str(recipe), "--epochs", "9", "--no-channels-last"])
    assert (config.lr, config.epochs, config.model, config.channels_last) == (0.01, 9, "seresnet34", False)
    assert config.batch_size == Config().batch_size
    assert resume is None


def test_class_weights_are_a_name_or_numbers(tmp_path):
    def weights(*flags: str) -> object:
        return parse_args(["--data-dir", str(tmp_path), *flags])[0].class_weights

    assert weights() == "none"
    assert weights("--class-weights", "effective", "--epochs", "9") == "effective"
    assert weights("--class-weights", "1", "2.5") == (1.0, 2.5)
    recipe = tmp_path / "mine.yaml"
    for text, expected in (("balanced", "balanced"), ("[1, 2.5]", (1.0, 2.5))):
        recipe.write_text(f"class_weights: {text}\n")
        assert weights("--recipe", str(recipe)) == expected
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(Config(class_weights=(1.0, 2.5)).as_mapping()))
    assert parse_args(["--resume", str(tmp_path), "--class-weights", "1", "2.5"])[0].class_weights == (1.0, 2.5)


def test_what_is_fused_may_change_on_resume(tmp_path):
    """And a run from before there was a scope takes the widest."""
    before = Config(fused_se=True).as_mapping()
    del before["fused_scope"]
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(before))
    resume = ["--resume", str(tmp_path)]
    assert parse_args(resume)[0].fused_scope == "tail"
    assert parse_args([*resume, "--fused-scope", "block"])[0].fused_scope == "block"
    assert not parse_args([*resume, "--no-fused-se"])[0].fused_se


def test_digits_recipe_is_the_default_without_data_only(tmp_path):
    assert parse_args([])[0].img_size == read_recipe("digits")["img_size"] == 32
    assert parse_args(["--data-dir", str(tmp_path)])[0].img_size == 224


def test_precision_follows_the_hardware_unless_told():
    assert Precision(CPU, True, "bfloat16").amp
    assert not Precision(CPU, False, "bfloat16").amp
    assert Precision(CPU, True, "float16").scaler().is_enabled()
    assert not Precision(CPU, True, "bfloat16").scaler().is_enabled()
    native = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    assert Precision(CPU, None, "bfloat16").amp == any(native.get(name) for name in ("amx_bf16", "avx512_bf16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        pick_device("cuda")


def test_a_metric_that_validation_leaves_undefined_is_never_the_best_and_keeps_its_column():
    """One class only among the validation images: no area under the curve."""

    def row(labels: list[int]) -> dict:
        metrics = classification_metrics(torch.eye(2)[labels], torch.tensor(labels), ("a", "b"))
        return {"epoch": 0, "train_loss": 1.0, "images_per_second": 1.0, "data_wait": 0.0} | {
            f"val_{name}": value for name, value in _scalars(metrics).items()
        }

    undefined, defined = row([0, 0]), row([0, 1])
    assert undefined.keys() == defined.keys()
    config = Config(eval_metric="auroc_macro_ovr")
    assert _is_better(defined, undefined, config)
    assert not _is_better(undefined, defined, config)
    assert "auroc_macro_ovr" in _epoch_line(defined, config, True)
    assert "auroc_macro_ovr" not in _epoch_line(undefined, config, True)
