"""Wrapping modules of a model, and the starts of A and B."""

import logging
from math import sqrt

import pytest
import torch
from layers import IN, OUT, PATH, Holder, config_of, frozen, inputs, with_adapter
from tiny import tiny_model

from lora_cli.errors import ModelError, RecipeError
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.init import GIVEN_INITS, INITS
from lora_cli.lora.inject import derived_seed, frozen_digest, generator_for, inject, lora_layers
from lora_cli.lora.weights import STORAGES, dense, storage_of, weights_of
from lora_cli.recipe.schema import LoRA

QV = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def config(**settings) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ("q_proj",)} | settings)


def test_the_model_is_frozen_but_for_the_factors():
    model = tiny_model("llama")

    layers = inject(model, config(), QV)

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert list(layers) == QV
    assert trainable == {f"{path}.{part}" for path in QV for part in ("lora_A", "lora_B")}


def test_the_digest_of_the_base_tells_any_change_of_it_and_none_of_the_factors():
    model = tiny_model("llama")
    layers = inject(model, config(), QV)
    before = frozen_digest(model)

    with torch.no_grad():
        layers[QV[0]].lora_B.add_(1)
        assert frozen_digest(model) == before
        for parameter in (p for p in model.parameters() if not p.requires_grad):
            kept = parameter.flatten()[-1].item()
            parameter.view(-1)[-1] += 1e-3
            assert frozen_digest(model) != before
            parameter.view(-1)[-1] = kept
            assert frozen_digest(model) == before


@pytest.mark.parametrize("init", INITS)
def test_a_start_depends_on_seed_and_path_alone(init):
    def start(paths, seed):
        torch.rand(7)  # whatever was drawn before
        model = tiny_model("llama")
        return inject(model, config(), paths, init=INITS[init], seed=seed)[QV[0]].lora_A

    assert torch.equal(start(QV, 1), start(QV[:1], 1))
    assert torch.equal(start(QV, 1), start(QV[::-1], 1))
    if init in ("default", "gaussian", "orthogonal"):
        assert not torch.equal(start(QV, 1), start(QV, 2))


def test_different_paths_start_differently():
    layers = inject(tiny_model("llama"), config(), QV)

    assert not torch.equal(layers[QV[0]].lora_A, layers[QV[1]].lora_A)


def test_seeds_are_hashed_from_all_names():
    assert derived_seed(1, "dropout", 2, 3) == derived_seed(1, "dropout", 2, 3)
    assert len({derived_seed(1, 23), derived_seed(12, 3), derived_seed(1, "23"), derived_seed(1, 2, 3)}) == 4
    assert 0 <= derived_seed(42, "x") < 2**63
    assert torch.equal(torch.rand(3, generator=generator_for(1, "a")), torch.rand(3, generator=generator_for(1, "a")))


def test_the_plain_start_is_linears_own_and_the_gaussian_has_deviation_one_over_r():
    model = Holder(torch.nn.Linear(4000, 3))
    wide = inject(model, LoRAConfig(r=8, lora_alpha=8, target_modules=(PATH,)), [PATH])[PATH]
    assert wide.lora_A.abs().max() <= 1 / sqrt(4000)
    assert wide.lora_A.std().item() == pytest.approx(1 / sqrt(3 * 4000), rel=0.02)

    model = Holder(torch.nn.Linear(4000, 3))
    normal = inject(model, LoRAConfig(r=8, lora_alpha=8, target_modules=(PATH,)), [PATH], init=INITS["gaussian"])[PATH]
    assert normal.lora_A.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not wide.lora_B.any()
    assert not normal.lora_B.any()


@pytest.mark.parametrize("storage", [row.class_name for row in STORAGES])
@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_pissa_starts_at_the_best_approximation_of_the_weight(storage, variant):
    layer = lora_layers(with_adapter(storage, variant, "pissa"))[PATH]
    W = dense(layer.base).float()

    start = layer.scale * layer.lora_B @ layer.lora_A
    U, S, Vt = torch.linalg.svd(W)

    torch.testing.assert_close(start, (U[:, :4] * S[:4]) @ Vt[:4], atol=1e-5, rtol=1e-4)


def test_olora_starts_with_orthonormal_columns_of_the_weights_own_space():
    layer = lora_layers(with_adapter("Linear", "plain", "olora"))[PATH]
    W = layer.base.weight

    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A[:, :4], W[:, :4], atol=1e-5, rtol=1e-4)


def test_the_orthogonal_start_fills_A_and_B_and_their_product_is_zero():
    layer = lora_layers(with_adapter("Linear", "plain", "orthogonal"))[PATH]

    size = layer.lora_B.norm() * layer.lora_A.norm()
    assert layer.start_A is None
    assert (layer.lora_B @ layer.lora_A).norm() <= 1e-6 * size
    assert torch.linalg.matrix_rank(layer.lora_A) == torch.linalg.matrix_rank(layer.lora_B) == 2
    assert layer.lora_A.std().item() == pytest.approx(0.1 * sqrt(2 / 4), rel=0.2)  # PEFT's: r/2 of r directions, / 10


