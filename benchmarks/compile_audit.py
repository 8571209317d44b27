"""Compiles every GPU kernel for every architecture, without a GPU, and reads what became of it.

    python -m benchmarks.compile_audit [--arch 80 90 ...] [--widest] [--cu DIR] [--output FILE.md] [--json FILE]

Triton: the kernels of SE, of the residual tail and of the resident images, by the configurations of `triton_launches`;
of the tail every one for sm_90, and for the others the widest training tails in each dtype, which are what networks
launch. CUDA C++: each kernel of each ``.cu`` file in a folder, by nvcc where it is installed. Registers, shared memory,
local memory and the widest global accesses come from the machine code (cuobjdump, part of the triton wheel); occupancy
is what the limits of the CUDA programming guide allow.

The exit status is 1 when a kernel spills, or when an aligned half-precision sweep makes no 128-bit access.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.triton_launches import Launch, compile_launch, triton_launches

ROOT = Path(__file__).parent.parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Limits:
    """One multiprocessor's: threads, blocks, bytes of shared memory. Each has 65,536 registers."""

    threads: int
    blocks: int
    shared: int


# CUDA C++ programming guide, "Technical Specifications per Compute Capability"
LIMITS = {
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}
EVERY_CONFIGURATION = 90  # the architecture that all of the tail's are compiled for
REGISTERS = 1 << 16
RESERVED_SHARED = 1 << 10  # that the system takes of each block's shared memory
NVCC_ARCHITECTURES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120"}


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one architecture.

    ``shared`` in bytes a block (of CUDA C++ the static part), ``local`` in bytes a thread; ``loads`` and ``stores`` are
    the widths in bits of the global accesses, of which the widest must reach ``load_bits`` and ``store_bits``.
    ``occupancy`` is the share of the threads that a multiprocessor can hold, None where the number of threads in a
    block is not in the machine code.
    """

    kernel: str
    configuration: str
    arch: int
    registers: int
    shared: int
    local: int
    local_accesses: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    occupancy: float | None
    load_bits: int
    store_bits: int

    def faults(self) -> Iterator[str]:
        name = f"sm_{self.arch} {self.kernel} [{self.configuration}]"
        if self.local or self.local_accesses:
            yield f"{name} spills: {self.local} bytes of local memory, {self.local_accesses} LDL and STL instructions"
        for kind, widest in (("load", max(self.loads)), ("store", max(self.stores))):
            if widest < (self.load_bits if kind == "load" else self.store_bits):
                yield f"{name}: its widest {kind} is of {widest} bits"


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that can be resident at once, in blocks of ``threads``."""
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    registers_of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(
        limits.blocks,
        limits.threads // (warps * 32),
        REGISTERS // registers_of_a_warp // warps,
        limits.shared // (shared + RESERVED_SHARED),
    )
    return blocks * warps * 32 / limits.threads


@dataclass(frozen=True)
class MachineCode:
    """What cuobjdump tells of one function of a cubin; ``threads`` is 0 where no bound was compiled in or read."""

    registers: int
    shared: int
    local: int
    local_accesses: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    threads: int


def read_cubin(cubin: Path, *, with_bounds: bool = False) -> dict[str, MachineCode]:
    """The functions of a cubin by their mangled names."""

    def dump(flag: str) -> str:
        return subprocess.run([CUOBJDUMP, flag, cubin], check=True, capture_output=True, text=True).stdout

    usage = dump("-res-usage")
    code = {part.split("\n", 1)[0].strip(): part for part in dump("-sass").split("Function : ")[1:]}
    bounds = {
        part.split("\n", 1)[0].strip(): re.search(r"EIATTR_MAX_THREADS.*?Value:\s*0x([0-9a-f]+)", part, re.DOTALL)
        for part in (re.split(r"\.nv\.info\.", dump("-elf")) if with_bounds else ())
    }
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        bound = bounds.get(name)
        found[name] = MachineCode(
            registers=used["REG"],
            shared=used["SHARED"],
            local=used["STACK"] + used["LOCAL"],
            local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code[name])),
            loads=widths(r"LDG(?:STS)?", code[name]),
            stores=widths(r"STG", code[name]),
            threads=int(bound[1], 16) if bound else 0,
        )
    return found


