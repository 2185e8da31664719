"""Convolutions through the command line, in encoders that have some: SqueezeBERT, whose layers are all Conv1d of one point,
and DeBERTa-v2 with its convolution over three tokens."""

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from running import hashes, trained_and_resumed, write_labelled
from tiny import ENCODERS, VOCABULARY, encoder_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, SqueezeBertConfig

from lora_cli.lora.convolution import LoRAConvolution
from lora_cli.lora.inject import lora_layers
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.heads import head_of
from lora_cli.models.load import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # DeBERTa's own
]

IDS = torch.tensor([[1, 17, 200, 31, 8, 90, 2]])
KINDS = ("q", "k", "v", "post_attention", "intermediate", "output")


def squeezebert(groups: int):
    shape = {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    grouped = {f"{kind}_groups": groups for kind in KINDS}
    return SqueezeBertConfig(vocab_size=VOCABULARY, num_attention_heads=4, pad_token_id=0, **shape, **grouped)


def deberta():
    config = ENCODERS["deberta-v2"]()
    config.conv_kernel_size, config.conv_act = 3, "gelu"
    return config


MODELS = {
    "SqueezeBERT": (lambda: squeezebert(1), ["query", "key", "value", "conv1d"], 12),
    "DeBERTa": (deberta, ["query_proj", "conv.conv"], 1),
}


def base_of(folder, config):
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", [{}, {"lora.use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", MODELS)
def test_convolutions_go_all_the_way(name, method, lora, recipe, tmp_path):
    config, targets, convolutions = MODELS[name]
    base, out = base_of(tmp_path / "base", config()), tmp_path / "out"
    before = hashes(base)
    settings = {"training.objective": "classify", "lora.targets": targets, "data.eval": "25%"}
    steps = {"training.max_steps": 30, "training.save_steps": 2, "training.learning_rate": 0.01}
    file = recipe(settings | steps | method, base=base)
    write_labelled(tmp_path / "train.jsonl")

    _, last = trained_and_resumed(file, out, lora)
    assert lora("eval", file, "--json").json["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-5)

    adapter = load_adapter(out)
    ours = load_model(Base("tiny", base), dtype=torch.float32, head=head_of(adapter))
    adapter.inject_into(ours)
    found = [layer for layer in lora_layers(ours).values() if isinstance(layer, LoRAConvolution)]
    assert len(found) == convolutions
    assert all(layer.lora_B.any() for layer in found)
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert relative_difference(logits(PeftModel.from_pretrained(theirs, out)), logits(ours)) <= 1e-5

    lora("merge", "--adapter", out)
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged")
    assert relative_difference(logits(merged), logits(ours)) <= 1e-5
    assert hashes(base) == before


def test_convolutions_in_groups_are_refused_with_the_reason(lora, recipe, tmp_path):
    base = base_of(tmp_path / "base", squeezebert(4))
    file = recipe({"training.objective": "classify", "lora.targets": ["query"]}, base=base)
    write_labelled(tmp_path / "train.jsonl")

    refused = lora("train", file, code=4)

    assert (
        "encoder.layers.0.attention.query can't get an adapter: its 4 groups see a part of the channels" in refused.err
    )
