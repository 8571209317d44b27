"""Mutants of Triton kernels, made from the syntax tree, and telling each from the original by replaying launches.

The operators are called once, with Triton's interpreter noting every launch (`recorded`). A mutant is then put in its
kernel's place and the launches of the kernels that it has to do with are run again, cheapest first, until one differs
from what the original did, and no further: by where something is stored or by its value, in the original's order, or by
an access outside the elements of the kernel's own arguments, which is told by the address and not by what lies there.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction, InterpreterBuilder, interpreter_builder

# What is computed under these names is where things lie, and not their values
PLACES = ("o_", "i_", "m_", "p_", "B_", "pid", "blocks_", "mask")
UNCHECKED = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
APART = 256  # bytes from one argument to the next, and what each starts at a multiple of


@dataclass(frozen=True)
class Mutant:
    """``source`` is a kernel's function with one replacement made; ``shown`` says which."""

    kernel: InterpretedFunction
    source: str
    line: int
    shown: str

    def __str__(self) -> str:
        return f"{self.kernel.fn.__module__} line {self.line}, {self.kernel.__name__}: {self.shown}"

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        rewriter = FunctionRewriter(self.kernel.fn)
        rewriter.filename, rewriter.def_file_lineno = f"mutant of {self.kernel.__name__}", 1
        mutated = rewriter._compile_and_exec(rewriter._transform_ast(self.source))
        with mock.patch.dict(InterpretedFunction.rewritten_fn, {self.kernel.fn: mutated}):
            yield


def kernels_of(module: ModuleType) -> list[InterpretedFunction]:
    """The kernels, and the functions that kernels call, that are defined in the module."""
    found = (value for value in vars(module).values() if isinstance(value, InterpretedFunction))
    return [kernel for kernel in found if kernel.fn.__module__ == module.__name__]


def mutants(kernel: InterpretedFunction) -> Iterator[Mutant]:
    lines, first = inspect.getsourcelines(kernel.fn)
    above = next(i for i, line in enumerate(lines) if line.startswith("def "))  # the decorators
    text = "".join(lines[above:])
    starts = [0, *itertools.accumulate(map(len, lines[above:]))]
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert text.isascii()  # a column of ast's counts bytes
    for statement in function.body:
        for node, replacement in _mutations(statement, called_kernels(kernel)):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            if isinstance(node, ast.stmt) and replacement == "break":  # stays, and ends its loop
                replacement = f"{text[start:end]}\n{' ' * node.col_offset}break"
            shown = f"{' '.join(text[start:end].split())}  ->  {' '.join(replacement.split())}"
            yield Mutant(kernel, text[:start] + replacement + text[end:], first + above + node.lineno - 1, shown)


def called_kernels(kernel: InterpretedFunction) -> dict[str, InterpretedFunction]:
    """The functions of Triton's that stand in the kernel's code, by their names there."""
    names = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
    return {value.__name__: value for value in names if isinstance(value, InterpretedFunction)}


def uses(kernel: InterpretedFunction, other: InterpretedFunction) -> bool:
    """Whether ``other`` is run when ``kernel`` is."""
    return kernel is other or any(uses(called, other) for called in called_kernels(kernel).values())


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(node)})"


def _mutations(node: Any, helpers: Iterable[str], *, place: bool = False) -> Iterator[tuple[Any, str]]:
    """(node, what replaces it); within a ``place`` only conditions are changed."""
    children: list[tuple[Any, bool]] = [(child, place) for child in ast.iter_child_nodes(node)]
    match node:
        case ast.AnnAssign() | ast.Expr(value=ast.Constant()):
            return  # constants, docstrings
        case ast.Assign(targets=[target]) if ast.unparse(target).lstrip("(").startswith(PLACES):
            children = [(node.value, True)]
        case ast.AugAssign():
            yield node, f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
            yield node, "pass"
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="store"))):
            yield node, "pass"
        case ast.For():
            yield node.body[-1], "break"
            children = [(child, place) for child in node.body]
        case ast.BinOp() if ast.unparse(node).lstrip("(").startswith("p_"):
            children = [(child, True) for child in ast.iter_child_nodes(node)]
        case ast.BinOp(op=ast.BitAnd()):
            yield node, _text(node.left)
            yield node, _text(node.right)
        case ast.BinOp() if not place:
            yield node, _text(node.left)
            yield node, _text(node.right)
        case ast.UnaryOp() if not place:
            yield node, _text(node.operand)
        case ast.Call(func=ast.Attribute(attr="load" | "store"), args=[_, *values], keywords=keywords):
            masks = [keyword for keyword in keywords if keyword.arg == "mask"]
            yield from ((keyword, "mask=True") for keyword in masks)
            children = [(keyword.value, True) for keyword in masks] + [(value, place) for value in values]
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, chosen, fallen]):
            yield node, _text(fallen)
            yield node, _text(chosen)
        case ast.Call(func=ast.Attribute(attr="fma"), args=[factor, other, term]):
            yield node, _text(term)
            yield node, f"({_text(factor)} + {_text(term)})"
            yield node, f"({_text(other)} + {_text(term)})"
            yield node, f"({_text(factor)} * {_text(other)})"
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in helpers and not place:
            yield node, _text(first)
    for child, there in children:
        yield from _mutations(child, helpers, place=there)


