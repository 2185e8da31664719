"""Adapters that earlier PEFTs wrote (`scripts/old_peft.py`), each beside the logits that its own PEFT gave with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from layers import relative_difference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_cli.errors import ModelError, SafetyError
from lora_cli.lora.peft_format import load_adapter

FOLDER = Path(__file__).with_name("old_peft")
ADAPTERS = sorted(str(file.parent.relative_to(FOLDER)) for file in FOLDER.glob("*/*/adapter_config.json"))
WITHOUT_BIASES = ["0.10.0/biases-of-LoRA", "0.14.0/biases-of-LoRA"]  # these PEFTs trained them, and did not save them


def base_of(adapter: Path):
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()


def answers(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in WITHOUT_BIASES])
def test_an_adapter_of_an_earlier_peft_answers_as_it_did_there(name):
    adapter = FOLDER / name
    theirs, model = load_file(adapter / "logits.safetensors"), base_of(adapter)
    plain = answers(model, theirs["ids"])

    load_adapter(adapter).inject_into(model)

    assert relative_difference(answers(model, theirs["ids"]), theirs["logits"]) <= 2e-6
    assert relative_difference(plain, theirs["logits"]) > 1e-3  # the adapter does something


@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_an_adapter_that_its_peft_did_not_save_whole_is_refused(name):
    with pytest.raises(
        ModelError, match=r"it says `bias: lora_only`, and that of transformer\.h\.0\.attn\.c_attn"
    ) as error:
        load_adapter(FOLDER / name).inject_into(base_of(FOLDER / name))

    assert "PEFT 0.10 to 0.14, and some around them, did not save these biases" in error.value.problems[0].fix


def test_the_pickle_that_the_first_pefts_wrote_is_refused_with_the_way_to_convert(tmp_path):
    shutil.copy(FOLDER / ADAPTERS[0] / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")

    with pytest.raises(SafetyError, match=r"adapter_model\.bin is a pickle") as error:
        load_adapter(tmp_path)

    assert "save_pretrained" in error.value.problems[0].fix
