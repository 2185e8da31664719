"""Bases under a classification head: what is new, what is loaded, and that a row's logits are its own."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, ENCODERS, tiny_base, tiny_encoder, tiny_model
from torch import nn

from lora_cli.errors import ModelError
from lora_cli.lora.inject import linears
from lora_cli.lora.targets import choose_targets
from lora_cli.models.base import Base
from lora_cli.models.heads import Head, head_in, head_modules, new_modules
from lora_cli.models.load import check_vocabulary, head_paths, load_model, skeleton
from lora_cli.objectives.classify import classify

LABELS = ("animal", "place", "thing")
DECODERS = ("llama", "qwen2", "gpt2", "mixtral", "opt", "gpt_neox", "gemma3")
HEADS = {"bert": ["classifier"], "roberta": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}
HEADS |= {"deberta-v2": ["pooler", "classifier"]} | {name: ["score"] for name in DECODERS}


def base_of(folder, name: str) -> Base:
    return Base(name, (tiny_encoder if name in ENCODERS else tiny_base)(folder / name, name))


def loaded(base: Base, **settings) -> nn.Module:
    return load_model(base, dtype=torch.float32, head=Head(LABELS, 0, **settings))


def batch_of(*rows: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.zeros(len(rows), dtype=torch.int64),
        "weights": torch.ones(len(rows)),
    }


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_new_and_what_the_files_hold_is_loaded(name, tmp_path):
    base = base_of(tmp_path, name)

    model = loaded(base)

    stored = load_file(base.folder / "model.safetensors")
    same = [key for key, tensor in model.state_dict().items() for s in stored.values() if torch.equal(s, tensor)]
    new = [key for key, p in model.named_parameters() if p.requires_grad]
    assert new_modules(model) == head_modules(model) == HEADS[name]
    assert {key.partition(".")[0] for key in new} == set(HEADS[name])
    fused = [key for key, _ in model.named_parameters() if ".experts." in key]  # of several tensors of the files
    assert {*same, *new, *fused} >= {key for key, _ in model.named_parameters()}
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {"animal": 0, "place": 1, "thing": 2}


@pytest.mark.parametrize("name", HEADS)
def test_a_new_head_is_a_function_of_the_seed(name, tmp_path):
    base = base_of(tmp_path, name)
    torch.manual_seed(1)
    one = loaded(base, seed=5)
    torch.manual_seed(2)
    same, other = loaded(base, seed=5).state_dict(), loaded(base, seed=6).state_dict()

    assert all(torch.equal(tensor, same[key]) for key, tensor in one.state_dict().items())
    drawn = [key for key, p in one.named_parameters() if p.requires_grad and p.ndim == 2]
    assert not any(torch.equal(same[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", HEADS)
def test_a_row_has_the_same_loss_alone_and_beside_longer_ones(name, tmp_path):
    model = loaded(base_of(tmp_path, name))
    rows = [[1, 9, 30, 2], [1, 200, 31, 8, 90, 41, 77, 12, 2], [1, 5, 2]]

    with torch.no_grad():
        together = classify(model, batch_of(*rows)).total
        alone = sum(classify(model, batch_of(row)).total for row in rows)

    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_padding_is_known_by_its_place_where_a_row_holds_that_token(tmp_path):
    """A row of an encoder may hold the padding token as text; the mask tells them apart."""
    model = loaded(base_of(tmp_path, "bert"))
    row, longer = [1, 0, 9, 0, 2], [1, 5, 6, 7, 8, 9, 10, 2]

    with torch.no_grad():
        together = classify(model, batch_of(row, longer)).total
        alone = classify(model, batch_of(row)).total + classify(model, batch_of(longer)).total

    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "q", "k", "v", "o", "u", "d"),
    [
        ("bert", "query", "key", "value", "attention.output.dense", "intermediate.dense", "1.output.dense"),
        ("roberta", "query", "key", "value", "attention.output.dense", "intermediate.dense", "1.output.dense"),
        ("distilbert", "q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        ("deberta-v2", "query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "1.output.dense"),
    ],
)  # fmt: skip
def test_letters_are_an_encoders_own_names_and_never_its_head(name, q, k, v, o, u, d, tmp_path):
    model = skeleton(base_of(tmp_path, name).folder, Head(LABELS))
    paths, head = list(linears(model)), head_paths(model)

    for letter, ending in {"q": q, "k": k, "v": v, "o": o, "u": u, "d": d}.items():
        chosen = choose_targets(letter, paths, head=head)
        assert len(chosen) == 2
        assert chosen[-1].endswith(ending)
    everything = choose_targets("all-linear", paths, head=head)
    assert not {path.partition(".")[0] for path in everything} & set(HEADS[name])
    assert {*choose_targets("qkvoud", paths, head=head)} <= {*everything}


def test_a_pooler_that_the_files_lack_is_new_and_trained(tmp_path):
    folder = tiny_encoder(tmp_path)
    kept = {key: t for key, t in load_file(folder / "model.safetensors").items() if "pooler" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})

    assert new_modules(loaded(Base("bert", folder))) == ["bert.pooler.dense", "classifier"]


def test_a_weight_that_no_head_has_may_not_be_missing(tmp_path):
    folder = tiny_encoder(tmp_path)
    kept = {key: t for key, t in load_file(folder / "model.safetensors").items() if "layer.1.attention" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelError, match="the base has 10 weights missing"):
        loaded(Base("bert", folder))


def test_a_head_that_no_adapter_brings_may_not_be_missing(tmp_path):
    base = base_of(tmp_path, "distilbert")

    with pytest.raises(ModelError, match="the base has 2 weights missing, first pre_classifier"):
        loaded(base, brought=frozenset({"classifier.weight", "classifier.bias"}))


def test_a_base_with_a_head_for_other_labels_gets_a_new_one(tmp_path):
    tiny_encoder(tmp_path)
    load_model(Base("bert", tmp_path), dtype=torch.float32, head=Head(("no", "yes"), 0)).save_pretrained(tmp_path)
    base = Base("bert", tmp_path)

    model = loaded(base, seed=5)

    assert head_in(base).labels == ("no", "yes")
    assert model.classifier.weight.shape == (3, 32)
    assert [key for key, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]


def test_a_base_with_a_head_for_as_many_labels_starts_from_it(tmp_path):
    tiny_encoder(tmp_path)
    first = load_model(Base("bert", tmp_path), dtype=torch.float32, head=Head(LABELS, 0, seed=3))
    first.save_pretrained(tmp_path)

    assert torch.equal(loaded(Base("bert", tmp_path), seed=5).classifier.weight, first.classifier.weight)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_the_head_over_a_quantised_base_is_not_quantised(name, quantize, tmp_path):
    model = load_model(base_of(tmp_path, name), dtype=torch.float32, quantize=quantize, head=Head(LABELS, 0))

    kinds = {type(m).__name__ for path, m in linears(model).items() if path.partition(".")[0] in HEADS[name]}
    assert kinds == {"Linear"}
    assert {type(m).__name__ for path, m in linears(model).items() if "layer" in path} == {
        "Linear4bit" if quantize == "nf4" else "Linear8bitLt"
    }


def test_roberta_has_fewer_positions_than_its_config_says(tmp_path):
    from lora_cli.data.types import Example, RowId

    model = skeleton(base_of(tmp_path, "roberta").folder, Head(LABELS))
    rows = [Example([5] * length, [0.0] * (length - 1) + [1.0], RowId("a", 1), label=0) for length in (255, 256)]

    check_vocabulary(model, rows[:1])
    with pytest.raises(ModelError, match="a row has 256 tokens, and the model has positions for 255"):
        check_vocabulary(model, rows)


def test_an_encoder_is_not_loaded_as_a_language_model(tmp_path):
    base = base_of(tmp_path, "bert")

    with pytest.raises(ModelError) as caught:
        load_model(base, dtype=torch.float32)

    assert str(caught.value) == (
        "error: the base is an encoder (bert), which reads both ways and writes no text\n"
        f"  --> {base.folder}\n"
        "  fix: set `training.objective: classify`, or choose a causal language model"
    )


def test_a_base_that_is_encoder_and_decoder_is_refused(tmp_path):
    from transformers import T5Config

    T5Config(vocab_size=320, d_model=32, num_layers=1, num_heads=2, d_ff=48, d_kv=16).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="reads with an encoder or a decoder, and t5 is both"):
        skeleton(tmp_path, Head(LABELS))


def test_a_kind_of_base_without_a_classifier_is_told(tmp_path):
    from transformers import GraniteConfig

    GraniteConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="transformers has no classifier of this kind"):
        skeleton(tmp_path, Head(LABELS))


def test_every_tiny_encoder_and_some_decoders_are_tested():
    assert {*ENCODERS} <= {*HEADS}
    assert {*DECODERS} <= {*CONFIGS}


def test_a_language_model_has_no_module_that_is_new():
    assert new_modules(tiny_model("llama").requires_grad_(False)) == []
