import pytest
from tiny import tiny_base, tiny_model

from lora_cli.budget.bases import measure_base
from lora_cli.budget.memory import base_bytes, compare
from lora_cli.budget.params import adapted_linears, budget_of, largest_r, parse_limit
from lora_cli.budget.quantised import NF4
from lora_cli.budget.shapes import Linear
from lora_cli.errors import RecipeError
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject
from lora_cli.lora.targets import choose_targets
from lora_cli.lora.weights import weights_of


def config(r: int = 8, **options) -> LoRAConfig:
    return LoRAConfig(r=r, lora_alpha=2 * r, target_modules=(), **options)


def budget(name: str, targets: str, lora: LoRAConfig):
    shape = measure_base(name).shape
    return budget_of(adapted_linears(shape, targets), shape.parameters, lora)


@pytest.mark.parametrize(
    ("r", "targets", "expected"),
    [
        (8, "qv", (4_194_304, 6_742_609_920, "0.0622")),
        (16, "qkvo", (16_777_216, 6_755_192_832, "0.2484")),
    ],
)
def test_the_reference_figures_of_llama_2(r, targets, expected):
    found = budget("Llama-2-7B", targets, config(r))

    assert (found.trainable, found.total, f"{100 * found.share:.4f}") == expected


def test_the_rows_add_up_and_are_one_a_kind_of_module():
    found = budget("Qwen2.5-0.5B", "all-linear", config())

    assert [row.module for row in found.rows] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert {row.count for row in found.rows} == {24}
    assert found.trainable == sum(row.count * row.r * (row.in_features + row.out_features) for row in found.rows)
    assert found.adapter_bytes == 4 * found.trainable


def test_a_name_that_says_too_little_is_shown_with_its_parents():
    assert [row.module for row in budget("GPT-2", "od", config()).rows] == ["attn.c_proj", "mlp.c_proj"]
    assert [row.module for row in budget("BERT-base", "qd", config()).rows] == ["query", "output.dense"]


def test_another_rank_for_some_modules_is_another_row():
    found = budget("GPT-2", "qv", config(4, rank_pattern={"h.0.attn.c_attn": 16}))

    assert [(row.r, row.count) for row in found.rows] == [(16, 1), (4, 11)]


def test_a_frozen_A_is_stored_and_not_trained():
    linear, lora = Linear("q_proj", 10, 7), config(2, freeze_A=True, use_dora=True)

    found, plain = (budget_of([linear], 100, c) for c in (lora, config(2, use_dora=True)))

    assert (found.trainable, plain.trainable) == (2 * 7 + 7, 2 * (10 + 7) + 7)
    assert found.adapter_bytes == plain.adapter_bytes
    assert found.total == plain.total


def test_dora_adds_one_magnitude_an_output():
    linear = Linear("q_proj", 10, 7)

    plain, dora = (budget_of([linear], 0, config(2, use_dora=use)).trainable for use in (False, True))

    assert dora - plain == 7


@pytest.mark.parametrize("lora", [config(), config(use_dora=True), config(rank_pattern={"k_proj": 2})], ids=repr)
@pytest.mark.parametrize("limit", [200_000, 5_000_000, 123_456_789])
def test_the_largest_r_is_within_the_limit_and_the_next_is_not(lora, limit):
    adapted = adapted_linears(measure_base("SmolLM2-135M").shape, "qkv")
    options = {"use_dora": lora.use_dora, "rank_pattern": lora.rank_pattern}

    r = largest_r(adapted, lora, limit)

    trained, next_one = (budget_of(adapted, 0, config(n, **options)).trainable for n in (r, r + 1))
    assert trained <= limit < next_one


def test_a_limit_below_r_1_is_refused():
    adapted = adapted_linears(measure_base("Llama-2-7B").shape, "qv")

    with pytest.raises(RecipeError) as caught:
        largest_r(adapted, config(), 500_000)

    assert str(caught.value) == (
        "error: `--budget` allows 500,000 parameters, and r = 1 on these targets already trains 524,288\n"
        "  fix: name fewer targets, or allow more"
    )


def test_a_limit_cannot_choose_where_every_rank_is_set():
    adapted = adapted_linears(measure_base("GPT-2").shape, "qv")

    with pytest.raises(RecipeError, match=r"`lora.rank_pattern` sets the rank of every module"):
        largest_r(adapted, config(rank_pattern={"c_attn": 4}), 10**9)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [("5M", 5 * 10**6), ("300k", 300_000), ("1.5B", 15 * 10**8), ("2G", 2 * 10**9), ("4096", 4096)],
)
def test_a_limit_is_a_number_with_a_unit(text, parameters):
    assert parse_limit(text, base_parameters=1) == parameters


def test_a_limit_in_percent_is_the_share_that_the_table_shows():
    trained = parse_limit("0.1%", base_parameters=10**9)

    assert trained / (10**9 + trained) <= 0.001 < (trained + 1) / (10**9 + trained + 1)


@pytest.mark.parametrize("text", ["", "M", "five", "-1M", "0", "100%", "nan", "inf", "5 apples"])
def test_what_is_no_limit_is_refused_with_an_example(text):
    with pytest.raises(RecipeError, match="such as `5M` or `300K`"):
        parse_limit(text, base_parameters=1)


def test_full_training_keeps_16_bytes_a_parameter_and_an_adapter_16_of_its_own():
    shape = measure_base("Llama-2-7B").shape
    found = budget("Llama-2-7B", "qv", config())

    full, lora, qlora = compare(shape, found)

    assert full.total_bytes == 16 * shape.parameters
    assert lora.total_bytes == 2 * shape.parameters + 16 * found.trainable
    assert qlora.total_bytes == base_bytes(shape, NF4) + 16 * found.trainable


def test_nf4_leaves_experts_embeddings_norms_and_head_in_16_bits():
    shape = measure_base("Mixtral-8x7B").shape
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)

    found = base_bytes(shape, NF4) - 2 * (shape.parameters - attention)

    assert found == pytest.approx(attention * NF4.bits_a_weight / 8, rel=1e-3)  # each layer has tables beside it


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["embed_tokens"]),
        ("llama-tied", ["embed_tokens", "lm_head"]),
        ("mixtral", ["experts.gate_up_proj", "experts.down_proj", "q_proj"]),
        ("qwen3_moe", ["experts.down_proj"]),
    ],
)
def test_what_is_no_linear_layer_is_counted_on_the_modules(name, targets, tmp_path):
    base = measure_base(str(tiny_base(tmp_path, name)), targets=targets)
    lora = LoRAConfig(r=3, lora_alpha=3, target_modules=())

    found = budget_of(adapted_linears(base.shape, targets), base.shape.parameters, lora)

    model = tiny_model(name)
    inject(model, lora, choose_targets(targets, list(weights_of(model))))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in model.parameters())
