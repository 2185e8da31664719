"""A tiny tokenizer that knows every family's special tokens, and the chat templates whose masks are tested."""

import random
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|endoftext|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
]
SENTENCES = ["the cat sat on the mat", "what is the answer to that question\n\n", "yes yes: no no\n"]


@dataclass(frozen=True)
class Family:
    """A chat template with its special tokens; `stop` ends a turn, and `adds_bos` puts BOS before every plain text."""

    template: str
    stop: str
    bos: str | None
    eos: str
    adds_bos: bool = False


CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    stop="<|im_end|>",
    bos=None,
    eos="<|im_end|>",
)

LLAMA3 = Family(
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    stop="<|eot_id|>",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    adds_bos=True,
)

MISTRAL = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    stop="</s>",
    bos="<s>",
    eos="</s>",
    adds_bos=True,
)

GEMMA = Family(
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    stop="<end_of_turn>",
    bos="<bos>",
    eos="<eos>",
    adds_bos=True,
)

# Ends a conversation with an end token unless an answer is asked for: no rendering is the beginning of a longer one
PHI = Family(
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    stop="<|end|>",
    bos=None,
    eos="<|endoftext|>",
)

# Like Qwen3: reasoning stands in the last answer alone, and an answer without any gets an empty one
THINKING = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if not loop.last %}{{ said }}{% elif '</think>' in m.content %}{{ m.content }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + said }}{% endif %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    stop="<|im_end|>",
    bos=None,
    eos="<|im_end|>",
)

FAMILIES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "thinking": THINKING,
}


# How texts fall into words: Llama 3 keeps line ends together, GPT-2 gives the last one to what follows
LLAMA3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_WORDS = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tiny_tokenizer(
    family: Family = CHATML, *, template: str | None = "its own", words: str = LLAMA3_WORDS
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens, where the pad token is the end token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if family.adds_bos:
        bos = (family.bos, core.token_to_id(family.bos))
        core.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos
    )
    tokenizer.chat_template = family.template if template == "its own" else template
    return tokenizer


def space_before_words(template: str | None = None) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space is put before the text, and belongs to the word behind it."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=["\n", "é", "猫", *map(chr, range(33, 127))],
        show_progress=False,
    )
    core.train_from_iterator([sentence.strip() for sentence in SENTENCES], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


PARTS = [
    *(" ", "\n", "  \n", "\t ", " \u00a0", "\u3000", "\r\n", "\x1c ", "\x85 ", " ", "  "),
    *("é", "e", "\u0301", " \u0301", "數", "١٢", "12345", "'s", "'S ", " 'll", "/\n", "...", "_", "A ", " B", "ǅa"),
    *("<|im", "_start|>", "<|im_", "<", "the cat", " <mask>"),
]


def mixtures(tokenizer, count=200):
    """Words, white space and special tokens, whole and in parts, in any order."""
    generator = random.Random(0)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    parts = [*added, *added, *SENTENCES, *PARTS]
    return ["".join(generator.choices(parts, k=generator.randrange(9))) for _ in range(count)]