class Different(Exception):
    """A launch did not do what the original's did."""


class Store(NamedTuple):
    """One execution of a store: where its lanes go, in bytes from the start of the arena, and what they hold."""

    offsets: np.ndarray
    values: np.ndarray

    def same(self, other: Store) -> bool:
        return np.array_equal(self.offsets, other.offsets) and np.allclose(
            self.values, other.values, rtol=1e-4, atol=1e-5, equal_nan=True
        )


class Launch:
    """One launch of a kernel, over copies of the tensors that it was given, as often as one likes.

    The first time is when it is made, and what it stores is then put into the tensors that were given.
    """

    def __init__(self, kernel: InterpretedFunction, args: tuple[Any, ...], grid: Any) -> None:
        self.kernel, self.grid = kernel, grid
        self.args, self.arena = _copied(args)
        self.base = self.arena.data_ptr()
        self.valid = np.zeros(self.arena.numel(), bool)
        tensors = [arg for arg in self.args if isinstance(arg, Tensor) and arg.numel()]
        for t in tensors:
            self.valid[_bytes(*self._offsets(t))] = True
        self.before = self.arena.clone()
        self.stores: list[Store] = []
        began = time.perf_counter()
        self._run(self.stores.append)
        self.seconds = time.perf_counter() - began
        self.confirmed = False
        stored = np.concatenate([np.zeros(0, np.int64), *(store.offsets for store in self.stores)])
        for given, t in zip((arg for arg in args if isinstance(arg, Tensor) and arg.numel()), tensors, strict=True):
            offsets, size = self._offsets(t)
            written = np.isin(offsets, stored)
            if written.any():
                given.copy_(t)
                # NaN, and of integers what is unlikely: so that what a mutant reads of it shows
                self.before[_bytes(offsets[written], size)] = 0xFF

    def _offsets(self, t: Tensor) -> tuple[np.ndarray, int]:
        """Where the elements of an argument begin in the arena, and their size."""
        indices = sum(
            (
                np.arange(n).reshape(-1, *[1] * (t.dim() - 1 - d)) * s
                for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True))
            ),
            np.zeros(1, np.int64),
        )
        return (t.data_ptr() - self.base + indices * t.element_size()).ravel(), t.element_size()

    def _run(self, stored: Callable[[Store], object]) -> None:
        """Runs the kernel as it is now, and tells of each store.

        Raises:
            Different: it touches what is no element of an argument.
        """
        self.arena.copy_(self.before)
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def offsets(pointers: Any, inside: Any) -> np.ndarray:
            first = (pointers.data[inside.data] - self.base).astype(np.int64)
            last = first + pointers.get_element_ty().primitive_bitwidth // 8 - 1
            if first.size:
                within = first.min() >= 0 and last.max() < self.valid.size
                if not (within and self.valid[first].all() and self.valid[last].all()):
                    raise Different("an access outside the arguments")
            return first

        def noted_load(builder: Any, pointers: Any, inside: Any, *rest: Any) -> Any:
            offsets(pointers, inside)
            return load(builder, pointers, inside, *rest)

        def noted_store(builder: Any, pointers: Any, value: Any, inside: Any, *rest: Any) -> Any:
            values = value.data[inside.data]
            if pointers.get_element_ty() == tl.bfloat16:  # the interpreter has its bits
                values = (values.astype(np.uint32) << 16).view(np.float32)
            stored(Store(offsets(pointers, inside), values))
            return store(builder, pointers, value, inside, *rest)

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", noted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", noted_store),
            mock.patch.object(InterpretedFunction, "__call__", _called),
            mock.patch.object(interpreter_builder, "options", UNCHECKED),
        ):
            self.kernel[self.grid](*self.args)

    def replay(self) -> None:
        """Raises an error where the kernel, as it is now, does something else than it did when it was recorded."""
        expected = iter(self.stores)

        def compare(store: Store) -> None:
            wanted = next(expected, None)
            if wanted is None or not store.same(wanted):
                raise Different("something else is stored, or elsewhere")

        self._run(compare)
        if next(expected, None) is not None:
            raise Different("less is stored")

    def confirm(self) -> None:
        """Raises an error where even the original does not do again what it did."""
        if not self.confirmed:
            self.replay()
            self.confirmed = True


