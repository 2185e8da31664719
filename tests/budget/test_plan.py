from dataclasses import replace

import pytest

from lora_cli.budget.activations import How
from lora_cli.budget.bases import measure_base
from lora_cli.budget.gpus import GPUS, find_gpu, gpu_of_device, smallest
from lora_cli.budget.params import adapted_linears
from lora_cli.budget.plan import Lengths, Limits, Option, choose
from lora_cli.budget.speed import Rates, recomputed_share, seconds
from lora_cli.budget.step import Batch, Setup, step_memory
from lora_cli.errors import RecipeError
from lora_cli.lora.config import LoRAConfig

H100 = find_gpu("H100").rates


def setup(base: str = "Llama-3.1-8B", **how) -> Setup:
    shape = measure_base(base).shape
    lora = LoRAConfig(r=16, lora_alpha=16, target_modules=())
    return Setup(shape, tuple(adapted_linears(shape, "all-linear")), lora, How(**how))


def chosen(gigabytes: float, *, lengths=None, limits=None, on: Setup | None = None) -> Option:
    lengths = lengths or Lengths(longest=2048, mean=2048)
    limits = limits or Limits(examples=16, tokens=16384, pack_to=2048)
    return choose(on or setup(masked=True), lengths, limits, H100, room=gigabytes * 1e9)


@pytest.mark.parametrize("gigabytes", [21, 30, 40, 60, 80, 141])
def test_what_is_chosen_fits_if_anything_does(gigabytes):
    assert chosen(gigabytes).needed <= gigabytes * 1e9


def test_more_memory_never_makes_a_step_slower():
    rates = [chosen(gigabytes).tokens_per_second for gigabytes in (21, 24, 30, 40, 50, 60, 80, 141)]

    assert rates == sorted(rates)
    assert rates[-1] > 1.3 * rates[0]  # nothing is computed twice where memory is plenty


def test_where_nothing_fits_the_least_is_taken():
    found = chosen(1)

    assert found.needed > 1e9
    assert (found.batch.rows, found.recompute) == (1, 1)


def test_what_a_recipe_fixes_is_respected():
    found = chosen(141, limits=Limits(examples=16, tokens=16384, micro_batch=3, recompute="mlp"))

    assert (found.micro_batch, found.row_length, found.recompute) == (3, None, "mlp")


def test_rows_are_packed_shorter_only_where_that_saves_computing_twice():
    lengths = Lengths(longest=300, mean=100)

    assert chosen(80, lengths=lengths).row_length == 2048
    assert 300 <= chosen(19, lengths=lengths).row_length < 2048


@pytest.mark.parametrize(("by_position", "micro_batch"), [(True, 2), (False, 1)])
def test_rows_share_a_forward_unless_the_head_would_make_more_logits_for_that(by_position, micro_batch):
    smol = setup("SmolLM2-135M", number=4, masked=True, by_position=by_position)
    lengths, limits = Lengths(longest=256, mean=100, share=0.5), Limits(examples=8, tokens=512, pack_to=256)

    found = choose(smol, lengths, limits, Rates(1e11, 2e10, launches=False), room=1e11)

    assert found.micro_batch == micro_batch


def test_a_model_without_mlp_modules_is_not_asked_to_compute_them_twice():
    opt = setup("OPT-6.7b")

    assert {chosen(gigabytes, on=opt).recompute for gigabytes in range(14, 40)} <= {0, 1, 2, 3, 4}


def test_what_is_computed_twice_takes_its_share_of_time():
    llama, batch = setup(), Batch(4, 2048, 8192)

    shares = [recomputed_share(llama, mode) for mode in (0, 4, 2, "mlp", 1)]
    times = [seconds(llama, batch, mode, H100) for mode in (0, 4, 2, "mlp", 1)]

    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert times == sorted(times)


@pytest.mark.parametrize(("number", "bytes_each"), [(4, 16), (2, 18)])
def test_full_fine_tuning_keeps_masters_gradients_and_moments_and_what_narrow_products_read(number, bytes_each):
    llama = setup("Llama-3.2-1B")
    how, config = replace(llama.how, number=number), LoRAConfig(r=0, lora_alpha=1, target_modules=())
    full = Setup(llama.shape, llama.adapted, config, how, full=True)

    memory = step_memory(full, Batch(1, 512, 512), 0)

    assert memory.standing == bytes_each * llama.shape.parameters
    assert memory.activations > 0


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090"])
def test_a_gpu_is_found_however_it_is_written(name):
    assert find_gpu(name).name == "RTX 4090"


def test_every_gpu_is_found_by_its_name():
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_device_is_known_by_the_name_that_its_driver_gives(device, name):
    assert gpu_of_device(device).name == name


def test_a_device_without_a_row_is_none():
    assert gpu_of_device("Graphics 9000") is None


def test_an_unknown_gpu_is_answered_with_the_nearest():
    with pytest.raises(RecipeError) as caught:
        find_gpu("RTX 4900")

    assert str(caught.value) == (
        "error: `--gpu RTX 4900` is no GPU of the catalogue\n  fix: the nearest: RTX 4090, RTX 4080, RTX 4070"
    )


def test_a_name_that_fits_several_gpus_is_answered_with_them():
    with pytest.raises(RecipeError) as caught:
        find_gpu("A100")

    assert str(caught.value) == (
        "error: `--gpu A100` is several GPUs of the catalogue\n  fix: the nearest: A100 40GB, A100 80GB"
    )


def test_the_smallest_gpu_has_the_memory_and_none_smaller_has():
    found = smallest(30e9, bfloat16=True)

    assert found.memory >= 30e9
    assert not [gpu for gpu in GPUS if 30e9 <= gpu.memory < found.memory and gpu.bf16]
    assert smallest(1e15, bfloat16=True) is None
