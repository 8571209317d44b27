"""Synchronised BatchNorm: two processes with unequal parts of a batch compute what one process does with the whole."""

from __future__ import annotations

import dataclasses
import datetime
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import create_model
from kernels import fuse_tails
from kernels.se_triton import INTERPRETED
from tests.tail_cases import Tail, assert_tail_as_accurate_as_eager, make_tail, value_and_gradients

PARTS = (3, 2)  # samples of each rank
N = sum(PARTS)
Results = dict[str, Tensor]

SWITCHES: dict[str, dict[str, Any]] = {
    "norm_relu": {"se": False, "residual": None},
    "norm_add_relu": {"se": False},
    "norm_se_add_relu": {},
    "norm_se_add_norm_relu": {"residual": "norm"},
    "norm_se_add_norm_silu": {"residual": "norm", "act": "silu"},
}
DOUBLE = [(backend, switches) for backend in ("cpu", "eager") for switches in SWITCHES]
SINGLE = [(backend, "norm_se_add_norm_relu") for backend in ("cpu", *(["triton"] if INTERPRETED else []))]
FAR = [(backend, "norm_se_add_relu") for backend in ("cpu", "eager")]
# The second rank's batch is empty: it takes part in what is exchanged and gives nothing
ALONE = [("cpu", "norm_se_add_norm_relu"), ("eager", "norm_se_add_norm_relu"), ("cpu", "norm_relu")]


def convert(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def fuse(model: nn.Module) -> nn.Module:
    assert fuse_tails(model) == 9
    return model


ORDERS = {"converted first": (convert, fuse), "fused first": (fuse, convert)}


def whole(switches: str, dtype: torch.dtype = torch.float64, **options: Any) -> Tail:
    return make_tail((N, 10, 5, 3, 4), dtype, **SWITCHES[switches], **options)


def far(switches: str) -> Tail:
    """A mean of 1e4 standard deviations, whose running variance becomes the batch's."""
    tail = whole(switches, torch.float32, shift=1e4)
    return dataclasses.replace(tail, norm=tail.norm._replace(momentum=1.0))


def part(tail: Tail, samples: slice, group: str) -> Tail:
    """What one rank has of it."""
    return dataclasses.replace(
        tail,
        y=tail.y[samples],
        residual=None if tail.residual is None else tail.residual[samples],
        dout=tail.dout[samples],
        norm=tail.norm._replace(group=group),
        residual_norm=None if tail.residual_norm is None else tail.residual_norm._replace(group=group),
    )


def join(ranks: list[Results]) -> Results:
    """Samples side by side, gradients of parameters added, running statistics as they are on each rank alike."""
    joined = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if name in ("out", "dy", "dresidual"):
            joined[name] = torch.cat(parts)
        elif name.startswith("d"):
            joined[name] = torch.stack(parts).sum(0)
        else:
            assert torch.equal(parts[0], parts[1]), f"{name} differs between the ranks"
            joined[name] = parts[0]
    return joined


def network() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("seresnet18", num_classes=3).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)  # some begin at zero, which would hide their branches
    return model.to(memory_format=torch.channels_last)


def step(model: nn.Module, samples: slice, ranks: int) -> Results:
    """Logits, gradients and buffers; DistributedDataParallel takes the mean of the ranks' gradients."""
    images = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = model(images[samples].contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits, (torch.arange(N) % 3)[samples], reduction="sum") * ranks / N
    loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    buffers = {name.removeprefix("module."): buffer for name, buffer in model.named_buffers()}
    return {"logits": logits.detach(), **gradients, **buffers}


def distributed_step(samples: slice, order: str) -> Results:
    model = nn.parallel.DistributedDataParallel(network())
    # inside, and not before: on a CPU DistributedDataParallel refuses SyncBatchNorm, which PyTorch has no kernel for
    for change in ORDERS[order]:
        change(model.module)
    return step(model, samples, ranks=len(PARTS))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", len(PARTS)),
        rank=rank,
        world_size=len(PARTS),
        timeout=datetime.timedelta(seconds=60),
    )
    samples = slice(sum(PARTS[:rank]), sum(PARTS[: rank + 1]))
    group = dist.group.WORLD.group_name
    results = {f"network {order}": _attempt(lambda order=order: distributed_step(samples, order)) for order in ORDERS}
    for kind, cases in (("double", DOUBLE), ("single", SINGLE), ("far", FAR), ("alone", ALONE)):
        for backend, switches in cases:
            everything = slice(0, N if rank == 0 else 0)
            tail = part(tails(kind, switches), everything if kind == "alone" else samples, group)
            results[f"{kind} {backend} {switches}"] = _attempt(lambda t=tail, b=backend: value_and_gradients(t, b))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def tails(kind: str, switches: str) -> Tail:
    return far(switches) if kind == "far" else whole(switches, torch.float32 if kind == "single" else torch.float64)


def _attempt(run: Callable[[], Results]) -> Results | str:
    try:
        return run()
    except Exception:  # told by the test whose case it is
        return traceback.format_exc()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Callable[[str], list[Results]]:
    """What each rank made of a case; all cases in one start, because two processes take seconds to come up."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), len(PARTS))
    results = [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]

    def of(case: str) -> list[Results]:
        for rank in results:
            assert not isinstance(rank[case], str), rank[case]
        return [rank[case] for rank in results]

    return of


@pytest.mark.parametrize(("backend", "switches"), DOUBLE)
def test_two_ranks_are_one_process_on_the_joined_batch(ranks, backend, switches):
    got = join(ranks(f"double {backend} {switches}"))
    expected = value_and_gradients(whole(switches), "eager")
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("backend", "switches"), ALONE)
def test_a_rank_with_an_empty_batch_changes_nothing(ranks, backend, switches):
    got = join(ranks(f"alone {backend} {switches}"))
    for name, t in value_and_gradients(whole(switches), "eager").items():
        torch.testing.assert_close(got[name], t, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("backend", "switches"), SINGLE)
def test_two_ranks_are_as_accurate_as_one_eager_process(ranks, backend, switches):
    assert_tail_as_accurate_as_eager(join(ranks(f"single {backend} {switches}")), whole(switches, torch.float32))


@pytest.mark.parametrize(("backend", "switches"), FAR)
def test_a_mean_of_1e4_standard_deviations_is_merged_as_well_as_one_process_takes_it(ranks, backend, switches):
    got = join(ranks(f"far {backend} {switches}"))
    tail = far(switches)
    exact = tail.y.double().var((0, 2, 3)).float()
    torch.testing.assert_close(got["running_var"], exact, rtol=1e-5, atol=0)
    eager = value_and_gradients(tail, "eager")
    for name, exact in value_and_gradients(tail.to(torch.float64), "eager").items():
        error, eagers = ((t[name] - exact).abs().max() for t in (got, eager))
        assert error <= 2 * eagers + 6e-8 * exact.abs().max(), f"{name}: {error}, eager {eagers}"


@pytest.mark.parametrize("order", ORDERS)
def test_a_fused_network_in_distributed_data_parallel_is_one_process_on_the_joined_batch(ranks, order):
    first, second = ranks(f"network {order}")
    expected = step(network(), slice(None), ranks=1)
    assert first.keys() == expected.keys()
    for name, t in expected.items():
        got = torch.cat((first[name], second[name])) if name == "logits" else first[name]
        torch.testing.assert_close(got, t, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert name == "logits" or torch.equal(first[name], second[name]), f"{name} differs between the ranks"
