"""Every mask, term, factor and sum of the Triton kernels is needed: without any one of them a check fails.

The mutants are made from the kernels' syntax tree (`mutants`), each by one replacement in the source. A mutant runs in
Triton's interpreter with small blocks, on a shape that fills no block, and must be told from the original: by a value,
or by an access outside the tensors. Every tensor lies within NaN, and what is allocated starts as NaN.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from kernels import se_triton
from kernels.reference import ACTIVATIONS, GATES

pytestmark = pytest.mark.skipif(not se_triton.INTERPRETED, reason="mutants run in Triton's interpreter")

SOURCE = Path(se_triton.__file__).read_text()
SMALL_BLOCKS = {
    "TILE": 64,
    "SIDES": {"channels": (8,), "pixels": (8,), "any": (8,)},
    "PROGRAMS": 12,
    "ROWS": 2,
    "ROWS_SUMMED": 2,
    "BLOCK_C": 4,
    "BLOCK_R": 4,
    "SLICE": 8,
}
N, C, H, W, R = 3, 11, 3, 9, 5  # with the blocks above: two or more of each, the last one never full
SWEPT = 2  # samples that the sweeps go over, one by one: the last, behind which memory ends
GUARD = 64  # elements of NaN on either side of a tensor

BACKWARD = {"_fc2_bwd_kernel", "_fc1_bwd_kernel", "_weight_grad_kernel", "_act_bwd", "_gate_bwd", "_act"}
IDENTITIES = {"_act", "_act_bwd", "_gate", "_gate_bwd"}
# What is computed under these names is where things lie, and not their values
PLACES = ("o_", "i_", "m_", "p_", "B_", "pid", "blocks_", "mask")


@dataclass(frozen=True)
class Mutant:
    """``branch`` is the value of ACT, GATE or ORDER that leads there, or ""."""

    function: str
    branch: str
    line: int
    start: int
    end: int
    replacement: str

    def source(self) -> str:
        return SOURCE[: self.start] + self.replacement + SOURCE[self.end :]

    def __str__(self) -> str:
        was = " ".join(SOURCE[self.start : self.end].split())
        return f"line {self.line}, {self.function}: {was}  ->  {self.replacement.strip()}"


def mutants() -> list[Mutant]:
    tree = ast.parse(SOURCE)
    kernels = [n for n in tree.body if isinstance(n, ast.FunctionDef) and "_jit" in map(ast.unparse, n.decorator_list)]
    assert len(kernels) == 14
    return [
        _mutant(kernel.name, branch, *mutation)
        for kernel in kernels
        for branch, node in _branches(kernel.body)
        for mutation in _mutations(node)
    ]


LAST_BRANCH = {"ACT": "gelu", "GATE": "hardsigmoid", "ORDER": "any"}  # of an if, elif, else


def _branches(body: list[ast.stmt], branch: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        match node:
            case ast.If(test=ast.Compare(left=ast.Name(id=name), comparators=[ast.Constant(value=value)])) if (
                name in LAST_BRANCH
            ):
                yield from _branches(node.body, value)
                yield from _branches(node.orelse, LAST_BRANCH[name])
            case _:
                yield branch, node


LINE_STARTS = [0, *itertools.accumulate(len(line) for line in SOURCE.splitlines(keepends=True))]


def _span(node: Any) -> tuple[int, int]:
    return LINE_STARTS[node.lineno - 1] + node.col_offset, LINE_STARTS[node.end_lineno - 1] + node.end_col_offset


def _mutant(function: str, branch: str, node: Any, replacement: str) -> Mutant:
    return Mutant(function, branch, node.lineno, *_span(node), replacement)


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(node)})"


def _mutations(node: Any, *, place: bool = False) -> Iterator[tuple[Any, str]]:
    """(node, what replaces it); within a ``place`` only conditions are changed."""
    children: list[tuple[Any, bool]] = []
    match node:
        case ast.Assign(targets=[target]):
            place = place or ast.unparse(target).lstrip("(").startswith(PLACES)
        case ast.AnnAssign():
            return
        case ast.AugAssign():
            yield node, f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
            yield node, "pass"
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="store"))):
            yield node, "pass"
        case ast.For():
            yield node.body[-1], _with_break(node.body[-1])
            yield from itertools.chain.from_iterable(_mutations(child) for child in node.body)
            return
        case ast.BinOp(op=ast.BitAnd()):
            yield node, _text(node.left)
            yield node, _text(node.right)
        case ast.BinOp() if not place:
            yield node, _text(node.left)
            yield node, _text(node.right)
        case ast.UnaryOp() if not place:
            yield node, _text(node.operand)
        case ast.Call(func=ast.Attribute(attr="load" | "store"), args=[_, *values], keywords=keywords):
            for keyword in keywords:
                if keyword.arg == "mask":
                    yield keyword, "mask=True"
                    children.append((keyword.value, True))
            children += [(value, place) for value in values]
            for child, there in children:
                yield from _mutations(child, place=there)
            return
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, chosen, fallen]):
            yield node, _text(fallen)
            yield node, _text(chosen)
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in IDENTITIES:
            yield node, _text(first)
    for child in ast.iter_child_nodes(node):
        yield from _mutations(child, place=place)


def _with_break(last: ast.stmt) -> str:
    start, end = _span(last)
    return f"{SOURCE[start:end]}\n{' ' * last.col_offset}break"


class OutOfBounds(Exception):
    """A kernel went outside the tensors that it was given."""


class Memory:
    """Tensors that lie within NaN, and the addresses that kernels may touch."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # kept: memory that is freed is given out again, and its span would stand
        self.spans: list[tuple[int, int]] = []

    def place(self, like: Tensor, values: Tensor | None = None) -> Tensor:
        """A tensor of the strides that ``like`` has, holding ``values`` or NaN."""
        size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        whole = torch.full((size + 2 * GUARD,), float("nan"), dtype=like.dtype)
        placed = whole.as_strided(like.shape, like.stride(), GUARD)
        if values is not None:
            placed.copy_(values)
        self.tensors.append(whole)
        self.spans.append((placed.data_ptr(), placed.data_ptr() + size * like.element_size()))
        return placed

    def check(self, pointers: Any, inside: Any) -> None:
        touched = pointers.data[inside.data]
        if touched.size:
            low, high = int(touched.min()), int(touched.max())
            if not any(start <= low and high < end for start, end in self.spans):
                raise OutOfBounds

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Accesses are checked within; the tensors made within are forgotten after."""
        before = len(self.tensors)
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        new_empty, empty_like = Tensor.new_empty, torch.empty_like

        def checked_load(builder: Any, pointers: Any, inside: Any, *rest: Any) -> Any:
            self.check(pointers, inside)
            return load(builder, pointers, inside, *rest)

        def checked_store(builder: Any, pointers: Any, value: Any, inside: Any, *rest: Any) -> Any:
            self.check(pointers, inside)
            return store(builder, pointers, value, inside, *rest)

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
            mock.patch.object(Tensor, "new_empty", lambda *args, **kw: self.place(new_empty(*args, **kw))),
            mock.patch.object(torch, "empty_like", lambda *args, **kw: self.place(empty_like(*args, **kw))),
        ):
            try:
                yield
            finally:
                del self.tensors[before:], self.spans[before:]


class Case:
    """Inputs, and what float64 makes of them; the sweeps and the small products are checked apart, which is faster."""

    def __init__(self, act: str, gate: str, bias: bool, order: str, lay: Callable[[Tensor], Tensor]) -> None:
        self.memory, self.act, self.gate_fn, self.order = Memory(), act, gate, order
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32)

        # gates of 0 and of 1 among them
        values = [draw(N, C, H, W) + 0.5, draw(R, C), 4 * draw(C, R), draw(R), draw(C)]
        self.dout = self.memory.place(lay(values[0]), draw(N, C, H, W))
        self.x = self.memory.place(lay(values[0]), values[0])
        self.w1, self.w2, *biases = (self.memory.place(t, t) for t in values[1:])
        self.b1, self.b2 = biases if bias else (None, None)

        x, w1, w2, b1, b2 = leaves = [t.to(wide).requires_grad_() for t in values]
        pooled = x.mean((2, 3))
        hidden = pooled @ w1.T + (b1 if bias else 0)
        z = ACTIVATIONS[act](hidden) @ w2.T + (b2 if bias else 0)
        s = GATES[gate](z)
        gradients = torch.autograd.grad(x * s[:, :, None, None], leaves, self.dout.to(wide), allow_unused=not bias)
        dx, dw1, dw2, db1, db2 = (None if t is None else t.float() for t in gradients)
        self.gradients = {"dw1": dw1, "db1": db1, "dw2": dw2, "db2": db2}
        self.saved = {"pooled": pooled.detach().float(), "hidden": hidden.detach().float(), "gate": s.detach().float()}
        self.q = (dx - self.dout * self.saved["gate"][:, :, None, None])[:, :, 0, 0].contiguous()
        self.placed = {name: self.memory.place(t, t) for name, t in {**self.saved, "q": self.q}.items()}

    def check_pool(self, module: ModuleType, *, with_dout: bool) -> None:
        x, dout = self.x[-SWEPT:], self.dout[-SWEPT:] if with_dout else None
        with self.memory.guarding():
            sums = module._pool(x, dout).sum(1)
        _compare("sums", sums, (x * dout if with_dout else x).sum((2, 3)))

    def check_scale(self, module: ModuleType, *, with_q: bool) -> None:
        source, gate = self.dout[-SWEPT:], self.placed["gate"][-SWEPT:]
        q = self.placed["q"][-SWEPT:] if with_q else None
        with self.memory.guarding():
            out = torch.empty_like(self.x[-SWEPT:])
            module._scale(source, gate, q, out)
        scaled = source * gate[:, :, None, None]
        _compare("out", out, scaled + q[:, :, None, None] if with_q else scaled)

    def check_forward(self, module: ModuleType) -> None:
        """What stands between the two sweeps, which are done by PyTorch here."""
        weights = (self.w1, self.b1, self.w2, self.b2)
        with self.memory.guarding(), self.swept(module):
            _, *saved = module.se_fwd(self.x, *weights, self.act, self.gate_fn)
        for actual, (name, exact) in zip(saved, self.saved.items(), strict=True):
            _compare(name, actual, exact)

    def check_backward(self, module: ModuleType) -> None:
        saved = [self.placed[name] for name in self.saved]
        wanted = [True] + [exact is not None for exact in self.gradients.values()]
        with self.memory.guarding(), self.swept(module) as scaled:
            _, *gradients = module.se_bwd(self.dout, self.x, self.w1, self.w2, *saved, self.act, self.gate_fn, wanted)
        for actual, (name, exact) in zip(gradients, self.gradients.items(), strict=True):
            if exact is not None:
                _compare(name, actual, exact)
        _compare("q", scaled["q"], self.q)

    @contextlib.contextmanager
    def swept(self, module: ModuleType) -> Iterator[dict[str, Tensor | None]]:
        def pool(x: Tensor, dout: Tensor | None) -> Tensor:
            value = (x if dout is None else x * dout).flatten(2)
            part = torch.stack((value[:, :, :10].sum(2), value[:, :, 10:].sum(2)), 1)
            return self.memory.place(part, part)

        def scale(source: Tensor, gate: Tensor, q: Tensor | None, out: Tensor) -> None:
            scaled["q"] = q

        scaled: dict[str, Tensor | None] = {}
        with mock.patch.object(module, "_pool", pool), mock.patch.object(module, "_scale", scale):
            yield scaled


def _compare(name: str, actual: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def cases() -> list[Case]:
    def cropped(t: Tensor) -> Tensor:
        return torch.empty(N, C, 2 * H, 2 * W)[:, :, ::2, ::2]

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    return [
        Case("relu", "sigmoid", True, "channels", channels_last),
        Case("silu", "hardsigmoid", True, "pixels", torch.Tensor.contiguous),
        Case("gelu", "sigmoid", False, "any", cropped),
    ]


def load(source: str, path: Path) -> ModuleType:
    """The source as a module with small blocks; Triton's interpreter reads it again from the file."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    for name, value in SMALL_BLOCKS.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    return module


