"""Rows of a few tokens, trained beside the adapter: PEFT's `trainable_token_indices`, over tied and untied tables."""

import pytest
import torch
from adapters import assert_read_by_peft_and_taken_off
from layers import relative_difference
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_model

from lora_cli.errors import ModelError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import frozen_digest, inject
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.tokens import trained_tokens
from lora_cli.models.logits import frozen_head
from lora_cli.models.tokens import ids_of_tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = (7, 31, 200)
IDS = torch.tensor([[5, 31, 200, 31, 8, 7, 41]])
TARGETS = {"llama": "q_proj", "llama-tied": "q_proj", "gemma": "q_proj", "gpt2": "c_attn"}
UNTIED = ("llama",)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def config(name: str, **settings) -> LoRAConfig:
    return LoRAConfig(r=2, lora_alpha=4, target_modules=(TARGETS[name],), trainable_tokens=TOKENS, **settings)


def injected(name: str, *, moved: bool = True):
    model = tiny_model(name)
    inject(model, config(name), [path for path, _ in model.named_modules() if path.endswith(f".{TARGETS[name]}")])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad and moved):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_it_starts_at_the_base_and_trains_the_rows_of_each_table_alone(name):
    model = injected(name, moved=False)
    before = frozen_digest(model)

    assert torch.equal(logits(model), logits(tiny_model(name)))
    model(input_ids=IDS).logits.square().sum().backward()

    assert len(trained_tokens(model)) == (2 if name in UNTIED else 1)
    assert all(trained.rows.shape[0] == 3 and trained.rows.grad.any() for trained in trained_tokens(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert frozen_digest(model) == before


@pytest.mark.parametrize("name", TARGETS)
def test_peft_reads_ours_and_switched_off_the_base_is_as_it_was(name, tmp_path):
    model = injected(name)
    adapter = Adapter.of(model, config(name))

    assert_read_by_peft_and_taken_off(
        model, adapter, lambda: tiny_model(name), logits, tmp_path, transposed=name == "gpt2"
    )


@pytest.mark.parametrize("name", TARGETS)
def test_we_read_pefts(name, tmp_path):
    """Where the head has a table of its own, PEFT trains the embedding's rows alone."""
    torch.manual_seed(0)
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    settings = {"r": 2, "lora_alpha": 4, "target_modules": [TARGETS[name]], "init_lora_weights": False} | fan
    model = get_peft_model(tiny_model(name), LoraConfig(trainable_token_indices=list(TOKENS), **settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    ours = tiny_model(name)
    load_adapter(tmp_path).inject_into(ours)

    assert relative_difference(logits(ours), expected) <= 2e-6


@pytest.mark.parametrize("name", TARGETS)
def test_a_loss_that_makes_its_logits_itself_leaves_them_to_the_head_whose_rows_are_trained(name):
    assert frozen_head(tiny_model(name).requires_grad_(False)) is not None
    assert frozen_head(injected(name)) is None


def test_a_table_that_the_adapter_changes_anyway_and_a_token_without_a_row_are_refused():
    model, paths = tiny_model("llama"), ["model.layers.0.self_attn.q_proj"]

    with pytest.raises(ModelError, match="trains rows of lm_head, and the adapter changes the whole of lm_head"):
        inject(model, config("llama"), [*paths, "lm_head"])
    wide = LoRAConfig(r=2, lora_alpha=4, target_modules=("q_proj",), trainable_tokens=(320,))
    with pytest.raises(ModelError, match=r"names the token 320, and model\.embed_tokens has 320 rows"):
        inject(model, wide, paths)


def test_tokens_are_named_as_the_tokenizer_has_them():
    tokenizer = byte_tokenizer()

    assert ids_of_tokens(tokenizer, ["<|im_end|>", "<s>", "<s>"]) == (1, 4)
    with pytest.raises(ModelError, match=r"names `<\|im_ende\|>`, which is no token of this tokenizer") as error:
        ids_of_tokens(tokenizer, ["<|im_ende|>"])
    assert "<|im_end|>" in error.value.problems[0].fix
