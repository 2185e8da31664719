"""LoRA fine-tuning from YAML recipes, with proof."""

__version__ = "0.1.0"
