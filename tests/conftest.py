"""Every test runs offline, on one thread, and without the user's own caches or settings."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1", OMP_NUM_THREADS="1")

import pytest


@pytest.fixture(autouse=True)
def _one_thread_and_a_cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    if "torch" in __import__("sys").modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
