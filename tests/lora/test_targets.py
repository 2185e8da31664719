"""Which modules letters, names, patterns and `all-linear` reach, on every architecture."""

import re
from functools import cache

import pytest
from tiny import CONFIGS, tiny_model

from lora_cli.errors import ModelError
from lora_cli.lora.inject import linears
from lora_cli.lora.targets import ALL_LINEAR, choose_targets, fused_notices, layer_index, shortest_suffixes
from lora_cli.models.load import head_paths

LLAMA = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "g": "gate_proj", "u": "up_proj", "d": "down_proj"}
NEOX = {"qkv": "query_key_value", "o": "dense", "u": "dense_h_to_4h", "d": "dense_4h_to_h"}
# Letters that reach one and the same module stand together; `g` is missing where the MLP has no gate
LETTERS = dict.fromkeys(("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), LLAMA) | {
    "phi3": {"qkv": "qkv_proj", "o": "o_proj", "gu": "gate_up_proj", "d": "down_proj"},
    "gpt2": {"qkv": "attn.c_attn", "o": "attn.c_proj", "u": "mlp.c_fc", "d": "mlp.c_proj"},
    "gpt_neox": NEOX,
    "falcon": NEOX,
    "opt": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "u": "fc1", "d": "fc2"},
    "mixtral": {letter: LLAMA[letter] for letter in "qkvo"},  # its experts are no linear layers
}


@cache
def modules(name: str) -> tuple[list[str], frozenset[str], list[str]]:
    """Linear layers, heads, and all modules of a tiny model."""
    model = tiny_model(name)
    return list(linears(model)), frozenset(head_paths(model)), [path for path, _ in model.named_modules() if path]


def choose(name: str, targets, **settings) -> list[str]:
    paths, head, _ = modules(name)
    return choose_targets(targets, paths, head=head, **settings)


def in_both_blocks(name: str, ending: str) -> list[str]:
    return [path for path in modules(name)[0] if path.endswith("." + ending)]


def test_every_tiny_architecture_is_in_the_table():
    assert set(LETTERS) == set(CONFIGS)