def check(module: ModuleType, every: list[Case], function: str = "", branch: str = "") -> None:
    """Raises where a result is off or an access is out of bounds; of the kernels that ``function`` has to do with."""
    for case in every:
        if branch and branch not in (case.act, case.gate_fn, case.order):
            continue
        if function in ("", "_pool_kernel"):
            case.check_pool(module, with_dout=False)
        if function in ("", "_pool_kernel", "_pointers", "_inside"):
            case.check_pool(module, with_dout=True)
        if function in ("", "_scale_kernel", "_pointers", "_inside"):
            case.check_scale(module, with_q=True)
        if function == "":
            case.check_scale(module, with_q=False)
        if function in ("", "_fc1_kernel", "_fc2_kernel", "_act", "_gate", "_sum_parts"):
            case.check_forward(module)
        if function in ("", *BACKWARD):
            case.check_backward(module)


def is_killed(mutant: Mutant, every: list[Case], folder: Path, number: int) -> bool:
    try:
        module = load(mutant.source(), folder / f"mutant_{number}.py")
        check(module, every, mutant.function, mutant.branch)
    except Exception:
        return True
    return False


def test_the_original_passes(tmp_path):
    check(load(SOURCE, tmp_path / "original.py"), cases())


def test_no_mutant_survives(tmp_path):
    every = cases()
    survivors = [str(m) for number, m in enumerate(mutants()) if not is_killed(m, every, tmp_path, number)]
    assert not survivors, "\n".join(survivors)
