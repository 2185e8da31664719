"""Every method on every weight: the laws of an adapter, and PEFT beside it, over the table that docs/weights.md shows."""

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from layers import MAKERS, frozen, inputs, randomize, relative_difference
from method_by_weight import (
    INSIDE,
    METHODS,
    NO_BIAS,
    NO_MAGNITUDE,
    NO_VECTORS,
    NOT_THERE,
    NOTHING_LOST,
    WEIGHTS,
    WITHOUT,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ENCODERS, tiny_base, tiny_encoder_model, tiny_model, tiny_vit
from torch import Tensor, nn

from lora_cli.budget.modules import biases_of, counted
from lora_cli.budget.params import budget_of
from lora_cli.errors import ModelError
from lora_cli.export.proof import merge_in_memory
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.init import GIVEN_INITS, INITS
from lora_cli.lora.inject import disabled, inject, lora_layers, names_of_targets
from lora_cli.lora.layer import merged_weight
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.targets import choose_targets
from lora_cli.lora.weights import fan_in_fan_out, weights_of
from lora_cli.models.base import Base
from lora_cli.models.load import load_model
from lora_cli.recipe.rules import loftq_completes_a_quantised_base
from lora_cli.recipe.schema import LoRA, Recipe
from lora_cli.runs.starts import Beginning, by_variance, with_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT's, on tied weights
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),  # which PEFT needs to merge
    # PEFT gives parameters the ranks of their patterns, and then looks for these among modules alone
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64, 1, 2]])
# float32, against the largest output: the same sums in another order; with DoRA quotients of norms, and PiSSA and OLoRA
# take a start off again that is as large as the weight
AGREE, AGREE_LARGE = 2e-6, 1e-5
CELLS = [(weight, method) for weight in WEIGHTS for method in METHODS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), "qwen2")


def model_of(weight: str, folder: Path, quantize: str | None = None) -> nn.Module:
    """The same at every call."""
    name, quantize = WEIGHTS[weight].model, quantize or WEIGHTS[weight].quantize
    if quantize == "torchao":
        return in_torchao(load_model(Base("tiny", folder), dtype=torch.float32).eval())
    if quantize != "none":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return load_model(Base("tiny", folder), dtype=torch.float32, quantize=quantize).eval()
    if name in MAKERS:
        return frozen(name)
    if name == "vit":
        return tiny_vit()
    model = tiny_encoder_model(name) if name in ENCODERS else tiny_model(name)
    with torch.no_grad():  # tokens that pad begin at zero, and DoRA divides by the norm of a row: PEFT gives NaN there
        model.get_input_embeddings().weight.add_(0.01)
    return model


def in_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    blocks = model.base_model.layers
    quantization.quantize_(blocks, quantization.Int8WeightOnlyConfig())
    return model.requires_grad_(False)


@torch.no_grad()
def answers(weight: str, model: nn.Module) -> Tensor:
    name = WEIGHTS[weight].model
    if name in MAKERS:
        return model.eval()(inputs(name))
    if name == "vit":
        picture = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        return model.eval()(pixel_values=picture).last_hidden_state
    output = model.eval()(input_ids=IDS)
    return output.last_hidden_state if name in ENCODERS else output.logits


@cache
def answers_of_base(weight: str, folder: Path) -> Tensor:
    return answers(weight, model_of(weight, folder))


def with_adapter(weight: str, method: str, folder: Path) -> tuple[nn.Module, LoRAConfig, list[str]]:
    model = model_of(weight, folder)
    weights = weights_of(model)
    paths = choose_targets(WEIGHTS[weight].targets, list(weights))
    lora = LoRA(r=4, alpha=6, **METHODS[method])
    begun = beginning(weight, model, paths, lora, folder)
    modules, parameters = names_of_targets(model, begun.paths)
    config = with_ranks(lora, begun.ranks).config(modules, target_parameters=parameters, task_type=None)
    inject(model, config, begun.paths, init=begun.init, given=begun.given, seed=1)
    return model, config, begun.paths


def beginning(weight: str, model: nn.Module, paths: list[str], lora: LoRA, folder: Path) -> Beginning:
    if lora.init == "loftq":
        whole = weights_of(model_of(weight, folder, "none"))
        return Beginning(GIVEN_INITS["loftq"], paths, lambda path: whole[path].dense())
    if lora.init == "eva":
        return by_variance(lora, model, paths, [lambda: answers(weight, model)])
    return Beginning(INITS[lora.init], paths)


def check_start(weight: str, method: str, model: nn.Module, folder: Path) -> None:
    if method != "LoftQ":
        assert relative_difference(answers(weight, model), answers_of_base(weight, folder)) <= agree(method)
        return
    whole = weights_of(model_of(weight, folder, "none"))
    for path, layer in lora_layers(model).items():
        W, Q = whole[path].dense(), layer.dense()
        assert (merged_weight(Q, *layer.factors(), layer.scale) - W).norm() < 0.9 * (Q - W).norm()


