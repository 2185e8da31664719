"""Prompts -> text: greedy answers of a model, several at a time, those of like length together."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lora_cli.data.render import Renderer
from lora_cli.data.types import UNKNOWN_FORM, PromptForm
from lora_cli.errors import ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    form: PromptForm = UNKNOWN_FORM,
    max_new_tokens: int = 96,
    batch_size: int = 8,
    between: Callable[[], None] = lambda: None,
    together: bool = False,
) -> dict[str, str]:
    """The greedy answer to each prompt, which is rendered as training rendered its rows: `form` is theirs.

    `between` is called after each token; what it raises ends the answers. `together`: several processes hold shards of
    the model, so none stops before all have done.
    """
    renderer = Renderer(tokenizer)
    rows = {prompt: renderer.prompt_of(prompt, form) for prompt in prompts}
    # the longest first: what is too long, or too much for the memory, shows at once
    by_length = sorted(rows, key=lambda prompt: -len(rows[prompt]))
    stop_ids, answers = _stop_ids(model, renderer.stop_ids(form)), {}
    training = model.training
    model.eval()
    try:
        for i in range(0, len(by_length), batch_size):
            some = by_length[i : i + batch_size]
            batch = [rows[prompt] for prompt in some]
            found = _generate(model, tokenizer, batch, stop_ids, max_new_tokens, between, together)
            answers |= dict(zip(some, found, strict=True))
    finally:
        model.train(training)
    return {prompt: answers[prompt] for prompt in rows}


def _generate(
    model,
    tokenizer,
    rows: Sequence[Sequence[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    between: Callable[[], None],
    together: bool,
) -> list[str]:
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():  # shards gathered in inference mode could not be trained with afterwards
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=min(max_new_tokens, _room(model, width)),
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_ids,
            temperature=None,
            top_p=None,
            top_k=None,
            synced_gpus=together,
            stopping_criteria=[lambda ids, scores: bool(between())],  # never of itself
        )
    return [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def _room(model, width: int) -> int:
    """Tokens that still fit behind a prompt: a model with learned positions has none beyond its last."""
    most = getattr(model.config, "max_position_embeddings", None) or width + 10**9
    if width >= most:
        raise ModelError(
            Problem(f"a prompt has {width} tokens, and the model reads {most} at most", fix="shorten the prompt")
        )
    return most - width


def _stop_ids(model, trained: set[int]) -> list[int]:
    """The tokens that training ends answers with, and those that the model's generation config adds."""
    configured = model.generation_config.eos_token_id
    extra = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*trained, *extra) if token is not None})
