"""What has to be set before torch and Triton's kernels are first imported."""

import os
import sys
from collections.abc import Callable, Iterator

# Workers of pytest -n share the cores: OpenMP's threads of one would wait for those of another
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The longest first, so that a worker that has come to the end does not wait long for another
HEAVY = (
    "test_cuda_on_cpu",
    "test_mutations",
    "test_residual_tail",
    "test_train",
    "test_triton_audit",
    "test_squeeze_excite",
    "test_triton_tail",
    "test_tail_training",
    "test_any_model",
    "test_fuse_tails",
    "test_models",
    "test_recipe_tbx11",
    "test_report_browser",
    "test_report",
    "test_instruction_sets",
)

LOOK_AT_PICTURES = ("test_heads", "test_run_directory", "test_train")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # by which xdist begins with the files of the most tests, however short


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: HEAVY.index(item.path.stem) if item.path.stem in HEAVY else len(HEAVY))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def checks_and_pixels_are_kept_elsewhere(tmp_path_factory):
    """The tests' thousand folders stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    for name in ("engine.data.verdicts", "engine.data.decoded"):
        if name in sys.modules:
            sys.modules[name].cache_folder = lambda: folder


@pytest.fixture(scope="module", autouse=True)
def pictures_are_drawn_where_they_are_looked_at(request):
    """A tiny run takes less time to train than to draw."""
    if "engine.run" not in sys.modules or request.module.__name__.rpartition(".")[2] in LOOK_AT_PICTURES:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["engine.run"].RunDirectory, "write_pictures", lambda *_: None)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without what takes most of their time."""
    monkeypatch.setattr("engine.report.drawings.to_svg", lambda figure: "<svg></svg>")
