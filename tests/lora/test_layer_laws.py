"""The laws of a LoRA layer, over storage × variant × start."""

import pytest
import torch
from layers import (
    MAKERS,
    PATH,
    VARIANTS,
    Holder,
    acting,
    config_of,
    frozen,
    inputs,
    randomize,
    relative_difference,
    trained,
    with_adapter,
)
from torch import Tensor, nn

from lora_cli.errors import ModelError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import TAKEN_OFF
from lora_cli.lora.init import INITS
from lora_cli.lora.inject import disabled, inject, lora_layers
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.weights import STORAGES, dense, stored_in

READ_ALIKE = ("QuantLinear", "WQLinear_GEMM")  # as the rows before them: `test_packed.py` reads them
every_storage = pytest.mark.parametrize(
    "storage", [row.class_name for row in STORAGES if row.class_name not in READ_ALIKE]
)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_init = pytest.mark.parametrize("init", INITS)

# float32 sums in another order. LLM.int8 also rounds the activations, to 1/127 of each row's largest: what it computes
# is that far from its own dense weight, whatever the adapter does.
ROUNDING = 2e-6
AGAINST_DENSE = {"Linear8bitLt": 2e-2}


def tolerance(storage: str) -> float:
    return AGAINST_DENSE.get(storage, ROUNDING)


def layer_of(model: nn.Module):
    return lora_layers(model)[PATH]


def test_every_storage_of_the_table_has_a_layer_here():
    assert set(MAKERS) == {row.class_name for row in STORAGES}


@every_storage
@every_variant
@every_init
def test_training_starts_at_the_base_model(storage, variant, init):
    x = inputs(storage)
    base = frozen(storage)(x)

    start = with_adapter(storage, variant, init)(x)

    if VARIANTS[variant].get("use_dora") or init in (*TAKEN_OFF, "orthogonal"):
        assert relative_difference(start, base) <= ROUNDING  # something is taken off again, or divided by itself
    else:
        assert torch.equal(start, base)


@every_storage
@every_variant
@every_init
def test_disabled_is_the_base_bit_for_bit_and_enabling_brings_the_adapter_back(storage, variant, init):
    model, x = trained(storage, variant, init), inputs(storage)
    adapted = model(x)

    with disabled(model):
        inside = model(x)

    assert torch.equal(inside, frozen(storage)(x))
    assert torch.equal(model(x), adapted)
    assert relative_difference(adapted, inside) > 0.1


def test_disabled_enables_again_after_an_error():
    model = trained("Linear", "plain")

    with pytest.raises(RuntimeError), disabled(model):
        raise RuntimeError

    assert layer_of(model).enabled


@every_storage
@every_variant
@every_init
def test_the_merged_weight_gives_the_output_of_the_layer(storage, variant, init):
    model, x = trained(storage, variant, init), inputs(storage)
    expected = model(x)

    adapter = Adapter.of(model, config_of(variant))
    frozen_weight = layer_of(model).frozen
    merged = adapter.layers[PATH].merge_into(frozen_weight.dense(), adapter.config.at(PATH).scale)

    assert merged.dtype == torch.float32
    assert relative_difference(acting(storage, merged, frozen_weight.bias, x), expected) <= tolerance(storage)


@every_storage
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "dora" not in name])
def test_the_update_is_exact_whatever_the_base_rounds(storage, variant):
    model, x = trained(storage, variant), inputs(storage)
    with disabled(model):
        base = model(x)

    A, B = layer_of(model).lora_A, layer_of(model).lora_B
    scale = config_of(variant).at(PATH).scale

    update = acting(storage, scale * B @ A, None, x)
    assert relative_difference(model(x) - base, update) <= ROUNDING * 5  # a difference of two outputs


