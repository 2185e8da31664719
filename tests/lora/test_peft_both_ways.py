"""PEFT reads our adapters and we read PEFT's: whole tiny models, logits equal.

The tolerance is float32's, against the largest logit: both compute the same sums, in another order.
"""

import logging

import pytest
import torch
from layers import randomize, relative_difference
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CONFIGS, tiny_base, tiny_model

from lora_cli.errors import ModelError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject, linears, lora_layers
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.targets import choose_targets, shortest_suffixes
from lora_cli.lora.weights import fan_in_fan_out, weights_of
from lora_cli.models.base import Base
from lora_cli.models.load import head_paths, load_model

# PEFT asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64, 1, 2]])
AGREE = 1e-6
AGREE_DORA = 2e-6  # norms of whole rows, and a quotient

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora+rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {  # overlapping: the first that matches wins (PEFT saves them sorted, so it must come first there too)
        "rank_pattern": {r"(0)\.(self_attn|attn|attention|self_attention)\..*": 3, r"(0|1)\..*": 5},
        "alpha_pattern": {r"(0)\..*": 3, r"(0|1)\..*": 2.5},
    },
}
# On every architecture the plain form; the variants where a row of the storages or fused weights differ
COMBINATIONS = [(name, variant) for name in CONFIGS for variant in VARIANTS if variant in ("plain", "patterns")] + [
    (name, variant) for name in ("llama", "gpt2", "phi3", "mixtral") for variant in ("rslora", "dora", "dora+rslora")
]
PEFT_TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "opt": ["out_proj", "fc1"],
}


def ours(model, variant: str, *, targets="all-linear", exclude=(), seed: int = 1) -> Adapter:
    """Random factors of our own layers, injected into the model."""
    paths = choose_targets(targets, list(linears(model)), head=head_paths(model), exclude=exclude)
    suffixes = shortest_suffixes(paths, [name for name, _ in model.named_modules()])
    config = LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": suffixes} | VARIANTS[variant])
    inject(model, config, paths)
    randomize(model, size=0.1, seed=seed)
    return Adapter.of(model, config)


def agree(variant: str) -> float:
    return AGREE_DORA if "dora" in variant else AGREE


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read_by_peft(model, folder):
    """PEFT's model; its warnings, of keys that are missing, unexpected or ignored, are errors here."""
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(("name", "variant"), COMBINATIONS)
def test_peft_reads_ours(name, variant, tmp_path):
    model = tiny_model(name)
    base = logits(model)
    transposed = fan_in_fan_out(weights_of(model).values())
    save_adapter(ours(model, variant), tmp_path, transposed=transposed)

    peft_model = read_by_peft(tiny_model(name), tmp_path)

    assert relative_difference(logits(peft_model), logits(model)) <= agree(variant)
    assert relative_difference(logits(model), base) > 1e-3


def peft_adapter(name: str, folder, **settings):
    """An adapter that PEFT made, with a random B, saved by PEFT; PEFT's logits."""
    torch.manual_seed(4)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    model = get_peft_model(tiny_model(name), LoraConfig(**settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + torch.rand(parameter.shape))
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PEFT_TARGETS)
def test_we_read_pefts(name, variant, tmp_path):
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    expected = peft_adapter(name, tmp_path, target_modules=PEFT_TARGETS[name], **VARIANTS[variant], **fan)

    model = tiny_model(name)
    load_adapter(tmp_path).inject_into(model)

    assert relative_difference(logits(model), expected) <= agree(variant)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"target_modules": r".*\.(0|1)\.mlp\.(up|down)_proj"}, 4),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 2),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, 2),
        ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, 2),
        ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, 2),
    ],
    ids=["regex", "all-linear", "exclude", "layers", "gaussian", "orthogonal"],
)
def test_we_read_pefts_however_it_chose_its_targets(settings, count, tmp_path):
    expected = peft_adapter("llama", tmp_path, **settings)

    model = tiny_model("llama")
    load_adapter(tmp_path).inject_into(model)

    assert len(lora_layers(model)) == count
    assert relative_difference(logits(model), expected) <= AGREE


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_peft_adapter_whose_base_was_changed_by_its_start_is_refused(start, tmp_path):
    """PEFT takes such a start off the base's weights; read as a plain adapter it would silently be wrong."""
    peft_adapter("llama", tmp_path, target_modules=["q_proj"], init_lora_weights=start)

    with pytest.raises(ModelError, match=f"the adapter uses `init_lora_weights: '{start}'`"):
        load_adapter(tmp_path)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_peft_reads_ours_over_a_quantized_base(quantize, variant, llama_folder, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    base = Base("tiny", llama_folder)
    model = load_model(base, dtype=torch.float32, quantize=quantize)
    save_adapter(ours(model, variant), tmp_path)

    peft_model = read_by_peft(load_model(base, dtype=torch.float32, quantize=quantize), tmp_path)

    assert relative_difference(logits(peft_model), logits(model)) <= agree(variant)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_we_read_pefts_over_a_quantized_base(quantize, variant, llama_folder, tmp_path):
    peft_adapter("llama", tmp_path, target_modules=["q_proj", "up_proj"], **VARIANTS[variant])
    base = Base("tiny", llama_folder)
    peft_model = read_by_peft(load_model(base, dtype=torch.float32, quantize=quantize), tmp_path)

    model = load_model(base, dtype=torch.float32, quantize=quantize)
    load_adapter(tmp_path).inject_into(model)

    assert relative_difference(logits(model), logits(peft_model)) <= agree(variant)
