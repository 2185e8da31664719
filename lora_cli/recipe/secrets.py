"""What must never be written down: values of the environment's tokens and passwords, and texts that look like one."""

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lora_cli.recipe.document import looks_secret

HIDDEN = "…"
SHORTEST = 8  # characters of a value that is looked for; a shorter one would stand in ordinary words
# Hugging Face, OpenAI and those who follow it, GitHub, Slack, AWS
TOKEN = re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|xox[abp]-|AKIA)[\w-]{16,}")


def redacted(value: Any) -> Any:
    """Texts, and those in lists and mappings, with every secret in them hidden."""
    return _redacted(value, _secrets())


def redacted_command(arguments: list[str]) -> list[str]:
    """A command line with every secret hidden; of `name=value`, the value where the name says what it is."""
    return [_argument(argument) for argument in redacted(arguments)]


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return TOKEN.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {_redacted(key, secrets): _redacted(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner, secrets) for inner in value]
    return value


def _secrets() -> list[str]:
    """The longest first, for one may hold another."""
    return _secrets_of(frozenset(os.environ.items()))


@lru_cache(maxsize=1)
def _secrets_of(environment: frozenset[tuple[str, str]]) -> list[str]:
    found = {value for name, value in environment if looks_secret(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _argument(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    return f"{name}={HIDDEN}" if equals and looks_secret(name.lstrip("-").rpartition(".")[2]) else argument