@every_storage
@every_variant
@every_init
def test_saved_and_loaded_into_the_unchanged_base_it_answers_the_same(storage, variant, init, tmp_path):
    model, x = trained(storage, variant, init), inputs(storage)
    config = config_of(variant)

    save_adapter(Adapter.of(model, config), tmp_path)
    loaded = load_adapter(tmp_path)
    again = frozen(storage)
    loaded.inject_into(again)

    assert torch.equal(again(x), model(x))
    assert loaded.config.at(PATH).scale == pytest.approx(config.at(PATH).scale, rel=1e-12)
    assert loaded.config.at(PATH).r == config.at(PATH).r * (2 if init in TAKEN_OFF else 1)


@every_storage
@every_variant
@every_init
def test_a_training_step_changes_the_factors_and_not_one_bit_of_the_base(storage, variant, init):
    model, x = with_adapter(storage, variant, init), inputs(storage)
    layer = layer_of(model)
    model(x)  # LLM.int8 moves its weight at the first forward
    before = [tensor.clone() for tensor in (*stored_in(layer.base), dense(layer.base))]
    starts = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # at the first step B = 0 keeps A's gradient at zero
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()

    after = [*stored_in(layer.base), dense(layer.base)]
    assert set(starts) == {f"proj.{name}" for name, p in layer.named_parameters(recurse=False) if p is not None}
    assert all(map(torch.equal, before, after))
    assert all(p.grad is None for p in layer.base.parameters())
    assert all(not torch.equal(p, starts[name]) for name, p in model.named_parameters() if p.requires_grad)


@every_storage
@every_variant
@every_init
def test_gradients_are_those_of_the_dense_formula(storage, variant, init):
    model, x = trained(storage, variant, init), inputs(storage)
    layer = layer_of(model)
    direction = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(2))
    leaves = [p for p in (layer.lora_A, layer.lora_B, layer.magnitude) if p is not None] + differentiable(x)

    found = torch.autograd.grad((model(x) * direction).sum(), leaves)
    formula = dense_formula(storage, layer, x, config_of(variant))
    expected = torch.autograd.grad((formula * direction).sum(), leaves)

    for mine, formula in zip(found, expected, strict=True):
        assert relative_difference(mine, formula) <= tolerance(storage) * 5  # sums over rows, and quotients


def differentiable(x: Tensor) -> list[Tensor]:
    """x as a leaf; token ids are none."""
    return [x.requires_grad_()] if x.is_floating_point() else []


def dense_formula(storage: str, layer, x: Tensor, config) -> Tensor:
    """The paper's formulas on a dense weight, from A, B and m alone."""
    scale = config.at(PATH).scale
    W = layer.dense().float() + scale * layer.lora_B @ layer.lora_A
    if layer.start_A is not None:
        W = W - scale * layer.start_B @ layer.start_A
    if layer.magnitude is not None:
        W = layer.magnitude.unsqueeze(1) * W / W.norm(dim=1, keepdim=True).detach()
    return acting(storage, W, layer.frozen.bias, x)


@every_storage
@every_variant
@every_init
def test_over_a_bfloat16_base_the_factors_are_float32_and_the_output_stays_bfloat16(storage, variant, init):
    x = inputs(storage, dtype=torch.bfloat16)
    base = frozen(storage, dtype=torch.bfloat16)(x)

    model = with_adapter(storage, variant, init, dtype=torch.bfloat16)

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(x).dtype == base.dtype == torch.bfloat16
    assert relative_difference(model(x), base) <= 2**-7  # one unit in bfloat16's last place


@every_storage
@every_variant
def test_over_a_bfloat16_base_a_trained_layer_is_its_merged_weight_to_rounding(storage, variant):
    x = inputs(storage, dtype=torch.bfloat16)
    model = trained(storage, variant, dtype=torch.bfloat16)

    adapter = Adapter.of(model, config_of(variant))
    weight = layer_of(model).frozen
    merged = adapter.layers[PATH].merge_into(weight.dense(), adapter.config.at(PATH).scale)

    bias = None if weight.bias is None else weight.bias.float()
    exact = acting(storage, merged, bias, x.float() if x.is_floating_point() else x)
    assert relative_difference(model(x), exact) <= 2e-2  # a few roundings


