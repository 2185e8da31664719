import pytest
from faults import forked
from running import write_recipe


@pytest.fixture(scope="module")
def straight(request, tmp_path_factory, tiny_llama):
    """The run folder of the module's SETTINGS, trained without a fault."""
    folder = tmp_path_factory.mktemp("straight")
    file = write_recipe(folder, tiny_llama, request.module.SETTINGS)
    run = forked("train", file, "--out", folder / "straight", log=folder / "log")
    assert run.wait() == 0, run.said
    return folder / "straight"
