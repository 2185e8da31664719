"""llama.cpp itself, from the wheel `xllamacpp`: what it answers with a GGUF model, and with an adapter beside it."""

from pathlib import Path

import pytest
import torch
from adapters import ROWS
from torch import Tensor

MOST_ALTERNATIVES = 512


def log_probs(model: Path, lora: Path | None = None, rows=ROWS) -> list[Tensor | None]:
    """[vocabulary] for each row of ids, or text: the log-probabilities of the token that comes next; computed in float32.

    None where the likeliest token is a part of a character: of those it tells none.
    """
    llama = pytest.importorskip("xllamacpp")
    parameters = llama.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_predict, parameters.n_parallel, parameters.warmup = 64, 1, 1, False
    parameters.verbosity = -1
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        parameters.lora_adapters = [llama.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = llama.Server(parameters)
    return [_next(server, row) for row in rows]


def expected_log_probs(logits: list[Tensor]) -> list[Tensor]:
    """The same of [time, vocabulary] logits."""
    return [row[-1].double().log_softmax(-1).float() for row in logits]


def _next(server, row: list[int] | str) -> Tensor | None:
    asked = {"prompt": row, "n_predict": 1, "n_probs": MOST_ALTERNATIVES, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(asked)
    told = answer["choices"][0]["logprobs"]
    if told is None:
        return None
    found = told["content"][0]["top_logprobs"]
    values = torch.full((max(entry["id"] for entry in found) + 1,), float("nan"))
    for entry in found:
        values[entry["id"]] = entry["logprob"]
    return values