def test_dora_over_bfloat16_does_not_round_small_gains_away():
    """Near 1, bfloat16 knows only every 1/128th: a gain of 1.003 must act all the same."""
    model, x = with_adapter("Linear", "dora", dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    base = layer_of(model).base
    before = model(x).float() - base.bias.float()

    layer_of(model).magnitude.data *= 1.003
    after = model(x).float() - base.bias.float()

    gain = ((after * before).sum() / before.pow(2).sum()).item()
    assert gain == pytest.approx(1.003, abs=0.001)


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding": "same", "padding_mode": "circular"}], ids=str)
def test_a_convolution_is_merged_with_its_own_dilation_and_padding(variant, settings):
    model = Holder(nn.Conv2d(3, 8, 3, **settings))
    inject(model, config_of(variant), [PATH])
    randomize(model)
    x = torch.randn(2, 3, 9, 7)
    expected = model(x)

    weight = layer_of(model).frozen
    merged = Adapter.of(model, config_of(variant)).layers[PATH].merge_into(weight.dense(), 1.5)
    weight.tensor.data.copy_(merged.view_as(weight.tensor))

    assert relative_difference(weight.module(x), expected) <= ROUNDING


def test_a_convolution_with_groups_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="proj can't get an adapter: its 2 groups see a part of the channels each"):
        inject(Holder(nn.Conv2d(4, 8, 3, groups=2)), config_of("plain"), [PATH])


@pytest.mark.parametrize("storage", ["Linear", "Conv1D", "Conv2d"])
def test_dora_leaves_a_row_of_zeros_zero_and_its_gradients_finite(storage):
    """The row of the token that pads, in a head that is tied to the embedding."""
    model, x = frozen(storage), inputs(storage)
    with torch.no_grad():
        model.proj.weight.select(1 if storage == "Conv1D" else 0, 0).zero_()
        base = model(x)
    inject(model, config_of("dora"), [PATH])

    assert relative_difference(model(x), base) <= ROUNDING
    model(x).pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    adapter = Adapter.of(model, config_of("dora"))
    assert adapter.layers[PATH].merge_into(layer_of(model).dense(), 1.5).isfinite().all()


@every_storage
def test_an_evaluation_leaves_the_gradients_as_they_were(storage):
    """On processors with AVX512-BF16, bitsandbytes would repack 4-bit weights in place during the evaluation."""
    model, x = trained(storage, "plain"), inputs(storage)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        leaf = x.clone()
        leaves = [*trainable, *differentiable(leaf)]
        return list(torch.autograd.grad(model.train()(leaf).pow(2).sum(), leaves))

    before, weight = gradients(), dense(layer_of(model).base).clone()
    with torch.inference_mode():
        model.eval()(x)

    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert torch.equal(weight, dense(layer_of(model).base))


def test_injecting_keeps_four_bit_weights_unpacked_in_every_layer_of_the_model():
    model = nn.ModuleDict({name: frozen("Linear4bit") for name in ("wrapped", "other")})
    for holder in model.values():
        holder.proj.support_avx512bf16_for_cpu = True  # as bitsandbytes finds it on such a processor

    inject(model, config_of("plain"), [f"wrapped.{PATH}"])

    assert model["wrapped"].proj.base.support_avx512bf16_for_cpu is False
    assert model["other"].proj.support_avx512bf16_for_cpu is False


def test_dropout_acts_in_training_alone_and_on_the_update_alone():
    model, x = frozen("Linear"), inputs()
    inject(model, config_of("plain", lora_dropout=0.5), [PATH])
    layer = layer_of(model)
    still = model.eval()(x)
    assert torch.equal(still, layer.base(x))

    layer.lora_B.data.normal_()
    base, quiet = layer.base(x), model.eval()(x)
    noisy = model.train()(x)

    assert torch.equal(model.eval()(x), quiet)
    assert not torch.equal(noisy, quiet)
    with disabled(model.train()):
        assert torch.equal(model(x), base)