def widths(opcode: str, code: str) -> tuple[int, ...]:
    """The widths in bits of the global accesses, ascending; an access that names none is of 32."""
    names = re.findall(rf"\b{opcode}((?:\.\w+)*)", code)
    sizes = (re.search(r"\.[SU]?(256|128|64|16|8)\b", name) for name in names)
    return tuple(sorted({int(size[1]) if size else 32 for size in sizes}))


def audit_triton(arch: int, launch: Launch) -> Row:
    kernel = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        (code,) = read_cubin(cubin).values()
    return Row(
        kernel=launch.variant,
        configuration=launch.configuration,
        arch=arch,
        registers=code.registers,
        shared=kernel.metadata.shared,
        local=code.local,
        local_accesses=code.local_accesses,
        loads=code.loads,
        stores=code.stores,
        occupancy=occupancy(arch, 32 * kernel.metadata.num_warps, code.registers, kernel.metadata.shared),
        load_bits=launch.load_bits,
        store_bits=launch.store_bits,
    )


def audit_cuda(arch: int, source: Path) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        flags = ["-cubin", f"-arch={NVCC_ARCHITECTURES[arch]}", "-O3", "-std=c++17", "-I", str(source.parent)]
        done = subprocess.run(["nvcc", *flags, "-o", cubin, source], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"nvcc cannot compile {source.name} for {NVCC_ARCHITECTURES[arch]}:\n{done.stderr}")
        functions = read_cubin(cubin, with_bounds=True)
    return [
        Row(
            kernel=f"{source.name}: {name.partition('<')[0]}",
            configuration=name.partition("<")[2].removesuffix(">"),
            arch=arch,
            registers=code.registers,
            shared=code.shared,
            local=code.local,
            local_accesses=code.local_accesses,
            loads=code.loads,
            stores=code.stores,
            occupancy=occupancy(arch, code.threads, code.registers, code.shared) if code.threads else None,
            load_bits=promised_bits(name),
            store_bits=promised_bits(name),
        )
        for name, code in zip(readable_names(list(functions)), functions.values(), strict=True)
    ]


def promised_bits(name: str) -> int:
    """What a kernel of csrc promises by its first template arguments, the type and the elements of a vector."""
    arguments = re.search(r"<(f32|bf16|f16), (\d+)\b", name)
    return int(arguments[2]) * (32 if arguments[1] == "f32" else 16) if arguments else 0


def readable_names(mangled: Sequence[str]) -> list[str]:
    """Demangled, without the namespace and the arguments: ``pool<bf16, 8>``."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None or not mangled:
        return list(mangled)
    listed = subprocess.run([demangler], input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
    return [_shortened(line) for line in listed.splitlines()]


def _shortened(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "f16"), ("float", "f32")):
        name = re.sub(rf"\b{long}\b", short, name)
    name = re.sub(r"\((?:int|bool|unsigned int|[\w:]+)\)(?=-?\d)", "", name)
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:position]
            break
    head, bracket, arguments = name.partition("<")
    return head.rpartition("::")[2] + bracket + arguments


def audit(architectures: Sequence[int], cu_folder: Path, jobs: int, launches: Sequence[Launch]) -> list[Row]:
    """Every launch, and every kernel of the folder's .cu files, on every architecture."""
    sources = sorted(cu_folder.glob("*.cu")) if shutil.which("nvcc") else []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        cuda = pool.map(audit_cuda, *zip(*itertools.product(architectures, sources), strict=True)) if sources else ()
        compiled = [
            (arch, x) for arch in architectures for x in launches if x.everywhere or arch == EVERY_CONFIGURATION
        ]
        by_triton = pool.map(audit_triton, *zip(*compiled, strict=True), chunksize=4)
        return [*by_triton, *itertools.chain.from_iterable(cuda)]


