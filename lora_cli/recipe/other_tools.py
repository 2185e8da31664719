"""What other tools call our keys, so that a recipe from elsewhere is put right by reading the message.

`key: value` stands for a name that says both; `≈ key` for one whose values read differently here.
"""

from functools import cache
from typing import NamedTuple

OTHER_TOOLS = {
    "PEFT": {
        "base_model_name_or_path": "model.base",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "target_modules": "lora.targets",
        "exclude_modules": "lora.exclude",
        "layers_to_transform": "lora.layers",
        "init_lora_weights": "≈ lora.init",
        "loftq_config": "≈ lora.init",
        "trainable_token_indices": "≈ lora.trainable_tokens",
        "eva_config": "lora.init: eva",
    },
    "axolotl": {
        "base_model": "model.base",
        "revision_of_model": "model.revision",
        "flash_attention": "model.attention: flash",
        "sdp_attention": "model.attention: sdpa",
        "flex_attention": "model.attention: flex",
        "eager_attention": "model.attention: eager",
        "lora_r": "lora.r",
        "lora_model_dir": "lora.start_from",
        "lora_target_modules": "lora.targets",
        "lora_target_linear": "lora.targets: all-linear",
        "lora_modules_to_save": "lora.modules_to_save",
        "peft_use_rslora": "lora.use_rslora",
        "peft_use_dora": "lora.use_dora",
        "peft_init_lora_weights": "≈ lora.init",
        "peft_layers_to_transform": "lora.layers",
        "peft_trainable_token_indices": "≈ lora.trainable_tokens",
        "tokens": "lora.new_tokens",
        "datasets": "≈ data.train",
        "test_datasets": "≈ data.eval",
        "val_set_size": "≈ data.eval",
        "sequence_len": "data.max_length",
        "sample_packing": "data.packing",
        "num_epochs": "training.epochs",
        "evals_per_epoch": "≈ training.eval_steps",
        "saves_per_epoch": "≈ training.save_steps",
        "loraplus_lr_embedding": "≈ training.loraplus_lr_ratio",
        "use_tensorboard": "training.trackers: [tensorboard]",
    },
    "LLaMA-Factory": {
        "quantization_bit": "≈ model.quantize",
        "flash_attn": "≈ model.attention",
        "infer_dtype": "model.dtype",
        "lora_rank": "lora.r",
        "lora_target": "≈ lora.targets",
        "additional_target": "≈ lora.modules_to_save",
        "add_special_tokens": "≈ lora.new_tokens",
        "resize_vocab": "≈ lora.new_tokens",
        "pissa_init": "lora.init: pissa",
        "adapter_name_or_path": "≈ lora.start_from",
        "dataset": "data.train",
        "eval_dataset": "data.eval",
        "val_size": "≈ data.eval",
        "cutoff_len": "data.max_length",
        "stage": "training.objective",
    },
    "Transformers": {
        "torch_dtype": "model.dtype",
        "bf16": "model.dtype: bfloat16",
        "fp16": "model.dtype: float16",
        "load_in_4bit": "model.quantize: nf4",
        "load_in_8bit": "model.quantize: int8",
        "attn_implementation": "≈ model.attention",
        "num_train_epochs": "training.epochs",
        "lr_scheduler_type": "training.lr_scheduler",
        "warmup_steps": "≈ training.warmup_ratio",
        "per_device_train_batch_size": "training.micro_batch_size",
        "per_device_eval_batch_size": "training.micro_batch_size",
        "auto_find_batch_size": "training.micro_batch_size: auto",
        "optim": "≈ training.optimizer",
        "data_seed": "training.seed",
        "eval_strategy": "≈ training.eval_steps",
        "save_strategy": "≈ training.save_steps",
        "save_total_limit": "training.keep_checkpoints",
        "load_best_model_at_end": "training.keep_best",
        "logging_steps": "training.log_steps",
        "report_to": "training.trackers",
        "output_dir": "output",
    },
    "TRL": {
        "model_name_or_path": "model.base",
        "model_revision": "model.revision",
        "dataset_name": "data.train",
        "max_seq_length": "data.max_length",
    },
    "torchtune": {
        "rank": "lora.r",
        "lora_attn_modules": "lora.targets",
        "apply_lora_to_mlp": "≈ lora.targets",
        "max_seq_len": "data.max_length",
        "packed": "data.packing",
        "batch_size": "training.micro_batch_size",
        "max_steps_per_epoch": "≈ training.max_steps",
        "clip_grad_norm": "training.max_grad_norm",
        "enable_activation_checkpointing": "training.gradient_checkpointing",
        "log_every_n_steps": "training.log_steps",
    },
    "Unsloth": {
        "model_name": "model.base",
        "use_gradient_checkpointing": "training.gradient_checkpointing",
        "random_state": "training.seed",
    },
    "LitGPT": {
        "checkpoint_dir": "model.base",
        "precision": "≈ model.dtype",
        "lora_query": "≈ lora.targets",
        "lora_key": "≈ lora.targets",
        "lora_value": "≈ lora.targets",
        "lora_projection": "≈ lora.targets",
        "lora_mlp": "≈ lora.targets",
        "val_split_fraction": "≈ data.eval",
        "lr_warmup_steps": "≈ training.warmup_ratio",
        "max_norm": "training.max_grad_norm",
        "save_interval": "training.save_steps",
        "log_interval": "training.log_steps",
        "out_dir": "output",
    },
    "MLX LM": {
        "num_layers": "≈ lora.layers",
        "iters": "training.max_steps",
        "lr_schedule": "≈ training.lr_scheduler",
        "grad_checkpoint": "training.gradient_checkpointing",
        "steps_per_eval": "training.eval_steps",
        "steps_per_report": "training.log_steps",
        "save_every": "training.save_steps",
        "adapter_path": "output",
    },
    "ms-swift": {
        "quant_bits": "≈ model.quantize",
        "attn_impl": "≈ model.attention",
        "init_weights": "≈ lora.init",
        "lorap_lr_ratio": "training.loraplus_lr_ratio",
        "val_dataset": "data.eval",
        "split_dataset_ratio": "≈ data.eval",
    },
    "PyTorch": {
        "lr": "training.learning_rate",
    },
}

