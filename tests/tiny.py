"""Tiny real models of every supported architecture, with a tokenizer, saved as a person would have them on disk."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    ViTConfig,
    ViTModel,
)

VOCABULARY = 320
TOKENS = 294  # of the tiny tokenizer, which leaves rows of the tables without a token
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16),
    "gemma": lambda: GemmaConfig(**_SHAPE, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=16, sliding_window=64),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=16, sliding_window=64),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_without("num_key_value_heads")),
    "opt": lambda: OPTConfig(
        **_without("num_key_value_heads", "intermediate_size"), ffn_dim=48, word_embed_proj_dim=32
    ),
    "falcon": lambda: FalconConfig(**_without("num_key_value_heads", "intermediate_size"), ffn_hidden_size=48),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
# Other experts than Mixtral's: those of Qwen lie in files of other names, those of gpt-oss are turned, interleaved and whole
EXPERTS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=64
    ),
}


ENCODERS = {
    "bert": lambda: BertConfig(**_without("num_key_value_heads")),
    "roberta": lambda: RobertaConfig(**_without("num_key_value_heads"), type_vocab_size=1),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=256, pad_token_id=0
    ),
    "deberta-v2": lambda: DebertaV2Config(
        **_without("num_key_value_heads"), relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    ),
}


def tiny_encoder(folder: Path, name: str = "bert", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A folder with a tiny encoder without any head, and its tokenizer."""
    torch.manual_seed(seed)
    AutoModel.from_config(ENCODERS[name](), dtype=dtype).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def tiny_encoder_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(ENCODERS[name]()).eval()


def tiny_vit() -> ViTModel:
    """Sees pictures of 8 × 8, in four patches."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**shape, image_size=8, patch_size=4)).eval()


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A random model of the architecture, in evaluation mode, without dropout."""
    torch.manual_seed(seed)
    config = (CONFIGS | EXPERTS)[name]()
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_base(
    folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **saving
) -> Path:
    """A folder with a tiny model and its tokenizer, as `save_pretrained` writes them."""
    tiny_model(name, dtype=dtype, seed=seed).save_pretrained(folder, **saving)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges: every text can be written, and special tokens are whole."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "what is the answer to that question"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>" if template else "</s>"
    )
    fast.chat_template = template
    return fast


def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens; two of them have each other's ids."""
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    vocabulary = tokenizer.get_vocab()
    first, second = (token for token, id in sorted(vocabulary.items(), key=lambda item: item[1])[-2:])
    a, b = vocabulary[first], vocabulary[second]
    changed = text.replace(f'"{first}":{a}', f'"{first}":{b}').replace(f'"{second}":{b}', f'"{second}":{a}')
    return type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(changed),
        chat_template=tokenizer.chat_template,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
    )


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens between a first and a last special one, with a second text behind the first; no end token."""
    tokenizer = byte_tokenizer(None).backend_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _without(*keys: str) -> dict:
    return {key: value for key, value in _SHAPE.items() if key not in keys}
