"""Mutants of Triton kernels, made from the syntax tree, and telling each from the original by replaying launches.

The operators are called once, with Triton's interpreter noting every launch (`recorded`). A mutant is then put in its
kernel's place and the launches of the kernels that it has to do with are run again, cheapest first, until one differs
from what the original did: by a value that is stored, by where it is stored and how often, or by an access outside the
elements of the kernel's own arguments, which is told by the address and not by what happens to lie there.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
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


class Launch:
    """One launch of a kernel, over copies of the tensors that it was given, as often as one likes.

    The first time is when it is made, and what it stores is then put into the tensors that were given.
    """

    def __init__(self, kernel: InterpretedFunction, args: tuple[Any, ...], grid: Any) -> None:
        self.kernel, self.grid = kernel, grid
        self.args, self.arena = _copied(args)
        self.tensors = [arg for arg in self.args if isinstance(arg, Tensor) and arg.numel()]
        self.base = self.arena.data_ptr()
        self.valid = np.zeros(self.arena.numel(), bool)
        for offsets, size in map(self._offsets, self.tensors):
            for byte in range(size):
                self.valid[offsets + byte] = True
        self.before = self.arena.clone()
        loads, self.stores = self._run()
        for given, t in zip(
            (arg for arg in args if isinstance(arg, Tensor) and arg.numel()), self.tensors, strict=True
        ):
            if np.isin(self._offsets(t)[0], self.stores).any():
                given.copy_(t)
        self._poison(np.setdiff1d(self.stores, loads))
        began = time.perf_counter()
        _, self.stores = self._run()
        self.seconds = time.perf_counter() - began
        self.after = [t.clone() for t in self.tensors]

    def _offsets(self, t: Tensor) -> tuple[np.ndarray, int]:
        """Where the elements of an argument begin in the arena, and their size."""
        indices = sum(
            (
                np.arange(n).reshape(-1, *[1] * (t.dim() - 1 - d)) * s
                for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True))
            ),
            np.zeros(1, np.int64) if t.numel() else np.zeros(0, np.int64),
        )
        return (t.data_ptr() - self.base + indices * t.element_size()).ravel(), t.element_size()

    def _poison(self, written: np.ndarray) -> None:
        """Makes a value that is not written one that shows: NaN, and of integers the bits turned over."""
        for t in self.tensors:
            offsets, _ = self._offsets(t)
            chosen = torch.from_numpy(np.isin(offsets, written)).view(t.shape)
            t.copy_(torch.where(chosen, float("nan") if t.is_floating_point() else ~t, t))
        held = self.arena.clone()
        for t in self.tensors:
            offsets, size = self._offsets(t)
            inside = np.isin(offsets, written)
            for byte in range(size):
                where = torch.from_numpy(offsets[inside] + byte)
                self.before[where] = held[where]

    def _run(self) -> tuple[np.ndarray, np.ndarray]:
        """Runs the kernel as it is now; the offsets that it loads and stores, sorted, with repetitions.

        Raises:
            Different: it touches what is no element of an argument.
        """
        self.arena.copy_(self.before)
        loads: list[np.ndarray] = []
        stores: list[np.ndarray] = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def note(to: list[np.ndarray], pointers: Any, inside: Any) -> None:
            offsets = (pointers.data[inside.data] - self.base).astype(np.int64)
            last = offsets + pointers.get_element_ty().primitive_bitwidth // 8 - 1
            if offsets.size:
                within = offsets.min() >= 0 and last.max() < self.valid.size
                if not (within and self.valid[offsets].all() and self.valid[last].all()):
                    raise Different("an access outside the arguments")
                to.append(offsets)

        def noted_load(builder: Any, pointers: Any, inside: Any, *rest: Any) -> Any:
            note(loads, pointers, inside)
            return load(builder, pointers, inside, *rest)

        def noted_store(builder: Any, pointers: Any, value: Any, inside: Any, *rest: Any) -> Any:
            note(stores, pointers, inside)
            return store(builder, pointers, value, inside, *rest)

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", noted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", noted_store),
            mock.patch.object(InterpretedFunction, "__call__", _called),
            mock.patch.object(interpreter_builder, "options", UNCHECKED),
        ):
            self.kernel[self.grid](*self.args)
        return tuple(np.sort(np.concatenate([np.zeros(0, np.int64), *noted])) for noted in (loads, stores))

    def replay(self) -> None:
        """Raises an error where the kernel, as it is now, does something else than it did when it was recorded."""
        _, stores = self._run()
        if not np.array_equal(stores, self.stores):
            raise Different("other elements are stored, or other times")
        for actual, expected in zip(self.tensors, self.after, strict=True):
            if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise Different("other values are stored")


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
        return True
    return False
