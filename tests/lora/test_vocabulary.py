"""Tokens that a base has no rows for: longer tables, and adapters that bring their rows with them."""

import pytest
import torch
from layers import randomize, relative_difference
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCABULARY, byte_tokenizer, tiny_base, tiny_model
from transformers import AutoModelForCausalLM

from lora_cli.errors import ModelError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.tokens import begin_at_mean, trained_tokens
from lora_cli.lora.vocabulary import make_room
from lora_cli.models.shared import shared_copy
from lora_cli.models.tokens import add_tokens, ids_of_tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NEW = (VOCABULARY, VOCABULARY + 1)
IDS = torch.tensor([[5, 31, 200, 31, 8, 7, 41]])
WITH_NEW = torch.tensor([[5, 31, NEW[0], 31, NEW[1], 7, 41]])
TARGETS = {"llama": "q_proj", "llama-tied": "q_proj", "gemma": "q_proj", "gpt2": "c_attn", "gpt_neox": "dense"}
TIED = ("llama-tied", "gemma", "gpt2")


def logits(model, ids: torch.Tensor = WITH_NEW) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def bare(name: str):
    return tiny_model(name).requires_grad_(False)


def config(name: str, tokens: tuple[int, ...] = (7, *NEW)) -> LoRAConfig:
    return LoRAConfig(r=2, lora_alpha=4, target_modules=(TARGETS[name],), trainable_tokens=tokens)


def trained(name: str):
    model = bare(name)
    make_room(model, NEW)
    inject(model, config(name), [path for path, _ in model.named_modules() if path.endswith(f".{TARGETS[name]}")])
    randomize(model, size=0.1)
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_longer_tables_leave_the_base_as_it_is_and_the_new_rows_are_the_mean_of_the_others(name):
    model = bare(name)
    before = logits(model, IDS)

    make_room(model, NEW)

    after, embedding, head = logits(model, IDS), model.get_input_embeddings(), model.get_output_embeddings()
    assert relative_difference(after[..., :VOCABULARY], before) <= 1e-6
    assert relative_difference(after[..., NEW[0]], before.mean(dim=-1)) <= 1e-5
    assert torch.equal(embedding.weight[:VOCABULARY], bare(name).get_input_embeddings().weight)
    assert embedding.num_embeddings == model.config.vocab_size == head.out_features == VOCABULARY + 2
    assert (head.weight is embedding.weight) == (name in TIED)


def test_a_model_over_the_same_weights_stays_what_it_is():
    one = bare("llama-tied")
    other = shared_copy(one)
    before = logits(other, IDS)

    make_room(one, NEW)

    assert torch.equal(logits(other, IDS), before)
    assert other.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("name", TARGETS)
def test_folder_and_base_are_enough_for_us_and_for_peft(name, tmp_path):
    model = trained(name)
    expected, adapter = logits(model), Adapter.of(model, config(name))

    save_adapter(adapter, tmp_path, transposed=name == "gpt2")

    ours = bare(name)
    load_adapter(tmp_path).inject_into(ours)
    assert torch.equal(logits(ours), expected)
    theirs = bare(name)
    theirs.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)  # rows at random: all of them are the adapter's
    assert relative_difference(logits(PeftModel.from_pretrained(theirs, tmp_path)), expected) <= 2e-6


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama", list(NEW)),  # the head has rows at random, that stand in the copy of it that PEFT saves
        ("llama", {"embed_tokens": list(NEW), "lm_head": list(NEW)}),
        ("llama-tied", list(NEW)),
        ("gpt_neox", list(NEW)),
    ],
    ids=["embedding", "both", "tied", "neox"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized")
def test_we_read_what_peft_saves_of_a_resized_base(name, tokens, tmp_path):
    base = tiny_base(tmp_path / "base", name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": [TARGETS[name]], "init_lora_weights": False}
    theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=tokens, **settings))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "adapter")

    ours = bare(name)
    load_adapter(tmp_path / "adapter").inject_into(ours)

    assert relative_difference(logits(ours), expected) <= 2e-6