def _bytes(offsets: np.ndarray, size: int) -> np.ndarray:
    """All bytes of the elements that begin at these offsets."""
    return (offsets[:, None] + np.arange(size)).ravel()


_call = InterpretedFunction.__call__


def _called(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls, without patching the language once more, which takes longer than most of them."""
    if function.fn.__module__.startswith("triton."):
        return _call(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def _copied(args: tuple[Any, ...]) -> tuple[list[Any], Tensor]:
    """The arguments, with copies of their tensors in an arena, far apart unless they overlap; and the arena."""
    spans = _merged(sorted(_span(t) for t in args if isinstance(t, Tensor) and t.numel()))
    ends = list(itertools.accumulate((-(-(high - low) // APART) * APART + APART for low, high in spans), initial=APART))
    arena = torch.zeros(ends[-1] + APART, dtype=torch.uint8)
    first = -arena.data_ptr() % APART

    def copied(t: Tensor) -> Tensor:
        where = next(
            ((start, low) for start, (low, high) in zip(ends, spans, strict=False) if _within(t, low, high)), None
        )
        if where is None:  # no elements
            return t
        start, low = where
        offset = (first + start + t.data_ptr() - low) // t.element_size()
        placed = torch.empty(0, dtype=t.dtype).set_(arena.untyped_storage(), offset, t.shape, t.stride())
        if all(t.stride()):
            placed.copy_(t)
        else:  # expanded: once is enough, and more is not allowed
            once = tuple(slice(None) if stride else slice(1) for stride in t.stride())
            placed[once].copy_(t[once])
        return placed

    return [copied(arg) if isinstance(arg, Tensor) else arg for arg in args], arena


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _within(t: Tensor, low: int, high: int) -> bool:
    return t.numel() > 0 and low <= t.data_ptr() < high


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for low, high in spans:
        if merged and low < merged[-1][1]:
            low, high = merged[-1][0], max(high, merged.pop()[1])
        merged.append((low, high))
    return merged


@contextlib.contextmanager
def recorded(launches: list[Launch]) -> Iterator[None]:
    """Adds what is launched within."""
    run = InterpretedFunction.run

    def noted(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [name for name in kwargs if name in kernel.arg_names]
        assert not names, f"{kernel.__name__} is launched with {names} as keywords"
        with mock.patch.object(InterpretedFunction, "run", run):
            launches.append(Launch(kernel, args, grid))

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield


def survivors(kernels: Iterable[InterpretedFunction], launches: list[Launch]) -> list[Mutant]:
    """The mutants of these kernels that no launch tells from the original."""
    alive = []
    for kernel in kernels:
        concerned = sorted((launch for launch in launches if uses(launch.kernel, kernel)), key=lambda x: x.seconds)
        for mutant in mutants(kernel):
            killer = next((launch for launch in concerned if _differs(mutant, launch)), None)
            if killer is None:
                alive.append(mutant)
            else:  # what told one mutant tells its neighbours, as a rule
                concerned.remove(killer)
                concerned.insert(0, killer)
    return alive


def _differs(mutant: Mutant, launch: Launch) -> bool:
    try:
        with mutant.installed():
            launch.replay()
    except Exception:
        launch.confirm()
        return True
    return False
