"""csrc <- kernels <- engine <- {benchmarks, tests}: who may import whom (design section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parent.parent


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it or None) of every import statement, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def violations(package: str) -> list[str]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for module, name in imports(path):
            top = module.split(".")[0]
            if top in ("benchmarks", "tests"):
                found.append(f"{where}: {module}")
            if package == "kernels" and top not in {*sys.stdlib_module_names, "torch", "triton", "kernels"}:
                found.append(f"{where}: {module}")
            if package == "engine" and top == "kernels" and not (name is None or name in kernels.__all__):
                found.append(f"{where}: {module}.{name}")
            if package == "engine" and module.startswith("kernels."):
                found.append(f"{where}: {module}")
            if module.startswith("nvidia") and where != "engine/data/dali_decoder.py":
                found.append(f"{where}: {module}")
    return found


@pytest.mark.parametrize("package", ("kernels", "engine"))
def test_import_rule(package):
    assert violations(package) == []


def test_the_rule_is_seen_to_fail(tmp_path, monkeypatch):
    for name, text in (
        ("kernels/a.py", "import torchvision"),
        ("engine/b.py", "def f():\n    from kernels.reference import x"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert violations("kernels") == ["kernels/a.py: torchvision"]
    assert len(violations("engine")) == 2


def test_engine_imports_neither_dali_nor_cuda():
    """The sampler, configuration, checkpoints and metrics work on a machine that has neither; and nothing is imported
    before it is needed."""
    code = (
        "import sys, engine\n"
        "assert not {'engine.api', 'torchvision', 'sklearn'} & set(sys.modules)\n"
        "from engine import load\n"
        "import engine.train, engine.evaluate, engine.data, torch\n"
        "assert not any(name.startswith('nvidia.dali') for name in sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_another_package_named_kernels_is_recognised(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import engine"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Hugging Face" in ended.stderr