WHOLE = {
    "both trained": ("llama", VOCABULARY + 9, ["embed_tokens", "lm_head"]),
    "embedding trained": ("llama", VOCABULARY + 9, ["embed_tokens"]),
    "head trained": ("llama", VOCABULARY + 9, ["lm_head"]),
    "none trained": ("llama", VOCABULARY + 9, None),
    "one table, not trained": ("llama-tied", VOCABULARY + 9, None),
    "both trained, fewer tokens": ("llama", VOCABULARY - 9, ["embed_tokens", "lm_head"]),
}


def saved_by_peft_of_another_vocabulary(folder, name, rows, whole):
    """An adapter of the base in folder/base, resized to so many rows, and PEFT's logits."""
    base = tiny_base(folder / "base", name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "modules_to_save": whole}
    theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    expected = logits(theirs, WITH_NEW.clamp(max=rows - 1))
    theirs.save_pretrained(folder / "adapter", save_embedding_layers=True)
    return base, expected


@pytest.mark.parametrize("case", WHOLE)
def test_tables_of_another_length_that_peft_saved_in_full_are_read_merged_and_written(case, lora, tmp_path, caplog):
    name, rows, whole = WHOLE[case]
    ids = WITH_NEW.clamp(max=rows - 1)
    base, expected = saved_by_peft_of_another_vocabulary(tmp_path, name, rows, whole)
    adapter, ours = load_adapter(tmp_path / "adapter"), AutoModelForCausalLM.from_pretrained(base)

    adapter.inject_into(ours)

    assert relative_difference(logits(ours, ids)[..., :rows], expected) <= 2e-6
    assert ("keep their rows" in caplog.text) == (rows < VOCABULARY)
    save_adapter(adapter, tmp_path / "again", transposed=False)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(max(rows, VOCABULARY), mean_resizing=False)
    again = logits(PeftModel.from_pretrained(theirs, tmp_path / "again"), ids)
    assert relative_difference(again, logits(ours, ids)) <= 2e-6
    lora("merge", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == max(rows, VOCABULARY)
    assert relative_difference(logits(merged, ids), logits(ours, ids)) <= 2e-6


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_two_tables_do_not_fit_a_base_that_has_one_for_both(tmp_path):
    base, _ = saved_by_peft_of_another_vocabulary(tmp_path, "llama-tied", VOCABULARY + 9, ["embed_tokens", "lm_head"])

    with pytest.raises(
        ModelError, match=r"has rows of lm_head and of model\.embed_tokens, and they are one table in this"
    ):
        load_adapter(tmp_path / "adapter").inject_into(AutoModelForCausalLM.from_pretrained(base))


def test_the_rows_of_new_tokens_start_at_the_mean_of_the_known_ones_where_the_table_had_rows_to_spare():
    model, spare = bare("llama"), (300, 301)
    inject(model, config("llama", (7, *spare)), ["model.layers.0.self_attn.q_proj"])

    begin_at_mean(model, spare)

    for table in trained_tokens(model).values():
        assert torch.equal(table.rows[0], table.base.weight[7])
        torch.testing.assert_close(table.rows[1:], table.base.weight[:300].mean(dim=0).expand(2, -1))


def test_rows_that_nothing_would_train_are_refused():
    with pytest.raises(ModelError, match=r"rows of the token 325 are trained, and the base has 320 rows: 320 has none"):
        make_room(bare("llama"), (7, 325))


def test_new_tokens_are_cut_from_text_whole_and_known_ones_are_refused():
    tokenizer = byte_tokenizer()
    size = len(tokenizer)

    add_tokens(tokenizer, ["<tool>", "</tool>", "<tool>"])

    assert ids_of_tokens(tokenizer, ["</tool>", "<tool>"]) == (size, size + 1)
    assert tokenizer("a<tool>b</tool>", add_special_tokens=False)["input_ids"].count(size) == 1
    with pytest.raises(ModelError, match=r"`lora\.new_tokens` names `<s>`, which the tokenizer has already"):
        add_tokens(tokenizer, ["<s>"])
