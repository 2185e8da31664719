import pytest
import torch

from lora_cli.recipe.schema import Training
from lora_cli.train.auto import gradient_checkpointing, layout

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """A GPU with 40 GiB free, or as many as a test says."""

    def say(gib: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * GIB, 80 * GIB))

    say(40)
    return say


def size_on(device, *, rows=64, longest=512, vocabulary=32_000, processes=1) -> int:
    settings = Training(global_batch_size=rows)
    found = layout(settings, longest=longest, vocabulary=vocabulary, processes=processes, device=device)
    assert found.row_length is None
    return found.micro_batch_size


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("longest", [1, 100, 2048, 100_000])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_micro_batch_is_a_power_of_two_that_fits_the_step_and_the_memory(device, processes, longest, rows):
    size = size_on(device, rows=rows, longest=longest, processes=processes)

    assert size >= 1
    assert size & (size - 1) == 0
    assert size == 1 or size * processes < rows + processes
    assert size == 1 or size * longest <= 16384


def test_a_given_size_is_taken_as_it_is():
    settings = Training(micro_batch_size=5)

    found = layout(settings, longest=10**6, vocabulary=10**6, processes=4, device=CPU)

    assert found.micro_batch_size == 5


def test_a_gpu_gets_more_rows_than_a_cpu():
    assert size_on(GPU) > size_on(CPU)


def test_the_logits_fit_the_memory_that_is_free(free):
    sizes = []
    for gib in (40, 4, 1):
        free(gib)
        sizes.append(size_on(GPU, vocabulary=256_000, longest=128))

    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] * 128 * 256_000 * 4 < 1 * GIB or sizes[-1] == 1  # even once, in float32


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("longest", [10, 700, 3000])
@pytest.mark.parametrize("pack_to", [256, 2048, 100_000])
def test_packed_rows_have_at_most_what_a_forward_may_have_and_a_longer_example_its_own(device, longest, pack_to):
    found = layout(Training(), longest=longest, vocabulary=32_000, processes=1, device=device, pack_to=pack_to)

    assert found.row_length == min(pack_to, 512 if device == CPU else 16384)
    assert found.micro_batch_size * max(longest, found.row_length) <= max(longest, found.row_length, 16384)


def test_checkpointing_is_on_where_memory_is_scarce_unless_it_is_said():
    assert [gradient_checkpointing(Training(), device) for device in (CPU, GPU)] == [0, 1]
    assert gradient_checkpointing(Training(gradient_checkpointing=True), CPU) == 1
    assert gradient_checkpointing(Training(gradient_checkpointing=False), GPU) == 0
    assert gradient_checkpointing(Training(gradient_checkpointing="mlp"), GPU) == "mlp"