@pytest.mark.parametrize(
    ("name", "letter", "module"),
    [(name, letter, module) for name, row in LETTERS.items() for letters, module in row.items() for letter in letters],
)
def test_a_letter_reaches_its_projection_in_every_block_and_nothing_else(name, letter, module):
    chosen = choose(name, letter)

    assert chosen == in_both_blocks(name, module)
    assert len(chosen) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_letters_of_an_architecture_together_are_all_linear_layers_but_the_head(name):
    every_letter = "".join(LETTERS[name])

    assert choose(name, every_letter) == choose(name, ALL_LINEAR)
    assert choose(name, ALL_LINEAR) == [path for path in modules(name)[0] if path != head_of(name)]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_explicit_name_reaches_the_head(name):
    assert choose(name, [head_of(name)]) == [head_of(name)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_letter_that_the_architecture_lacks_is_named_with_those_it_has(name):
    lacking = [letter for letter in LLAMA if letter not in "".join(LETTERS[name])]

    for letter in lacking:
        with pytest.raises(ModelError, match=f"`{letter}` in `lora.targets: {letter}` matches nothing"):
            choose(name, letter)


def test_a_missing_letter_is_told_in_one_block():
    with pytest.raises(ModelError) as error:
        choose("gpt2", "qg")

    assert str(error.value) == (
        "error: `g` in `lora.targets: qg` matches nothing: this model has no MLP gate projection\n"
        "  fix: letters here: q k v o u d; its linear layers are c_attn, c_proj, c_fc"
    )


def test_a_name_that_matches_nothing_is_told_with_the_nearest_modules():
    with pytest.raises(ModelError) as error:
        choose("llama", ["q_prj", "down"])

    assert str(error.value) == (
        "error: `q_prj` in `lora.targets` matches no weight of this model that can get an adapter\n"
        "  fix: the nearest: q_proj, v_proj, o_proj, k_proj, up_proj, gate_proj, down_proj\n"
        "\n"
        "error: `down` in `lora.targets` matches no weight of this model that can get an adapter\n"
        "  fix: the nearest: down_proj"
    )


def test_an_exclusion_that_matches_nothing_is_an_error_too():
    with pytest.raises(
        ModelError, match=r"`mlp_up` in `lora\.exclude` matches no weight of this model that can get an adapter"
    ):
        choose("llama", ALL_LINEAR, exclude=["mlp_up"])


def test_a_broken_pattern_is_told_as_one():
    with pytest.raises(ModelError, match=re.escape("`*_proj` in `lora.targets` is not a valid pattern")):
        choose("llama", ["*_proj"])


def test_nothing_left_is_an_error():
    with pytest.raises(ModelError, match=r"no module is left to adapt after `lora\.exclude` and `lora\.layers`"):
        choose("llama", "q", exclude=["q_proj"])
    with pytest.raises(ModelError, match="no module is left to adapt"):
        choose("llama", "q", layers=[7])


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("v_proj", ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        ("layers.1.self_attn.v_proj", ["model.layers.1.self_attn.v_proj"]),
        ("0.*.v_proj", ["model.layers.0.self_attn.v_proj"]),
        ("model.layers.0.mlp.(up|down)_proj", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_a_pattern_is_a_regular_expression_over_the_end_of_the_path(pattern, paths):
    assert choose("llama", [pattern]) == paths
    assert choose("llama", pattern) == paths


@pytest.mark.parametrize("pattern", ["proj", "_proj", "ayers.0.self_attn.q_proj", "self_attn", "head", "q_pro"])
def test_a_pattern_is_anchored_to_whole_name_segments(pattern):
    with pytest.raises(ModelError):
        choose("llama", [pattern])


def test_a_name_made_of_letters_alone_is_read_as_letters_only_when_it_stands_by_itself():
    assert choose("llama", "qv") == choose("llama", ["q_proj", "v_proj"])
    with pytest.raises(
        ModelError, match=r"`qv` in `lora\.targets` matches no weight of this model that can get an adapter"
    ):
        choose("llama", ["qv"])


def test_exclude_and_layers_take_modules_out():
    chosen = choose("llama", ALL_LINEAR, exclude=["self_attn.*", "layers.1.mlp.up_proj"], layers=[1])

    assert chosen == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]


def test_the_order_is_the_models_whatever_the_order_of_the_targets():
    assert choose("llama", ["v_proj", "q_proj"]) == choose("llama", ["q_proj", "v_proj"])
    assert choose("llama", "vq") == choose("llama", "qv")


def test_a_layers_number_is_the_first_in_its_path():
    assert layer_index("model.layers.13.mlp.experts.2.w1") == 13
    assert layer_index("lm_head") is None


def test_fused_modules_that_letters_name_in_part_are_told_once():
    def notices(name, letters):
        return fused_notices(letters, choose(name, letters))

    assert notices("gpt2", "qv") == ["`c_attn` holds q k v in one weight: `qv` adapts the whole of it"]
    assert notices("phi3", "u") == ["`gate_up_proj` holds g u in one weight: `u` adapts the whole of it"]
    assert notices("gpt2", "qkv") == notices("llama", "qv") == notices("gpt2", ALL_LINEAR) == []


def pefts_choice(target_modules, paths) -> set[str]:
    """PEFT's rule for a list of names."""
    return {key for key in paths if any(key == t or key.endswith("." + t) for t in target_modules)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_saved_target_modules_name_exactly_the_chosen_ones_among_all_modules(name):
    _, head, every_module = modules(name)
    letters = list(LETTERS[name])
    choices = [choose(name, "".join(some)) for some in subsets(letters)] + [choose(name, ALL_LINEAR), list(head)]
    choices += [choose(name, ALL_LINEAR, layers=[1]), choose(name, letters[0], layers=[0])]

    for chosen in choices:
        names = shortest_suffixes(chosen, every_module)

        assert pefts_choice(names, every_module) == set(chosen)
        assert list(names) == sorted(names)


def test_the_saved_target_modules_are_as_short_as_they_can_be():
    def saved(name, *args, **settings):
        return shortest_suffixes(choose(name, *args, **settings), modules(name)[2])

    assert saved("llama", "qv") == ("q_proj", "v_proj")
    assert saved("gpt2", "o") == ("attn.c_proj",)  # c_proj alone would be the MLP's too
    assert saved("gpt2", "od") == ("c_proj",)
    assert saved("llama", "q", layers=[1]) == ("1.self_attn.q_proj",)


def head_of(name: str) -> str:
    (head,) = modules(name)[1]
    return head


def subsets(letters: list[str]) -> list[list[str]]:
    return [[x for i, x in enumerate(letters) if mask >> i & 1] for mask in range(1, 2 ** len(letters))]