def agree(method: str) -> float:
    return AGREE_LARGE if method in ("DoRA", "PiSSA", "OLoRA") else AGREE


@pytest.mark.parametrize(("weight", "method"), [cell for cell in CELLS if cell not in WITHOUT])
def test_a_method_on_a_weight(weight, method, folder, tmp_path):
    base = answers_of_base(weight, folder)

    # it starts at the base
    model, config, paths = with_adapter(weight, method, folder)
    check_start(weight, method, model, folder)

    # switched off, it is the base bit for bit
    randomize(model, size=0.1)
    expected = answers(weight, model)
    with disabled(model):
        assert torch.equal(answers(weight, model), base)
    assert relative_difference(expected, base) > 1e-3

    # it has as many parameters as the formula says: twice as many where a start has become part of it
    adapter = Adapter.of(model, config)
    bare = model_of(weight, folder)
    weights, biases = weights_of(bare), biases_of(bare, config.bias, paths)
    budget = budget_of(counted({path: weights[path] for path in paths}), 0, config, biases=biases)
    held = budget.trainable + sum(row.count * row.frozen for row in budget.rows)
    assert adapter.parameters == held * (2 if method in ("PiSSA", "OLoRA") else 1)

    # it reads back as it was written
    save_adapter(adapter, tmp_path, transposed=fan_in_fan_out(weights[path] for path in paths))
    again = model_of(weight, folder)
    load_adapter(tmp_path).inject_into(again)
    # a convolution chooses how it sums by where its weights lie in memory
    assert relative_difference(answers(weight, again), expected) <= (AGREE if "onv" in weight else 0)

    # PEFT reads it; its warnings, of keys that are missing or unexpected, are errors here
    theirs = PeftModel.from_pretrained(model_of(weight, folder), tmp_path)
    assert relative_difference(answers(weight, theirs), expected) <= agree(method)

    # merged, it answers the same
    if WEIGHTS[weight].quantize == "none":
        merge_in_memory(again, load_adapter(tmp_path), torch.float32)
        assert relative_difference(answers(weight, again), expected) <= agree(method)
        assert not any("lora" in name for name, _ in again.named_parameters())


REFUSED = {
    NO_MAGNITUDE: "can't get an adapter: PEFT's format has no magnitudes for experts",
    NO_VECTORS: "`lora.init: eva` looks at the inputs of linear layers, and .* is none",
    INSIDE: "`lora.bias: all` trains what is added to a module's output, and the bias of .*router is not",
    NO_BIAS: "`lora.bias: (all|lora_only)`: (this model has|the adapted modules have) no bias",
}


@pytest.mark.parametrize(("weight", "method"), [cell for cell in WITHOUT if WITHOUT[cell] in REFUSED])
def test_what_is_no_cell_of_the_table_is_refused_with_the_reason(weight, method, folder):
    with pytest.raises(ModelError, match=REFUSED[WITHOUT[weight, method]]):
        with_adapter(weight, method, folder)


def test_a_completion_of_what_is_not_quantised_is_refused_by_the_recipe():
    """Also of what is quantised on disk: `model.quantize` is not set there."""
    assert set(WITHOUT.values()) - set(REFUSED) == {NOTHING_LOST, NOT_THERE}
    recipe = Recipe(model={"base": "x"}, lora={"init": "loftq"}, data={"train": "x.jsonl"})

    assert "and `model.quantize` is `none`" in loftq_completes_a_quantised_base(recipe).what


def test_what_the_table_leaves_out_is_in_it():
    assert set(WITHOUT) <= set(CELLS)


PEFTS = {
    "the table": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "the tied head": ("llama-tied", {"target_modules": ["lm_head"]}),
    "experts": (
        "mixtral",
        {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one of the experts' weights": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "turned experts": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    ),
    "a picture's patches": ("vit", {"target_modules": ["projection", "q_proj"]}),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("case", PEFTS)
def test_we_read_what_peft_wrote(case, use_dora, tmp_path):
    """Also the copies of embedding and head that it saves in full; they are named and not read."""
    name, settings = PEFTS[case]
    if use_dora and "target_parameters" in settings:
        pytest.skip("PEFT has no DoRA of parameters")
    weight = next(weight for weight, row in WEIGHTS.items() if row.model == name)
    torch.manual_seed(4)
    theirs = get_peft_model(
        model_of(weight, Path()),
        LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, use_dora=use_dora, **settings),
    )
    theirs.save_pretrained(tmp_path, save_embedding_layers="llama" in name)
    expected = answers(weight, theirs)

    ours = model_of(weight, Path())
    load_adapter(tmp_path).inject_into(ours)

    assert relative_difference(answers(weight, ours), expected) <= agree("DoRA")
    assert relative_difference(expected, answers_of_base(weight, Path())) > 1e-3
