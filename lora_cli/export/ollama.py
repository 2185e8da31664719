"""A folder for `ollama create`: a Modelfile, and the adapter as a GGUF file beside it.

    FROM base          a GGUF file, or a folder that Ollama imports
    ADAPTER ./adapter.gguf
    TEMPLATE …         the tokenizer's chat template, which is Jinja, in Ollama's own language, which is Go's
    PARAMETER stop …   the end token

Ollama's own reading of PEFT's folder knows few architectures, and `lora_alpha` alone; the GGUF file says it all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.data.chat_template import rendered
from lora_cli.data.types import BadRow
from lora_cli.errors import ModelError, Problem
from lora_cli.export.adapter_folder import bytes_of
from lora_cli.export.gguf import SUFFIX
from lora_cli.export.gguf_adapter import FILE, read_adapter_file, write_adapter_file
from lora_cli.export.order import ExportReport, Order, accepted, proved
from lora_cli.export.staging import staged
from lora_cli.limits import read_json
from lora_cli.models.load import load_tokenizer, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
# generation_config.json's names of what Ollama calls otherwise, or the same
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Turns:
    """A chat template that writes each message between two texts of its role; `default` is the system message that it
    writes where there is none, and `answer` the generation prompt."""

    roles: Mapping[str, tuple[str, str]]
    answer: str
    default: str = ""

    def rendered(self, messages: list[dict]) -> str:
        """The conversation up to the answer that is asked for, as Ollama renders it."""
        if self.default and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        return "".join(m["content"].join(self.roles[m["role"]]) for m in messages) + self.answer


def export_ollama(order: Order, progress=None) -> ExportReport:
    """The folder; Ollama itself is not asked."""
    findings, differences = accepted(order, "ollama")
    base = order.known_base
    tokenizer = load_tokenizer(tokenizer_folder(order.folder, base.folder))
    with staged(order.out) as draft:
        write_adapter_file(order.adapter, base.folder, draft / FILE)
        (draft / MODELFILE).write_text(modelfile(_source(order), tokenizer, base.folder), encoding="utf-8")
        apart, proof = proved(order, read_adapter_file(draft / FILE, order.adapter, base.folder))
        size = bytes_of(draft)
    return ExportReport(
        out=order.out,
        format="ollama",
        tensors=2 * len(order.adapter.layers),
        bytes=size,
        difference=apart,
        findings=findings,
        use=f"ollama create NAME -f {order.out / MODELFILE}",
        proof=proof,
        base_differences=differences,
    )


def modelfile(source: str, tokenizer: "PreTrainedTokenizerBase", base: Path) -> str:
    """The Modelfile's text. Raises ModelError for a chat template that is not message by message."""
    lines = [f"FROM {source}", f"ADAPTER ./{FILE}"]
    turns = turns_of(tokenizer) if tokenizer.chat_template else None
    lines.append(f"TEMPLATE {_quoted(go_template(turns) if turns else '{{ .Prompt }}')}")
    if turns and turns.default:
        lines.append(f"SYSTEM {_quoted(turns.default)}")
    lines += [f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}"]
    return "\n".join([*lines, *_parameters(base)]) + "\n"


def turns_of(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """What the template writes around each role's message, found by rendering and proved on conversations.

    The first token, which llama.cpp adds by itself, is left out.
    """
    try:
        found = _found(tokenizer)
        same = all(_as_ollama(tokenizer, talk) == found.rendered(talk) for talk in TALKS)
    except (BadRow, ValueError):
        same = False
    if not same or any("{{" in text or QUOTES in text for text in _texts(found)):
        raise ModelError(
            Problem(
                "its chat template is not message by message, so Ollama's language can't say it faithfully",
                fix="take `--to gguf`: the model then carries the template itself, and write `FROM ./model.gguf`",
            )
        )
    return found


def go_template(turns: Turns) -> str:
    cases = []
    for role, (before, after) in turns.roles.items():
        test = "if" if not cases else "else if"
        cases.append(f'{{{{ {test} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    return f"{{{{- range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{turns.answer}"


QUOTES = '"""'
S, U, A, V = "\x01s", "\x01u", "\x01a", "\x01v"  # contents that no template holds


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


TALKS = (
    [_message("user", "one")],
    [_message("system", "be brief"), _message("user", "one")],
    [_message("user", "one"), _message("assistant", "two"), _message("user", "three")],
    [
        _message("system", "be brief"), _message("user", "one"), _message("assistant", "two"),
        _message("user", "three"), _message("assistant", "four"), _message("user", "five"),
    ],
)  # fmt: skip


def _found(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """Raises ValueError where the pieces don't fit together."""
    system, user = _message("system", S), _message("user", U)
    talk = [system, user, _message("assistant", A), _message("user", V)]
    start, rest = _as_ollama(tokenizer, talk).split(S)
    between, rest = rest.split(U)
    asked, rest = rest.split(A)
    again, _ = rest.split(V)
    closed = _without_first(tokenizer, rendered(tokenizer, talk[:3])).split(A)[1]
    after_user, answer = _after_user(tokenizer, talk[:2])
    if asked != after_user + answer or not again.startswith(closed):
        raise ValueError("an answer does not begin with its generation prompt")
    before_user = again.removeprefix(closed)
    roles = {
        "system": (start, between.removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (answer, closed),
    }
    alone = _as_ollama(tokenizer, [user]).split(U)[0].removesuffix(before_user)
    default = alone.removeprefix(roles["system"][0]).removesuffix(roles["system"][1]) if alone else ""
    return Turns(roles, answer, default)


def _after_user(tokenizer: "PreTrainedTokenizerBase", talk: list[dict]) -> tuple[str, str]:
    """(what stands after the user's message, the generation prompt)"""
    after = _without_first(tokenizer, rendered(tokenizer, talk)).split(U)[1]
    whole = _as_ollama(tokenizer, talk).split(U)[1]
    if not whole.startswith(after):
        raise ValueError("the generation prompt changes what stands before it")
    return after, whole.removeprefix(after)


def _as_ollama(tokenizer: "PreTrainedTokenizerBase", messages: list[dict]) -> str:
    return _without_first(tokenizer, rendered(tokenizer, messages, add_generation_prompt=True))


def _without_first(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and _adds_first(tokenizer) else text


def _adds_first(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a first token is added to any text."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _texts(turns: Turns) -> list[str]:
    return [text for pair in turns.roles.values() for text in pair] + [turns.answer, turns.default]


def _source(order: Order) -> str:
    """The base's own GGUF file, else its folder."""
    file = Path(order.known_base.name).expanduser()
    return str(file.resolve()) if file.suffix == SUFFIX else str(order.known_base.folder.resolve())


def _quoted(text: str) -> str:
    return f"{QUOTES}{text}{QUOTES}"


def _parameters(base: Path) -> list[str]:
    file = base / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    return [
        f"PARAMETER {ours} {found[theirs]}"
        for theirs, ours in PARAMETERS.items()
        if type(found.get(theirs)) in (int, float)
    ]