def table(rows: Sequence[Row]) -> str:
    """One line for each kernel and architecture; a range where its configurations differ."""
    lines = [
        "| kernel | arch | configurations | registers | shared, bytes | local, bytes | LDL + STL "
        "| widest load / store, bits | the same, aligned halves | occupancy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def key(row: Row) -> tuple[str, int]:
        return row.kernel, row.arch

    for (kernel, arch), group in itertools.groupby(sorted(rows, key=key), key):
        of = list(group)
        aligned = [row for row in of if row.load_bits == 128 and "f32" not in row.configuration]
        cells = [
            f"`{kernel}`",
            NVCC_ARCHITECTURES[arch] if ".cu:" in kernel else f"sm_{arch}",
            str(len(of)),
            _range([row.registers for row in of]),
            _range([row.shared for row in of]),
            str(max(row.local for row in of)),
            str(max(row.local_accesses for row in of)),
            _widest(of),
            _widest(aligned) if aligned else "",
            _range([round(100 * row.occupancy) for row in of if row.occupancy is not None], "%") or "no launch bound",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(values: list[int], unit: str = "") -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _widest(rows: Sequence[Row]) -> str:
    """The widest load and store that every one of the rows has."""
    widest = [min(max(getattr(row, kind), default=0) for row in rows) for kind in ("loads", "stores")]
    return " / ".join(str(bits) if bits else "none" for bits in widest)


def report(rows: Sequence[Row], cu_folder: Path) -> str:
    nvcc = nvcc_version()
    sources = sorted(path.name for path in cu_folder.glob("*.cu"))
    if nvcc is None:
        cuda = f"CUDA C++ was left out: nvcc is not installed here ({len(sources)} source files in {cu_folder.name})."
    elif sources:
        cuda = f"CUDA C++: {', '.join(sources)}, by nvcc {nvcc}; shared memory and occupancy without the dynamic part."
    else:
        cuda = f"CUDA C++: no .cu file in {cu_folder.name} (nvcc {nvcc})."
    faults = [fault for row in rows for fault in row.faults()]
    return (
        "# Compile audit\n\n"
        f"By `python -m benchmarks.compile_audit`, {datetime.date.today()}; triton {triton.__version__}, "
        f"torch {torch.__version__}.\n{cuda}\n\n"
        f"{len(rows)} compilations; spilling: {sum(bool(row.local or row.local_accesses) for row in rows)}; "
        f"faults: {len(faults)}.\n"
        f"Of the residual tail every configuration for sm_{EVERY_CONFIGURATION}, and the widest training tails, in "
        "each dtype, for the others.\n"
        "Of a kernel's configurations the least wide access is shown. Registers are a thread's, shared memory a "
        "block's.\n\n" + table(rows)
    )


def nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "of unknown version"


def widest(launches: Sequence[Launch]) -> list[Launch]:
    """Of each kernel's variants the first configuration with the widest accesses."""
    chosen: dict[str, Launch] = {}
    for launch in launches:
        best = chosen.setdefault(launch.variant, launch)
        if launch.constants.get("VECTOR", 1) > best.constants.get("VECTOR", 1):
            chosen[launch.variant] = launch
    return list(chosen.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_audit", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, default=list(LIMITS), metavar="SM")
    parser.add_argument("--cu", type=Path, default=ROOT / "csrc", metavar="DIR", help="the folder of the .cu files")
    parser.add_argument("--widest", action="store_true", help="of each Triton kernel only the widest configuration")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every configuration, one by one")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    args = parser.parse_args(argv)

    launches = triton_launches()
    rows = audit(args.arch, args.cu, args.jobs, widest(launches) if args.widest else launches)
    text = report(rows, args.cu)
    if args.output:
        args.output.write_text(text)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    print(text)
    faults = [fault for row in rows for fault in row.faults()]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
