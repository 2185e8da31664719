"""What can be known of an adapter from its factors: whether it acts, which it is, and whose base it belongs to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layers import PATH, config_of, randomize, trained, with_adapter

from lora_cli.errors import DivergedError, ModelError
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import Fingerprint
from lora_cli.lora.init import INITS
from lora_cli.lora.peft_format import load_adapter, save_adapter

WITH_B = ("orthogonal", "pissa", "olora")  # starts whose B is not zero


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_that_was_not_trained_does_nothing_whatever_it_started_from(init):
    adapter = Adapter.of(with_adapter("Linear", "plain", init), config_of("plain"))
    zero = "lora_B · lora_A" if init in WITH_B else "lora_B"

    with pytest.raises(DivergedError) as error:
        adapter.check_alive()

    assert error.value.problems[0].what == f"the adapter does nothing: every {zero} is zero"
    assert error.value.code == 6


@pytest.mark.parametrize("size", [1e-5, 0.3])
@pytest.mark.parametrize("init", INITS)
def test_a_small_step_of_training_brings_it_to_life(init, size):
    model = with_adapter("Linear", "plain", init)
    randomize(model, size=size)

    Adapter.of(model, config_of("plain")).check_alive()


def test_one_layer_alive_is_enough():
    dead, alive = (Factors(torch.ones(4, 8), B) for B in (torch.zeros(6, 4), torch.ones(6, 4)))

    Adapter(config_of("plain"), {"a": dead, "b": alive}).check_alive()


def test_an_A_of_zeros_does_nothing_either():
    with pytest.raises(DivergedError, match="every lora_B · lora_A is zero"):
        Adapter(config_of("plain"), {PATH: Factors(torch.zeros(4, 8), torch.ones(6, 4))}).check_alive()


def test_of_dora_only_finiteness_is_known():
    adapter = Adapter.of(with_adapter("Linear", "dora"), config_of("dora"))
    adapter.check_alive()

    adapter.layers[PATH].magnitude[0] = float("nan")
    with pytest.raises(DivergedError, match="not finite in 1 layers, first proj"):
        adapter.check_alive()


@pytest.mark.parametrize("variant", ["plain", "dora", "rslora+patterns"])
def test_the_digest_survives_the_disk(tmp_path, variant):
    adapter = Adapter.of(trained("Linear", variant), config_of(variant))
    save_adapter(adapter, tmp_path)

    assert load_adapter(tmp_path).digest() == adapter.digest()


CHANGES = {
    "A": lambda a: with_factors(a, A=a.layers[PATH].A + 1e-6),
    "B": lambda a: with_factors(a, B=a.layers[PATH].B + 1e-6),
    "the magnitude": lambda a: with_factors(a, magnitude=a.layers[PATH].magnitude + 1e-6),
    "no magnitude": lambda a: with_factors(a, magnitude=None),
    "the scale": lambda a: replace(a, config=replace(a.config, lora_alpha=7)),
    "rslora": lambda a: replace(a, config=replace(a.config, use_rslora=True)),
    "a layer's own alpha": lambda a: replace(a, config=replace(a.config, alpha_pattern={PATH: 7})),
    "a layer more": lambda a: replace(a, layers={**a.layers, "other": a.layers[PATH]}),
    "a layer less": lambda a: replace(a, layers={}),
    "another path": lambda a: replace(a, layers={"other": a.layers[PATH]}),
}


def with_factors(adapter: Adapter, **changed) -> Adapter:
    return replace(adapter, layers={PATH: replace(adapter.layers[PATH], **changed)})


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_all_that_changes_what_an_adapter_computes_changes_its_digest(change):
    adapter = Adapter.of(trained("Linear", "dora"), config_of("dora"))

    assert change(adapter).digest() != adapter.digest()


def test_what_changes_nothing_leaves_the_digest():
    adapter = Adapter.of(trained("Linear", "plain"), config_of("plain"))
    other = replace(adapter.config, lora_alpha=6.0, lora_dropout=0.5, base_model_name_or_path="x")

    assert replace(adapter, config=other).digest() == adapter.digest()


def test_another_base_is_refused_by_the_names_of_what_differs_unless_it_is_allowed():
    names = ["a", "b", "c", "d", "e"]
    adapter = Adapter(config_of("plain"), {}, Fingerprint("x", dict.fromkeys(names, "1")))
    found = Fingerprint("x", dict.fromkeys(names, "2"))

    with pytest.raises(ModelError) as error:
        adapter.check_base(found, Path("base"))

    assert str(error.value) == (
        "error: the adapter was trained on another base: they differ in a, b, c and 2 more\n"
        "  --> base\n"
        "  fix: give the base it was trained on with `--base`, or accept this one with `--allow-base-mismatch`"
    )
    assert adapter.check_base(found, Path("base"), allow=True) == names
    assert adapter.check_base(adapter.base, Path("base")) == []
    assert replace(adapter, base=None).check_base(found, Path("base")) == []
