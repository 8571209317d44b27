"""What is the Triton tail's own: its launches, its bits, its cuts of the activations, the accuracy at their seams."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kernels import residual_tail, se_triton, tail_triton
from kernels.norms import FixedNorm
from kernels.residual_tail import How, Saved
from kernels.statistics import INVSTD, MEAN
from tests.backends import DEVICES
from tests.se_cases import LAYOUTS, far_apart
from tests.tail_cases import check_parity, make_tail, value_and_gradients
from tests.tail_formula import pack

DEVICE = DEVICES["triton"]
BATCH_NORM = FixedNorm(None, None, None, None, 1e-5, "")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels, in the order in which they are launched."""
    names: list[str] = []
    kind = InterpretedFunction if se_triton.INTERPRETED else JITFunction
    launch = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: names.append(kernel.__name__) or launch(kernel, grid))
    return names


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    (
        ({"se": False, "residual": None}, 3, 3),
        ({"se": False}, 3, 3),
        ({}, 5, 7),
        ({"se": False, "residual": "norm"}, 5, 4),
        ({"residual": "norm"}, 7, 8),
        ({"se": False, "training": False}, 1, 3),
        ({"training": False}, 4, 7),
    ),
    ids=str,
)
def test_number_of_launches(options, forward, backward, launched):
    tail = make_tail((2, 16, 4, 4, 4), torch.float32, "triton", **options).leaves()
    out = residual_tail(tail.y, tail.norm, **tail.options(), backend="triton")
    assert len(launched) == forward, launched
    torch.autograd.grad(out, list(tail.differentiable().values()), tail.dout)
    assert len(launched) == forward + backward, launched


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ((64, 8, 8), (68, 4, 9), (37, 5, 9), (3, 1, 7), (72, 1, 1)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_bit_says_whether_a_gradient_passes(dtype, size, layout):
    generator = torch.Generator().manual_seed(0)
    y, residual = (
        torch.randn(2, *size, generator=generator).to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    residual[0, 0, 0, 0] = float("nan")  # passes, as in torch.relu
    out, mask, *_ = tail_triton.tail_fwd(y, BATCH_NORM, None, residual, None, "relu")
    assert torch.equal(mask, pack(~(out <= 0), y))
    assert out.isnan().sum() == 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_without_a_residual_the_gradient_passes_where_out_says_so(dtype):
    """Also where a positive value rounds to 0."""
    least = 2.0**-24 if dtype == torch.float16 else 1.0  # of float16 above 0
    y = torch.linspace(-2, 2, 64, device=DEVICE, dtype=dtype).view(1, 64, 1, 1).repeat(2, 1, 3, 3)
    y[1, 5, 1, 1] = float("nan")
    zeros, ones = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)
    norm = FixedNorm(least * ones, None, zeros, ones, 0.0, "")
    out, mask, stats, stats2, *per_sample = tail_triton.tail_fwd(y, norm, None, None, None, "relu")
    assert ((y > 0) & (out == 0)).any() == (dtype == torch.float16)
    saved = Saved(y, None, None, None, mask, stats, stats2, *per_sample)
    how = How(False, False, False, "", "", "relu", "relu", "sigmoid")
    wanted = [False, False, False, True, *[False] * 6]
    dbias = tail_triton.tail_bwd(torch.ones_like(y), saved, how, wanted)[3]
    assert torch.equal(dbias, (~(out <= 0)).sum((0, 2, 3)).to(dbias))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks", ({"PROGRAMS": 10**6, "MERGED": 10**6, "STRETCHES": 4}, {"PROGRAMS": 1}), ids=str)
def test_any_cut_of_the_batch(blocks, layout, monkeypatch):
    """Many stretches of a sample, the last one shorter, in many blocks of the kernels that merge them; and one."""
    for name, value in blocks.items():
        monkeypatch.setattr(tail_triton, name, value)
    tail = make_tail((3, 20, 25, 23, 5), torch.float32, "triton", layout=layout, residual="norm")
    check_parity(tail, "triton")
    stretches = tail_triton._moments(tail.y).m2.shape[1]
    assert (stretches > 2) == (blocks["PROGRAMS"] > 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_where_sums_begin(layout):
    """What sums are taken about is a mean of many values: that the first one lies far away costs nothing."""
    y = torch.randn(2, 24, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y[:, :, 0, 0] = 3e3
    y = y.contiguous(memory_format=LAYOUTS[layout])
    stats = tail_triton.tail_fwd(y, BATCH_NORM, None, None, None, "identity")[2]
    wide = y.double()
    torch.testing.assert_close(stats[MEAN], wide.mean((0, 2, 3)).float(), rtol=3e-6, atol=1e-6)
    invstd = (wide.var((0, 2, 3), correction=0) + 1e-5).rsqrt().float()
    torch.testing.assert_close(stats[INVSTD], invstd, rtol=1e-6, atol=0)


@pytest.mark.parametrize("which", ("y", "residual", "dout"))
def test_samples_more_than_2_31_elements_apart(which):
    tail = make_tail((2, 16, 3, 5, 4), torch.bfloat16, "triton", residual="norm")
    expected = value_and_gradients(tail, "triton")
    spread = far_apart(getattr(tail, which))
    leaves = tail.leaves()
    if which != "dout":
        setattr(leaves, which, spread.requires_grad_())
    out = residual_tail(leaves.y, leaves.norm, **leaves.options(), backend="triton")
    dy, dresidual = torch.autograd.grad(out, (leaves.y, leaves.residual), spread if which == "dout" else tail.dout)
    for name, t in (("out", out), ("dy", dy), ("dresidual", dresidual)):
        assert torch.equal(t, expected[name]), name
