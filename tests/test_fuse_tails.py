"""`fuse_tails` on timm's, torchvision's and this project's ResNets: function, gradients, statistics and keys stay."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import nn

from engine.models import SEBasicBlock, SEBottleneck, create_model
from kernels import FusedSE, fuse_se, fuse_tails, se_modules, tail_modules, unfuse_se, unfuse_tails
from kernels.tails import FusedBlock, FusedNormAct
from tests.accuracy import assert_network_as_accurate_as_eager
from tests.backends import watch
from tests.tail_models import (
    PLACES,
    SMALL,
    TAILS,
    assert_alike,
    assert_training_agrees,
    drawn,
    images,
    logits_gradients_and_buffers,
    norms,
    saved_and_loaded,
    stem_and_blocks,
)

CLASSES = 8


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    places: int  # blocks, and pairs of a BatchNorm and an activation
    tails: int  # that run in a forward pass


CASES = {
    "timm resnet18": Case(lambda: timm.create_model("resnet18", num_classes=CLASSES), 9, 17),
    "timm resnet50": Case(lambda: timm.create_model("resnet50", num_classes=CLASSES), 17, 49),
    "timm seresnet50": Case(lambda: timm.create_model("seresnet50", num_classes=CLASSES), 17, 49),
    "timm resnext50_32x4d": Case(lambda: timm.create_model("resnext50_32x4d", num_classes=CLASSES), 17, 49),
    "timm seresnext50_32x4d": Case(lambda: timm.create_model("seresnext50_32x4d", num_classes=CLASSES), 17, 49),
    "timm resnet50d": Case(lambda: timm.create_model("resnet50d", num_classes=CLASSES), 19, 51),
    "torchvision resnet50": Case(lambda: torchvision.models.resnet50(num_classes=CLASSES), 17, 49),
    "seresnet18": Case(lambda: create_model("seresnet18", num_classes=CLASSES), 9, 17),
    "seresnet50": Case(lambda: create_model("seresnet50", num_classes=CLASSES), 17, 49),
}


def operators(tails: int, *, with_pool: bool = True) -> Counter[str]:
    """What runs in a step: in a ResNet the stem's tail has its pool in it."""
    names = ["tail"] * (tails - with_pool) + ["pool"] * with_pool
    return Counter(f"{name}_{direction}:cpu" for name in names for direction in ("fwd", "bwd"))


def tensors(model: nn.Module) -> Iterator[tuple[str, int]]:
    yield from ((name, id(p)) for name, p in model.named_parameters())
    yield from ((name, id(b)) for name, b in model.named_buffers())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_gradients_and_running_statistics(case, monkeypatch):
    torch.manual_seed(0)
    model = drawn(case.make()).double()
    before, modules, keys = list(tensors(model)), list(model.modules()), list(model.state_dict())
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_tails(model, backend="cpu") == case.places
    assert list(tensors(model)) == before
    assert list(model.state_dict()) == keys
    assert list(tail_modules(model).values()) == ["fused"] * case.places

    ran = watch(monkeypatch)
    x = images(2, 3, 64, 64)
    assert_alike(logits_gradients_and_buffers(model, x), logits_gradients_and_buffers(twin, x))
    assert Counter(ran) == operators(case.tails)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-12)

    assert unfuse_tails(model) == case.places
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert list(tensors(model)) == before
    assert not any(module.training for module in model.modules())


@pytest.fixture
def model() -> nn.Module:
    return stem_and_blocks().double()


@pytest.fixture
def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


