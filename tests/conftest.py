"""What has to be set before torch and Triton's kernels are first imported."""

import os
import sys

# Workers of pytest -n share the cores: OpenMP's threads of one would wait for those of another
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def checks_are_remembered_elsewhere(tmp_path_factory):
    """The tests' thousand folders stay out of the user's cache."""
    verdicts = sys.modules.get("engine.data.verdicts")
    if verdicts is not None:
        folder = tmp_path_factory.mktemp("cache")
        verdicts.cache_folder = lambda: folder
