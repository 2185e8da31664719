"""YAML text -> plain values, each with its place in the file: no types yet, and no trust in the file.

Scalars stay as written (`1e-4`, `010`, `yes` are text here; the schema's types parse them); only `null`, `~` and
nothing become None. Tags, a second document, and files that are large, deep or grow by aliases are refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lora_cli.errors import Problem, RecipeError, SafetyError

MOST_BYTES = 1_000_000
MOST_NODES = 10_000
DEEPEST = 50

BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # what YAML counts as the end of a line
NULLS = {"", "~", "null", "Null", "NULL"}

SECRET_NAME = re.compile(r"(.*_)?(token|auth)|.*(secret|password|passwd|credential|api_?key|access_key|private_key).*")
SPECIAL_TOKEN = re.compile(r"(.*_)?(bos|eos|pad|unk|sep|cls|mask|stop|image|audio|video)_token")
SECRET_TEXT = re.compile(
    r"(token|secret|password|passwd|credential|api_?key|access_key|private_key)[\"']?\s*[:=]|\b(hf_|sk-|ghp_)\w{16}",
    re.IGNORECASE,
)

KeyPath = tuple[str | int, ...]


def looks_secret(key: str) -> bool:
    name = key.lower().replace("-", "_")
    return bool(SECRET_NAME.fullmatch(name)) and not SPECIAL_TOKEN.fullmatch(name)


def shown(text: str, *, most: int = 100) -> str:
    """Foreign text as it may be printed: one line, control characters visible, nothing that looks like a secret."""
    text = text.strip()[: most + 40]  # far enough to know a secret whose start would be printed
    if SECRET_TEXT.search(text):
        return "…"
    line = visible(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def visible(text: str) -> str:
    """Text with its control characters, and those that turn the direction of writing, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Source:
    """A text that values come from: a file, or one `--set`. `hidden` are the rows that hold secrets."""

    name: str
    text: str
    is_override: bool = False
    hidden: set[int] = field(default_factory=set, compare=False)

    @cached_property
    def lines(self) -> list[str]:
        return BREAK.split(self.text)

    def at(self, mark: yaml.Mark | None = None) -> "Place":
        return Place(self, mark.line, mark.column) if mark else Place(self, 0, 0)

    def at_index(self, index: int) -> "Place":
        lines = BREAK.split(self.text[:index])
        return Place(self, len(lines) - 1, len(lines[-1]))


@dataclass(frozen=True)
class Place:
    """Row and column in a source, from 0; `where` counts from 1."""

    source: Source
    row: int
    column: int

    @property
    def where(self) -> str:
        if self.source.is_override:
            return self.source.name
        return f"{visible(self.source.name)}:{self.row + 1}:{self.column + 1}"

    @property
    def origin(self) -> str:
        """Where a value came from, as the resolved recipe says it: `recipe.yaml:7:6` or `--set`."""
        return "--set" if self.source.is_override else Path(self.where).name

    @property
    def order(self) -> tuple[bool, int, int]:
        return self.source.is_override, self.row, self.column

    def problem(self, what: str, fix: str, *, quoted: bool = True) -> "Finding":
        return Finding(self, Problem(what, self.where, self._line() if quoted else "", fix))

    def _line(self) -> str:
        if self.source.is_override or self.row in self.source.hidden:
            return ""
        line = shown(self.source.lines[self.row])
        return "" if line == "…" else line


@dataclass(frozen=True)
class Finding:
    """A problem and its place, so that all of them can be told in the order of the file."""

    place: Place
    problem: Problem


@dataclass(frozen=True)
class Document:
    """The values of a recipe before they have types; `keys` and `places` say where each key and each value stands."""

    source: Source
    values: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def parse(source: Source) -> tuple[Any, Document]:
    """The value in `source` (None where it is empty), and a Document with its places and doubled keys.

    Raises SafetyError for tags and for what is too deep or too many; RecipeError for what is no YAML.
    """
    document = Document(source)
    try:
        _check_events(source)
        node = yaml.compose(source.text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        what = f"the recipe holds the character U+{error.character:04X}, which YAML does not allow"
        raise RecipeError(source.at_index(error.position).problem(what, "remove it").problem) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax(source, error).problem) from None
    return (None if node is None else _Walk(document).value(node, ())), document


def override(document: Document, text: str) -> None:
    """Put one `--set a.b=value` into the document; what is wrong with it joins the findings."""
    name, equals, value = text.partition("=")
    hidden = any(map(looks_secret, name.split("."))) or bool(SECRET_TEXT.search(text))
    source = Source(f"--set {shown(name)}=…" if hidden else f"--set {shown(text)}", value, is_override=True)
    if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*", name):
        what = f"`{shown(name)}` is not the name of a recipe key"
        document.findings.append(source.at().problem(what, "write `--set block.key=value`, as in `--set lora.r=16`"))
    elif not equals:
        document.findings.append(source.at().problem(f"`{name}` has no value", f"write `--set {name}=VALUE`"))
    else:
        try:
            found, inner = parse(source)
        except RecipeError as error:
            document.findings.extend(Finding(source.at(), problem) for problem in error.problems)
            return
        document.findings.extend(inner.findings)
        _put(document, tuple(name.split(".")), found, source.at())