# Names of numbers that are not given here but follow from a key
DERIVED = {
    "Transformers": {"gradient_accumulation_steps": "training.global_batch_size"},
    "LitGPT": {"gradient_accumulation_iters": "training.global_batch_size"},
    "MLX LM": {"grad_accumulation_steps": "training.global_batch_size"},
}


class Foreign(NamedTuple):
    """Another tool's name: `key` is ours; `value` is set where the name implies it, `same` where values read alike."""

    tool: str
    key: str
    value: str = ""
    same: bool = True
    derived: bool = False

    @property
    def owner(self) -> str:
        return self.tool + ("'" if self.tool.endswith("s") else "'s")

    @property
    def here(self) -> str:
        spelled = f"`{self.key}: {self.value}`" if self.value else f"`{self.key}`"
        return f"derived from {spelled}" if self.derived else spelled


def foreign(name: str) -> Foreign | None:
    """Whose name this is, whatever the case and with `-` for `_`; None for a name nobody here knows."""
    return foreign_names().get(name.lower().replace("-", "_"))


@cache
def foreign_names() -> dict[str, Foreign]:
    found = {}
    for tool, names in OTHER_TOOLS.items():
        for name, ours in names.items():
            key, _, value = ours.removeprefix("≈ ").partition(": ")
            found[name] = Foreign(tool, key, value, same=not ours.startswith("≈"))
    for tool, names in DERIVED.items():
        found |= {name: Foreign(tool, key, same=False, derived=True) for name, key in names.items()}
    return found