def test_an_odd_rank_has_no_orthogonal_halves():
    with pytest.raises(RecipeError, match=f"`lora.init` can't start {PATH}: a rank of 3 has no two halves"):
        inject(frozen("Linear"), config_of("plain", r=3), [PATH], init=INITS["orthogonal"])


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("storage", ["Linear4bit", "Linear8bitLt"])
def test_loftq_starts_at_the_best_completion_of_the_quantised_weight(storage, variant):
    """Li et al. 2023, algorithm 1: what is left of W − Q is what no rank-r update could hold (Eckart and Young)."""
    W = frozen("Linear").proj.weight.detach()
    model = frozen(storage)
    layer = inject(model, config_of(variant), [PATH], init=GIVEN_INITS["loftq"], given=lambda path: W)[PATH]
    Q = dense(layer.base).float()

    left = W - Q - layer.scale * layer.lora_B @ layer.lora_A

    S = torch.linalg.svdvals(W - Q)
    assert left.norm().item() == pytest.approx(S[4:].norm().item(), rel=1e-4)
    assert left.norm() < 0.97 * (W - Q).norm()
    if variant == "dora":  # its norm is that of what it computes
        torch.testing.assert_close(layer.magnitude, (W - left).norm(dim=1), atol=1e-5, rtol=1e-5)


def test_eva_starts_A_in_the_directions_given_and_the_function_at_the_base():
    model, directions = frozen("Linear"), torch.linalg.qr(torch.randn(IN, 4)).Q.T.contiguous()
    base = model(inputs())

    layer = inject(model, config_of("plain"), [PATH], init=GIVEN_INITS["eva"], given=lambda path: directions)[PATH]

    assert torch.equal(layer.lora_A, directions)
    assert torch.equal(model(inputs()), base)


def test_every_start_of_the_recipe_is_in_one_of_the_tables():
    assert [*INITS, *GIVEN_INITS] == list(LoRA.model_fields["init"].annotation.__args__)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_the_weight_has_no_directions_for_is_a_recipe_error(init):
    with pytest.raises(
        RecipeError, match=f"`lora.init` can't start {PATH}: a rank of {IN + 1} has no {IN + 1} directions"
    ):
        inject(frozen("Linear"), config_of("plain", r=IN + 1), [PATH], init=INITS[init])


def test_a_module_that_no_adapter_can_change_is_named():
    with pytest.raises(ModelError, match=r"model\.norm is a LlamaRMSNorm") as error:
        inject(tiny_model("llama"), config(), ["model.norm", "nowhere"])

    assert [problem.what for problem in error.value.problems][1] == "this model has no nowhere"


def test_high_ranks_are_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING, "lora_cli"):
        inject(tiny_model("llama"), config(r=65), QV)

    assert [record.getMessage() for record in caplog.records] == [
        "`lora.r` is 65: above 64, more data or more targets usually buy more than more rank",
        "the rank is above the width of 2 layers (model.layers.0.self_attn.q_proj …): it adds parameters there and "
        "nothing else",
    ]


def test_usual_ranks_are_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "lora_cli"):
        inject(tiny_model("llama"), config(r=8), QV)

    assert not caplog.records


def test_patterns_give_single_layers_their_rank_and_scale():
    patterned = config(rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 1})

    layers = inject(tiny_model("llama"), patterned, QV)

    assert [(len(layer.lora_A), layer.scale) for layer in layers.values()] == [(2, 4.0), (4, 0.25)]


def test_a_tied_head_can_be_wrapped_and_the_embedding_stays_what_it_was():
    model, ids = tiny_model("llama-tied"), torch.tensor([[5, 6, 7]])
    embedding = model.model.embed_tokens.weight.clone()

    layer = inject(model, config(), ["lm_head"])["lm_head"]
    layer.lora_B.data.normal_()

    assert layer.base.weight is model.model.embed_tokens.weight
    model(input_ids=ids).logits.sum().backward()
    assert layer.lora_B.grad is not None
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_wrapping_keeps_what_models_look_at():
    model = frozen("Linear")
    weight, bias = model.proj.weight, model.proj.bias

    layer = inject(model, config_of("plain"), [PATH])[PATH]

    assert layer.weight is weight
    assert layer.bias is bias


@pytest.mark.parametrize("storage", [row.class_name for row in STORAGES])
def test_a_storage_knows_the_shape_of_its_dense_weight(storage):
    layer = frozen(storage).proj

    row = storage_of(layer)

    assert row.class_name == storage
    assert row.shape(layer) == tuple(dense(layer).shape) == (OUT, IN)


@pytest.mark.parametrize("storage", [row.class_name for row in STORAGES])
def test_the_dense_weight_is_the_same_before_and_after_the_first_forward(storage):
    model = frozen(storage)
    before = dense(model.proj).clone()

    model(inputs(storage))

    assert torch.equal(dense(model.proj), before)


def test_what_is_no_weight_of_the_table_has_no_storage():
    assert storage_of(torch.nn.LayerNorm(3)) is None
    with pytest.raises(ValueError, match="LayerNorm has no weight of a known storage"):
        dense(torch.nn.LayerNorm(3))
    assert weights_of(Holder(torch.nn.LayerNorm(3))) == {}