def _put(document: Document, path: tuple[str, ...], value: Any, place: Place) -> None:
    if len(path) == 1 and isinstance(value, dict):  # a whole block: its keys join those of the file
        for key, inner in value.items():
            _put(document, (*path, key), inner, place)
        return
    holder = document.values
    for depth, key in enumerate(path[:-1], 1):
        if not isinstance(holder.get(key), dict):
            holder[key] = {}
            document.keys[path[:depth]] = document.places[path[:depth]] = place
        holder = holder[key]
    holder[path[-1]] = value
    for inner in (path[:2], path, *_inside(value, path)):
        document.keys[inner] = document.places[inner] = place


def _inside(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from _inside(inner, (*path, key))


def _check_events(source: Source) -> None:
    """Depth, number, tags and documents, from the flat stream of events, before composing may overflow the stack."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(source.text, Loader=yaml.SafeLoader)):
        place = source.at(event.start_mark)
        if getattr(event, "tag", None):  # PyYAML's events differ in what they have
            what, fix = "a recipe holds plain values, and this has a YAML tag", "remove the `!…` before the value"
            raise SafetyError(place.problem(what, fix).problem)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        _limit(place, depth, count)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            what, fix = "a recipe is one YAML document, and a second one starts here", "remove the `---` before it"
            raise RecipeError(place.problem(what, fix).problem)


def _limit(place: Place, depth: int, nodes: int) -> None:
    if depth > DEEPEST:
        what = f"a recipe nests at most {DEEPEST} levels, and this goes deeper"
        raise SafetyError(place.problem(what, "write it flat: a block, its keys, their values").problem)
    if nodes > MOST_NODES:
        what = f"a recipe has at most {MOST_NODES:,} values, counting what aliases repeat, and this has more"
        raise SafetyError(place.problem(what, "remove the aliases (`*name`), and keep rows in data files").problem)


class _Walk:
    """One pass over the composed nodes: plain values out, places into the document, counting as aliases expand."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        place = self.document.source.at(node.start_mark)
        self.nodes += 1
        _limit(place, len(path), self.nodes)
        self.document.places[path] = place
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(inner, (*path, number)) for number, inner in enumerate(node.value)]
        return None if node.style is None and node.value in NULLS else node.value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, inner in node.value:
            place = self.document.source.at(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(place, "a key must be a word, not a list or a block", "write `key: value`")
                continue
            if looks_secret(key.value):
                self.document.source.hidden.update(range(key.start_mark.line, inner.end_mark.line + 1))
            if key.value in found:
                self._doubled(place, (*path, key.value))
                continue
            self.document.keys[(*path, key.value)] = place
            found[key.value] = self.value(inner, (*path, key.value))
        return found

    def _doubled(self, place: Place, path: KeyPath) -> None:
        name = shown(".".join(map(str, path)))
        first = self.document.keys[path].row + 1
        self._refuse(place, f"`{name}` is given twice", f"keep one of the two; the first is in line {first}")

    def _refuse(self, place: Place, what: str, fix: str) -> None:
        self.document.findings.append(place.problem(what, fix))


# The start of what PyYAML says -> the fix; the first that fits
SYNTAX_FIXES = (
    (r"found character '\\t'", "indent with spaces; YAML allows no tabs there"),
    (r"found character", "put the value in quotation marks"),
    (r"mapping values are not allowed", "indent the keys of a block alike, and quote text that holds `: `"),
    (r"could not find expected ':'", "write `key: value`, with a space after the colon"),
    (r"expected <block end>", "indent the keys of a block alike"),
    (r"expected ',' or", "close the bracket, and put commas between the entries"),
    (r"found unexpected (end of stream|document separator)", "close the quotation mark"),
    (r"found undefined alias", "write the value out, or put text that starts with `*` in quotation marks"),
    (r"", "look at the quotation marks, brackets and indentation of this line and the one before"),
)


def _syntax(source: Source, error: yaml.MarkedYAMLError) -> Finding:
    said = error.problem or error.context or "it cannot be read"
    quoted_from = error.context_mark if error.context and "quoted scalar" in error.context else None
    fix = next(fix for start, fix in SYNTAX_FIXES if re.match(start, said))
    return source.at(quoted_from or error.problem_mark or error.context_mark).problem(
        f"not valid YAML: {visible(said)}", fix
    )
