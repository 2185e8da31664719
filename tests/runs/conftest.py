import pytest
from running import lora, write_recipe  # noqa: F401  `lora` is a fixture
from tiny import tiny_base


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """recipe({"lora.r": 8, …}) -> a recipe of the tiny Llama in this test's folder; its run folder is `out`."""

    def write(settings=None, *, base=tiny_llama):
        return write_recipe(tmp_path, base, settings)

    return write