@pytest.mark.parametrize("block", (SEBasicBlock, SEBottleneck))
def test_an_optimizer_made_before_goes_on_through_the_swap_and_back(block):
    model = stem_and_blocks(block).double()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for swap in (lambda m: fuse_tails(m, backend="cpu"), lambda m: 0, unfuse_tails):
        assert swap(model) in (0, PLACES)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            logits_gradients_and_buffers(m, images(*SMALL))
            optimizer.step()
    assert not any(isinstance(m, (FusedBlock, FusedNormAct)) for m in model.modules())
    assert_alike(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("copied", (copy.deepcopy, saved_and_loaded))
def test_a_copy_is_fused_and_stands_alone(model, twin, copied):
    fuse_tails(model, backend="cpu")
    other = copied(model)
    places = [{t.data_ptr() for t in m.state_dict().values()} for m in (other, model)]
    assert places[0].isdisjoint(places[1])
    assert list(other.state_dict()) == list(model.state_dict())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert_training_agrees(other, twin)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert unfuse_tails(other) == PLACES
    assert_alike(other.state_dict(), twin.state_dict())
    assert_training_agrees(other, twin, steps=1)


def test_casts_and_state_dicts_pass_through(model, twin):
    fuse_tails(model, backend="cpu")
    model.float().double()
    model.load_state_dict(copy.deepcopy(twin).state_dict(), assign=True)
    assert_training_agrees(model, twin, steps=1)
    old = {name: t for name, t in twin.state_dict().items() if not name.endswith("num_batches_tracked")}
    model.load_state_dict(old)  # without a version, as files from before num_batches_tracked
    with torch.no_grad():
        torch.testing.assert_close(model(images(*SMALL)), twin(images(*SMALL)))
    model.to("meta")
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu").load_state_dict(twin.state_dict())
    assert_training_agrees(model, twin, steps=1)


@pytest.mark.parametrize(
    "make",
    (lambda m: timm.utils.ModelEmaV3(m, decay=0.5), lambda m: torch.optim.swa_utils.AveragedModel(m, use_buffers=True)),
    ids=("timm", "torch"),
)
def test_moving_averages(model, twin, make):
    fuse_tails(model, backend="cpu")
    averages = [make(m) for m in (model, twin)]
    for m, average in zip((model, twin), averages, strict=True):
        for _ in range(2):
            logits_gradients_and_buffers(m, images(*SMALL))
            with torch.no_grad():
                for p in m.parameters():
                    p.sub_(0.1 * p.grad)
            (average.update if hasattr(average, "update") else average.update_parameters)(m)
    assert_alike(averages[0].state_dict(), averages[1].state_dict())
    assert_alike(
        *(logits_gradients_and_buffers(average.module.requires_grad_(), images(*SMALL)) for average in averages)
    )


def test_statistics_of_an_average_are_taken_anew(model, twin):
    fuse_tails(model, backend="cpu")
    for m in (model, twin):
        torch.optim.swa_utils.update_bn([images(*SMALL), 2 * images(*SMALL)], m)
    assert_alike(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(model, twin, one_process):
    fuse_tails(model, backend="cpu")
    assert_training_agrees(*(nn.parallel.DistributedDataParallel(m) for m in (model, twin)))


def test_compiled_without_a_graph_break(model, twin):
    fuse_tails(model, backend="cpu")
    x = images(*SMALL)
    for change in (nn.Module.train, nn.Module.eval):
        compiled = torch.compile(change(model), fullgraph=True, backend="aot_eager")
        assert_alike(
            {name.removeprefix("_orig_mod."): t for name, t in logits_gradients_and_buffers(compiled, x).items()},
            logits_gradients_and_buffers(change(twin), x),
        )
        torch.compiler.reset()


def test_exported(model):
    fuse_tails(model, backend="cpu")
    x = images(*SMALL)
    exported = torch.export.export(model.eval(), (x,))
    assert exported.state_dict.keys() == model.state_dict().keys()
    torch.testing.assert_close(exported.module()(x), model(x))


def test_hooks_on_a_block_and_on_its_convolutions_keep_firing(model, twin):
    seen: dict[nn.Module, list[torch.Tensor]] = {model: [], twin: []}
    handles = []
    for m in (model, twin):
        for target in (module for block in m[3] for module in (block, block.conv2)):
            handles += [
                target.register_forward_pre_hook(lambda module, args, log=seen[m]: log.append(args[0].detach())),
                target.register_forward_hook(lambda module, args, out, log=seen[m]: log.append(out.detach())),
                target.register_full_backward_hook(lambda module, given, got, log=seen[m]: log.append(got[0])),
            ]
    assert fuse_tails(model, backend="cpu") == PLACES
    assert_training_agrees(model, twin, steps=1)
    assert len(seen[model]) == 12
    torch.testing.assert_close(seen[model], seen[twin])
    late: list[str] = []
    handles.append(model[3][0].register_forward_hook(lambda *args: late.append("ran")))
    model(images(*SMALL))
    assert unfuse_tails(model) == PLACES
    model(images(*SMALL))
    assert len(late) == 2
    assert len(seen[model]) == 12 + 16
    for handle in handles:
        handle.remove()
    model(images(*SMALL))
    assert (len(late), len(seen[model])) == (2, 12 + 16)


def test_se_modules_fused_before_are_taken_over(model, twin, monkeypatch):
    assert fuse_se(model, backend="cpu") == 2
    assert fuse_tails(model, backend="cpu") == PLACES
    ran = watch(monkeypatch)
    assert_training_agrees(model, twin, steps=1)
    assert ran == ["tail_fwd:cpu"] * TAILS + ["tail_bwd:cpu"] * TAILS
    assert unfuse_se(model) == 2
    assert_training_agrees(model, twin, steps=1)
    assert unfuse_tails(model) == PLACES
    assert not any(isinstance(m, FusedSE) for m in model.modules())
    assert_training_agrees(model, twin, steps=1)


def test_fuse_se_afterwards_has_nothing_to_do_inside(model):
    fuse_tails(model, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_se(model) == fuse_tails(model) == 0
    assert se_modules(model) == {"3.0.se": "fused", "3.1.se": "fused"}


AUTOCAST = {
    # a deep stem, and an average pool in the downsample branch
    "timm resnet10t": Case(lambda: timm.create_model("resnet10t", num_classes=CLASSES), 7, 11),
    "with SE": Case(stem_and_blocks, PLACES, TAILS),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", AUTOCAST.values(), ids=AUTOCAST.keys())
def test_autocast_leaves_no_tail_to_the_eager_modules(case, dtype, monkeypatch):
    torch.manual_seed(0)
    model = drawn(case.make())
    x = images(4, 3, 48, 48, dtype=dtype)
    exact = logits_gradients_and_buffers(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = logits_gradients_and_buffers(copy.deepcopy(model), x)
        assert fuse_tails(model, backend="cpu") == case.places
        ran = watch(monkeypatch)
        actual = logits_gradients_and_buffers(model, x)
    assert Counter(ran) == operators(case.tails, with_pool=hasattr(model, "maxpool"))
    for kind in (".grad", "running", "logits"):
        of_kind = [{name: t for name, t in got.items() if kind in name} for got in (actual, eager, exact)]
        assert_network_as_accurate_as_eager(*of_kind)


def test_a_block_at_several_places_stays_one_and_counts_once():
    block = SEBasicBlock(8, 8)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(nn.Identity(), block)})
    assert fuse_tails(model) == 1
    assert isinstance(model["a"], FusedBlock)
    assert model["a"] is model["b"][1]
    assert unfuse_tails(model) == 1
    assert model["a"] is model["b"][1] is block


def test_the_root_has_no_place_to_be_swapped_at():
    with pytest.raises(ValueError, match=r"nn\.Sequential\(model\)"):
        fuse_tails(SEBasicBlock(8, 8))
    wrapped = nn.Sequential(SEBasicBlock(8, 8))
    assert fuse_tails(wrapped) == 1
    with pytest.raises(ValueError, match=r"model\.unfused\(\)"):
        unfuse_tails(wrapped[0])
    with pytest.raises(ValueError, match="backend='gpu'"):
        fuse_tails(wrapped, backend="gpu")


def test_the_model_is_not_touched_while_it_is_examined(model):
    model[3][1].conv1.register_forward_pre_hook(lambda *args: pytest.fail("a hook of the model ran"))
    model[3][0].bn1.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.inference_mode():
        assert tail_modules(model) == {"3.0": "ok", "3.1": "ok", "1": "ok"}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in norms(model)].count(False) == 1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_on_the_meta_device_is_fused(model):
    assert fuse_tails(model.to("meta")) == PLACES


def test_the_identity_at_the_activations_place_must_be_there_on_the_way_back(model):
    fuse_tails(model)
    model[2] = nn.Dropout()
    with pytest.raises(ValueError, match=r"1 is a fused BatchNorm and activation, and the nn\.Identity after it"):
        unfuse_tails(model)
