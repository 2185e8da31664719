"""Embedding and head in PEFT's files: rows of tokens that were trained, and tables that stand there in full."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.tokens import NAME, ROWS

PREFIX = "base_model.model."  # of every tensor's name
FULL_TABLE = f".{NAME}.base_layer.weight"
VOCABULARY = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out")
WRAPPED = ("modules_to_save.weight", "original_module.weight")  # a module trained whole, and the one under it
HEAD_IN_FULL = re.compile(re.escape(PREFIX) + r"[^.]+\.weight")  # heads stand outside of the base model


def trained_rows(tensors: Mapping[str, Tensor], tokens: Sequence[int]) -> tuple[dict[str, Tensor], set[str]]:
    """The trained rows by table, and the names of all tensors that belong to tables.

    Where the vocabulary was resized, PEFT saves the tables in full beside them. In that of a head which it did not train
    stand the rows that new tokens were given at random; those of a tied head are the embedding's once more.
    """
    rows = {name.removesuffix(f".{ROWS}"): tensor for name, tensor in tensors.items() if name.endswith(f".{ROWS}")}
    full = {name for name in tensors if name.endswith(FULL_TABLE) or HEAD_IN_FULL.fullmatch(name)}
    used = full | {f"{path}.{ROWS}" for path in rows}
    for name in filter(HEAD_IN_FULL.fullmatch, full):
        if len(tensors[name]) > max(tokens):
            rows[name.removesuffix(".weight")] = tensors[name][list(tokens)]
    return {path.removeprefix(PREFIX): table for path, table in _without_tied(rows).items()}, used


def in_full(tensors: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], set[str]]:
    """Embedding and head, by path, as PEFT saves them where their vocabulary was resized: in full, trained or not; and the
    names of all tensors that belong to them.

    Those that are trained whole stand there three times. Of a vocabulary of the base's own size there are none, but for
    those trained whole, which are read as such.
    """
    endings = tuple(f".{name}.weight" for name in VOCABULARY)
    paths = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(endings)}
    again = any(f"{path}.{copy}" in tensors for path in paths for copy in WRAPPED)
    if not again and all(path.endswith(tuple(names)) for path in paths):
        return {}, set()
    if len({len(table) for table in paths.values()}) > 1:
        return {}, set()
    found = {path.removeprefix(PREFIX): table for path, table in _without_tied(paths).items()}
    return found, {f"{path}.{name}" for path in paths for name in ("weight", *WRAPPED)}


def of_every_token(config: LoRAConfig, full: Mapping[str, Tensor]) -> LoRAConfig:
    """The config of an adapter whose tables stand in it in full: a table trained whole is one of which every row is, and
    rows may be more than the base's."""
    tokens = range(len(next(iter(full.values()))))
    rest = tuple(name for name in config.modules_to_save if not any(path.endswith(name) for path in full))
    return replace(config, trainable_tokens=tuple(tokens), modules_to_save=rest)


def _without_tied(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a head that is the embedding once more. The names are those in the file, as are these."""
    heads = [path for path in tables if HEAD_IN_FULL.fullmatch(f"{path}.weight")]
    tied = {h for h in heads for path in tables if path != h and torch.equal(tables[h], tables[path])}
    return {path: tables[path] for path in sorted(tables) if path not in tied}
