"""Adapters of every kind of weight, and of what is trained beside, as values: added, cut, compared, switched, merged.

Given two adapters of a base, A and B, and the model whose every parameter is W₀ + a (W_A − W₀) + b (W_B − W₀), where W_A
is what the base merged with A has: that is what a sum is, whatever an adapter changes.
"""

from dataclasses import replace

import pytest
import torch
from adapters import answers_of, load, random_adapter, updates, write_random
from layers import config_of, frozen, inputs, relative_difference, trained
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.errors import ModelError
from lora_cli.export.merged import merge
from lora_cli.export.names import parameters_of, weights_of_base
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.algebra import Term, compose, resize
from lora_cli.lora.inject import lora_layers
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.ranks import by_budget, by_energy, by_number
from lora_cli.lora.switch import switch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT's, on tied weights
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

AGREE = 5e-6  # of the largest logit: three models of float32 weights, added in different orders
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = {"trainable_tokens": (5, 17)}
DORA = {"use_dora": True}
# A base, and two adapters of it that share some of what they change
CASES = {
    "experts": ("mixtral", (EXPERTS, {}), ([*EXPERTS, "q_proj"], {"r": 3})),
    "some experts": ("qwen3_moe", (EXPERTS, {}), (EXPERTS[:1], {"use_rslora": True})),
    "turned experts": ("gpt_oss", (EXPERTS, {"r": 2}), (EXPERTS[1:], {})),
    "table": ("llama", (["embed_tokens", "v_proj"], {}), (["embed_tokens"], {"r": 6})),
    "tied head": ("llama-tied", (["lm_head"], {}), (["lm_head", "q_proj"], {"r": 3})),
    "both sides of a tie": ("llama-tied", (["embed_tokens", "lm_head"], {}), (["lm_head"], {"lora_alpha": 3})),
    "positions": ("gpt2", (["wpe", "c_attn"], {}), (["wpe"], {"r": 2})),
    "all biases": ("gpt2", (["c_attn"], {"bias": "all"}), (["c_attn"], {"bias": "all", "r": 2})),
    "biases of one": ("gpt2", (["c_attn"], {"bias": "all"}), (["mlp.c_fc"], {})),
    "biases of adapted modules": ("gpt2", (["c_attn"], {"bias": "lora_only"}), (["mlp.c_fc", "c_attn"], {})),
    "rows of tokens": ("llama", (["q_proj"], TOKENS), (["v_proj"], {"trainable_tokens": (17, 31)})),
    "rows under a tied head": ("llama-tied", (["q_proj"], TOKENS), (["q_proj"], {})),
    "doras": ("llama", (["q_proj", "v_proj"], DORA), (["v_proj", "down_proj"], DORA | {"use_rslora": True, "r": 2})),
    "dora and lora": ("gpt2", (["c_attn"], DORA), (["c_attn", "mlp.c_fc"], {"r": 2})),
    "dora of a table": ("llama", (["embed_tokens"], DORA), (["embed_tokens", "q_proj"], DORA)),
    "dora of a tied head": ("llama-tied", (["lm_head"], DORA), (["lm_head"], {})),
    "dora and biases": ("gpt2", (["c_attn"], DORA | {"bias": "all"}), (["c_attn"], DORA | {"bias": "all", "r": 2})),
    "modules trained whole": (
        "llama",
        (["q_proj"], {"whole": ["lm_head", "model.norm"]}),
        (["v_proj"], {"whole": ["model.norm"]}),
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    names = {base for base, *_ in CASES.values()}
    return {name: tiny_base(tmp_path_factory.mktemp(name) / "base", name) for name in names}


def pair(bases, case: str):
    name, *both = CASES[case]
    return bases[name], *(
        random_adapter(bases[name], targets, seed=seed, **settings) for seed, (targets, settings) in enumerate(both, 1)
    )


def merged_with(base, adapter, out) -> dict[str, torch.Tensor]:
    """Every parameter of base + adapter, as a merge writes it; both sides of a tie."""
    merge(base, adapter, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()


def assert_same(got, expected, tolerance: float = AGREE) -> None:
    assert max(relative_difference(one, other) for one, other in zip(got, expected, strict=True)) <= tolerance


@pytest.mark.parametrize("weights", [(0.7, -0.4), (0.75, 0.25)])
@pytest.mark.parametrize("case", CASES)
def test_unmerged_merged_and_composed_are_one_function(case, weights, bases, tmp_path):
    base, *adapters = pair(bases, case)
    own = {name: tensor.clone() for name, tensor in load(base).state_dict().items()}
    total = dict(own)
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        found = merged_with(base, adapter, tmp_path / str(number))
        total = {name: tensor + weight * (found[name] - own[name]) for name, tensor in total.items()}
    by_hand = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=False).eval()
    by_hand.load_state_dict(total)
    expected = answers_of(by_hand)

    composed, fits = compose(
        [Term(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)],
        read=parameters_of(base),
        own=weights_of_base(base, adapters),
    )

    model = load(base)
    composed.inject_into(model)
    assert_same(answers_of(model), expected)
    merged_with(base, composed, tmp_path / "both")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32).eval()
    assert_same(answers_of(merged), expected)
    assert max(fit.error for fit in fits.values()) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_every_kind_take_turns_on_one_base_and_leave_it_bit_for_bit(case, bases):
    base, a, b = pair(bases, case)
    fresh = {}
    for name, adapter in (("a", a), ("b", b), (None, None)):
        model = load(base)
        switch(model, adapter)
        fresh[name] = answers_of(model)
    model = load(base)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}

    for name in ("a", "b", None, "b", "a", None):
        switch(model, {"a": a, "b": b, None: None}[name])
        assert_same(answers_of(model), fresh[name], 0)

    after = model.state_dict()
    assert all(after[name].data_ptr() == place and torch.equal(after[name], W) for name, (place, W) in before.items())


