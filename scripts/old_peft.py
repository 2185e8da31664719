"""Adapters as earlier PEFTs write them: the fixtures of tests/lora/test_old_peft.py, in tests/lora/old_peft.

    python scripts/old_peft.py            with, one after the other, these packages in the environment (all run with a torch of today):

    peft==0.6.2   transformers==4.35.2  accelerate==0.25.0  tokenizers==0.15.0  huggingface_hub==0.19.4   # makes the bases, too
    peft==0.10.0  transformers==4.40.2  accelerate==0.30.1  tokenizers==0.19.1  huggingface_hub==0.23.4
    peft==0.14.0  transformers==4.47.1  accelerate==1.2.1   tokenizers==0.21.0  huggingface_hub==0.27.1

Each adapter lies beside the logits that its own PEFT gave with it, so that what is tested needs no formula of ours.
"""

import os
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

FOLDER = Path(__file__).parents[1] / "tests" / "lora" / "old_peft"
IDS = torch.tensor([[5, 17, 20, 31, 8], [7, 30, 12, 12, 2]])
BASES = {
    "llama": LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
CASES = {
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "layers": (
        "llama",
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "regex": ("llama", {"target_modules": r".*\.1\.self_attn\.[qk]_proj"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "biases of LoRA": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "exclude": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    os.chdir(FOLDER)  # the adapters name their base by a path
    for name, config in BASES.items():
        if not Path(name).exists():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.half().save_pretrained(name)
    for case, (base, settings) in CASES.items():
        if all(key in LoraConfig.__dataclass_fields__ for key in settings):  # some came later
            write(Path(peft.__version__) / case.replace(" ", "-"), base, settings)


def write(folder: Path, base: str, settings: dict) -> None:
    config = LoraConfig(
        r=2, lora_alpha=6, lora_dropout=0.05, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(input_ids=IDS).logits
    model.save_pretrained(folder, safe_serialization=True)
    save_file({"ids": IDS, "logits": logits}, folder / "logits.safetensors")
    (folder / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
