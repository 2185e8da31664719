"""Modules trained whole: they begin as the base's, the base stays as it was, and PEFT reads and writes the same."""

import pytest
import torch
from adapters import answers_of, load, logits_of, write_random
from layers import randomize, relative_difference
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_base, tiny_model
from torch import nn

from lora_cli.errors import DivergedError, ModelError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import disabled, frozen_digest, inject
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.targets import choose_targets, choose_whole, names_to_save
from lora_cli.lora.whole import TrainedWhole, check_whole, whole_modules
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

# PEFT asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64, 1, 2]])
AGREE = 1e-6
WHOLE = ["model.embed_tokens", "model.norm", "lm_head"]
LORA = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]


def config(model: nn.Module, whole=WHOLE) -> LoRAConfig:
    every = [name for name, _ in model.named_modules()]
    names = names_to_save(whole, every)
    return LoRAConfig(r=4, lora_alpha=6, target_modules=("q_proj", "v_proj"), modules_to_save=names)


def with_whole(model: nn.Module, whole=WHOLE) -> nn.Module:
    inject(model, config(model, whole), LORA, whole=whole)
    return model


def trained(model: nn.Module) -> nn.Module:
    """As if trained for long: every trained parameter has moved."""
    randomize(model, size=0.1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in whole_modules(model).values():
            for parameter in module.trained.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_before_training_the_function_is_the_bases(dtype):
    expected = logits(tiny_model("llama", dtype=dtype))

    assert torch.equal(logits(with_whole(tiny_model("llama", dtype=dtype))), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_disabled_adapter_is_the_base_bit_for_bit_after_training(dtype):
    base, model = tiny_model("llama", dtype=dtype), trained(with_whole(tiny_model("llama", dtype=dtype)))
    assert not torch.equal(logits(model), logits(base))

    with disabled(model):
        assert torch.equal(logits(model), logits(base))


def test_what_is_trained_is_a_float32_copy_and_the_base_gets_no_gradient():
    model = with_whole(tiny_model("llama", dtype=torch.bfloat16))
    before = frozen_digest(model)

    out = model(input_ids=IDS).logits
    out.float().square().sum().backward()

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert out.dtype == torch.bfloat16, "the products run in the type of the base"
    assert set(trainable) == {f"{path}.trained.weight" for path in WHOLE}
    assert all(p.dtype == torch.float32 and p.grad.any() for p in trainable.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert frozen_digest(model) == before


def test_a_module_is_read_as_the_one_whose_place_it_takes():
    model = with_whole(tiny_model("llama"))

    assert model.get_input_embeddings().num_embeddings == 320
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.lm_head.nothing_like_it


def test_an_adapter_holds_what_is_trained_whole_and_gives_it_back(tmp_path):
    model = trained(with_whole(tiny_model("llama")))
    adapter = Adapter.of(model, model_config := config(tiny_model("llama")))
    save_adapter(adapter, tmp_path)

    loaded = load_adapter(tmp_path)
    again = tiny_model("llama")
    loaded.inject_into(again)

    assert loaded.digest() == adapter.digest()
    assert loaded.config.modules_to_save == model_config.modules_to_save
    assert torch.equal(logits(again), logits(model))
    assert adapter.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_another_head_is_another_adapter():
    model = trained(with_whole(tiny_model("llama")))
    before = Adapter.of(model, config(tiny_model("llama"))).digest()

    with torch.no_grad():
        model.model.norm.trained.weight[0] += 1

    assert Adapter.of(model, config(tiny_model("llama"))).digest() != before


def test_peft_reads_ours(tmp_path):
    base = tiny_base(tmp_path / "base")
    model = trained(with_whole(load_model(Base("base", base), dtype=torch.float32)))
    save_adapter(Adapter.of(model, config(tiny_model("llama"))), tmp_path / "adapter")

    theirs = PeftModel.from_pretrained(load_model(Base("base", base), dtype=torch.float32), tmp_path / "adapter")

    assert relative_difference(logits(theirs), logits(model)) <= AGREE


def test_we_read_peft(tmp_path):
    base = tiny_base(tmp_path / "base")
    asked = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["norm", "lm_head"])
    theirs = get_peft_model(load_model(Base("base", base), dtype=torch.float32), asked)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")

    ours = load_model(Base("base", base), dtype=torch.float32)
    adapter = load_adapter(tmp_path / "adapter")
    adapter.inject_into(ours)

    norms = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
    assert set(adapter.extras) == {"lm_head", "model.norm", *norms}, "`norm` is the end of every `layernorm` in PEFT"
    assert relative_difference(logits(ours), logits(theirs)) <= AGREE


def test_names_end_as_no_other_module_does():
    every = ["model.norm", "model.layers.0.input_layernorm", "score", "model.embed_tokens"]

    assert names_to_save(["model.norm"], every) == ("model.norm",)
    assert names_to_save(["model.embed_tokens", "score"], every) == ("embed_tokens", "score")
    assert names_to_save(["model.norm", "model.layers.0.input_layernorm"], every) == ("input_layernorm", "norm")


def test_the_outermost_module_of_those_named_is_trained():
    assert choose_whole(["mlp", ".*up_proj"], ["a.mlp", "a.mlp.up_proj", "b.up_proj"]) == ["a.mlp", "b.up_proj"]


def test_a_name_that_matches_no_module_names_the_nearest():
    with pytest.raises(ModelError) as caught:
        choose_whole(["lm_haed"], ["model.embed_tokens", "lm_head"])

    assert str(caught.value) == (
        "error: `lm_haed` in `lora.modules_to_save` matches no module of this model\n  fix: the nearest: lm_head"
    )


def test_letters_leave_out_what_is_trained_whole_and_a_name_may_not_stand_twice():
    linears = ["a.q_proj", "a.mlp.up_proj", "b.q_proj"]
    assert choose_targets("all-linear", linears, whole=["a.mlp"]) == ["a.q_proj", "b.q_proj"]

    with pytest.raises(ModelError) as caught:
        choose_targets(["up_proj"], linears, whole=["a.mlp"])

    assert str(caught.value) == (
        "error: a.mlp.up_proj is trained whole, and `lora.targets` names it too\n"
        "  fix: name it in one of `lora.targets` and `lora.modules_to_save`"
    )


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_tied_weight_is_refused_on_either_side(name):
    with pytest.raises(ModelError, match="is tied to"):
        check_whole(tiny_model("llama-tied"), [name])


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_two_modules_that_share_a_weight_are_trained_as_two_and_merged_into_two(lora, tmp_path):
    base = tiny_base(tmp_path / "base", "llama-tied")
    out = write_random(tmp_path / "out", base, "qv", whole=["model.embed_tokens", "lm_head"])
    expected = logits_of(base, load_adapter(out))
    head, embedding = (load_adapter(out).extras[path]["weight"] for path in ("lm_head", "model.embed_tokens"))
    assert not torch.equal(head, embedding)

    lora("merge", "--adapter", out, "--out", tmp_path / "merged")

    theirs = answers_of(PeftModel.from_pretrained(load(base), out))
    merged = load(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, head)
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    for found in (theirs, answers_of(merged)):
        assert max(map(relative_difference, found, expected)) <= 2e-6


def test_a_quantised_module_is_refused(tmp_path):
    model = load_model(Base("base", tiny_base(tmp_path)), dtype=torch.float32, quantize="nf4")

    with pytest.raises(ModelError) as caught:
        inject(model, config(model, ["model.layers.0.mlp"]), LORA, whole=["model.layers.0.mlp"])

    assert str(caught.value) == (
        "error: model.layers.0.mlp is quantised, and whole numbers can't be trained\n"
        "  fix: take it out of `lora.modules_to_save`, or set `model.quantize: none`"
    )


def test_a_base_of_another_vocabulary_is_told():
    adapter = Adapter.of(trained(with_whole(tiny_model("llama"))), config(tiny_model("llama")))
    other = tiny_model("llama")
    other.lm_head = nn.Linear(32, 300, bias=False)

    with pytest.raises(ModelError) as caught:
        adapter.inject_into(other)

    assert str(caught.value) == (
        "error: lm_head has weight [300, 32] in this base, and weight [320, 32] in the adapter\n"
        "  fix: give the base it was trained on with `--base`"
    )


def test_layers_that_do_nothing_are_an_error_beside_a_module_that_has_learned():
    model = with_whole(tiny_model("llama"))
    with torch.no_grad():
        model.lm_head.trained.weight.add_(1.0)

    with pytest.raises(DivergedError, match="does nothing beside the modules trained whole"):
        Adapter.of(model, config(tiny_model("llama"))).check_alive()


def test_a_value_that_is_not_finite_is_found_in_a_module_trained_whole():
    model = trained(with_whole(tiny_model("llama")))
    with torch.no_grad():
        model.lm_head.trained.weight[3, 4] = float("nan")

    with pytest.raises(DivergedError, match="not finite in 1 layers, first lm_head"):
        Adapter.of(model, config(tiny_model("llama"))).check_alive()


def test_a_module_of_modules_is_trained_with_all_its_parameters():
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    whole = TrainedWhole(inner.requires_grad_(False))
    x = torch.randn(5, 4)

    assert torch.equal(whole(x), inner(x))
    whole(x).sum().backward()

    assert [name for name, p in whole.named_parameters() if p.grad is not None] == [
        f"trained.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