@pytest.mark.parametrize("case", [case for case in CASES if "dora" not in case])
def test_a_cut_is_the_best_of_its_rank_and_keeps_what_stands_beside(case, bases, tmp_path):
    _, adapter, _ = pair(bases, case)

    small, fits = resize(adapter, lambda found: by_number(found, 2))
    by_share, _ = resize(adapter, lambda found: by_energy(found, 0.5))

    for path, update in updates(adapter).items():
        S = torch.linalg.svdvals(update)
        assert torch.linalg.norm(update - updates(small)[path]) == pytest.approx(
            S[2:].norm().item(), rel=1e-3, abs=1e-6
        )
        assert fits[path].error == pytest.approx((S[2:].norm() / S.norm()).item(), rel=1e-4, abs=1e-6)
        held = updates(by_share)[path].square().sum() / update.square().sum()
        assert held >= 0.5 - 1e-6
    assert small.extras == adapter.extras
    save_adapter(small, tmp_path / "small")
    assert load_adapter(tmp_path / "small").digest() == small.digest()


@pytest.mark.parametrize("case", ["experts", "turned experts", "table"])
def test_a_budget_counts_the_rank_that_all_experts_of_a_parameter_have(case, bases):
    _, adapter, _ = pair(bases, case)
    limit = int(0.7 * adapter.parameters)

    small, _ = resize(adapter, lambda found: by_budget(found, limit))

    assert 0.5 * limit < small.parameters <= limit


@pytest.mark.parametrize("storage", ["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions_are_values_too(storage):
    models = [trained(storage, "plain"), trained(storage, "rslora")]
    x = inputs(storage)
    adapters = [Adapter.of(model, replace(config_of_model(model), use_rslora=False)) for model in models]
    plain = frozen(storage)(x)
    expected = plain + 0.5 * (models[0](x) - plain) - 0.3 * (with_adapter_of(storage, adapters[1])(x) - plain)

    both, _ = compose([Term(adapters[0], 0.5), Term(adapters[1], -0.3)])

    assert relative_difference(with_adapter_of(storage, both)(x), expected) <= AGREE
    small, fits = resize(both, lambda found: by_number(found, 3))
    S = torch.linalg.svdvals(updates(both)["proj"])
    assert fits["proj"].error == pytest.approx((S[3:].norm() / S.norm()).item(), rel=1e-4)
    assert with_adapter_of(storage, small)(x).shape == expected.shape


def config_of_model(model):
    [layer] = lora_layers(model).values()
    return config_of("plain", r=layer.r, lora_alpha=layer.r * layer.scale)


def with_adapter_of(storage: str, adapter: Adapter):
    model = frozen(storage)
    adapter.inject_into(model)
    return model


WHOLE = {"whole": ["lm_head"]}
REFUSED = {
    "needs the base": (
        (["q_proj"], WHOLE, 0.5),
        (["v_proj"], {}, 1.0),
        r"the weights of the adapters that train lm_head.weight don't add up to 1",
    ),
    "whole and adapted": (
        (["q_proj"], WHOLE, 1.0),
        (["lm_head"], {}, 1.0),
        "adapts lm_head, and another adapter trains the whole of lm_head",
    ),
    "rows and adapted": (
        (["q_proj"], TOKENS, 1.0),
        (["embed_tokens"], {}, 1.0),
        "adapts model.embed_tokens, and .* trains the rows of some tokens there",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_added_is_refused_with_its_reason(case, bases):
    *both, reason = REFUSED[case]
    terms = [Term(random_adapter(bases["llama"], targets, **settings), weight) for targets, settings, weight in both]

    with pytest.raises(ModelError, match=reason):
        compose(terms)


@pytest.mark.parametrize("case", ["experts", "table", "all biases", "rows of tokens", "modules trained whole"])
def test_the_commands_take_every_kind(case, bases, lora, tmp_path):
    name, *both = CASES[case]
    a, b = (
        write_random(tmp_path / out, bases[name], targets, seed=seed, **settings)
        for seed, (out, (targets, settings)) in enumerate(zip("ab", both, strict=True))
    )

    composed = lora("compose", a, b, "--weights", "0.7,0.5", "--base", bases[name], "--out", tmp_path / "ab", "--json")
    lora("resize", tmp_path / "ab", "--r", 2, "--out", tmp_path / "small")
    inspected = lora("inspect", a, "--base", bases[name], "--json").json
    compared = lora("diff", a, tmp_path / "ab", "--json").json

    assert composed.json["error"] < 1e-6
    adapter = load_adapter(a)
    assert [module["path"] for module in inspected["modules"]] == list(adapter.layers)
    assert inspected["dead"] == []
    assert {part["path"] for part in inspected["beside"]} == set(adapter.extras)
    assert all(part["relative"] > 0 for part in inspected["beside"] if part["relative"] is not None)
    theirs = load_adapter(tmp_path / "ab").extras
    for part in compared["beside"]:
        if part["path"] in adapter.extras and part["kind"] != "rows":
            one, two = (
                [state[n].flatten() for n in state] for state in (adapter.extras[part["path"]], theirs[part["path"]])
            )
            expected = (torch.cat(one) - torch.cat(two)).norm() / torch.cat(one).norm()
            assert part["relative"] == pytest.approx(expected.item(), rel=1e-5)
    assert [module["path"] for module in compared["modules"]] == [
        path for path in adapter.layers if path in load_adapter(tmp_path / "ab").layers
    ]
