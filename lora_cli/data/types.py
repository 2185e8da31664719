"""The stations of one training example: Conversation, Instruction, Text, Tokens, Labelled or Preference -> Example -> Batch.

A row of a file becomes a Conversation (turns, to be rendered by the chat template), an Instruction (a chat where there
is a template, else a written prompt), a Text (spans, rendered as they stand), Tokens (which need no rendering), a
Labelled text (to be classified) or a Preference (two of the others, of which one is better); rendering gives an Example (tokens and their weights); collating gives a Batch
(tensors).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

from lora_cli.errors import Problem, RecipeError
from lora_cli.recipe.document import shown
from lora_cli.recipe.template import how_to_ask, prompt_text

IGNORE = -100  # the label of a position that is not trained: torch's and transformers' own value


@dataclass(frozen=True)
class RowId:
    """Where a row came from, for messages that name it: the source as the recipe names it, and its 1-based line, or its
    1-based row in a source that has no lines (parquet, a JSON list, the hub)."""

    source: str
    number: int
    is_line: bool = True

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" if self.is_line else f"{self.source} row {self.number}"


class BadRow(Exception):
    """A row that does not fit its format, or that the template refuses. The pipeline adds where it stands."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


class NothingToLearn(BadRow):
    """A row that is well-formed but has an empty answer; it is left out and counted."""


@dataclass(frozen=True)
class Message:
    role: str  # system, user, assistant or tool
    content: str
    train: bool  # whether this turn is learned
    weight: float = 1.0  # of each of its tokens in the loss, where it is learned
    fields: Mapping[str, Any] = field(default_factory=dict)  # what else the template reads: `tool_calls` …

    def as_template_reads_it(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()  # what may be called, as JSON schemas


@dataclass(frozen=True)
class Instruction:
    """A task, what it works on (may be empty), and the answer, which is trained."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Span:
    text: str
    train: bool


@dataclass(frozen=True)
class Text:
    """Text that no chat template touches: a document, or a prompt (not trained) and its completion (trained)."""

    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Tokens:
    """A row that is tokenized already, with the weight of each token."""

    input_ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Labelled:
    """A text, perhaps with a second one behind it, and what it is to be classified as."""

    text: str
    label: str
    pair: str | None = None


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, each with the prompt before it; in both, only what follows the prompt is trained."""

    chosen: Conversation | Instruction | Text
    rejected: Conversation | Instruction | Text


Item = Conversation | Instruction | Text | Tokens | Labelled | Preference
CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class PromptForm:
    """How training rendered the rows that a bare question is to be asked like: their format, None where it is not known,
    and the `data.template` that they went through."""

    format: str | None = None
    template: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether no chat template touched the rows."""
        return self.format in ("text", "completion", "template", "tokens")

    def filled(self, prompt: str) -> str:
        """The prompt as a row would be written before its answer. Raises RecipeError where the template has no place for it."""
        if self.format != "template" or self.template is None:
            return prompt
        try:
            return prompt_text(self.template, prompt)
        except ValueError as error:
            raise RecipeError(Problem(str(error), line=shown(prompt), fix=how_to_ask(self.template))) from error


UNKNOWN_FORM = PromptForm()


@dataclass(frozen=True)
class Example:
    """Tokens with the weight of each in the loss: 0 for what is only read, above it for what is learned (mostly 1).

    `weights[i]` is the weight of predicting `input_ids[i]` from what stands before it; so `weights[0]` is always 0. Of a
    row that is classified no token is learned but its label, once: the last token carries that weight.
    """

    input_ids: list[int]
    weights: list[float]
    row: RowId
    cut: int = 0  # tokens that max_length removed
    repeats: float = 1.0  # how often an epoch takes it, on average
    label: int | None = None  # the number of its label, where rows are classified
    side: str = ""  # CHOSEN or REJECTED, of a pair: its two examples stand one behind the other
    segments: tuple[int, ...] | None = (
        None  # 0 for tokens of its text, 1 for those of its pair, where the model tells them
    )

    @property
    def items(self) -> float:
        """What this example adds to the divisor of the step's loss."""
        return sum(self.weights)

    @property
    def full_length(self) -> int:
        """Tokens before max_length."""
        return len(self.input_ids) + self.cut

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one that is learned."""
        return next((place for place, weight in enumerate(self.weights) if weight), len(self.weights))


class Batch(TypedDict):
    """One micro-batch. Positions without a label carry IGNORE; `weights` are aligned with `labels`.

    `documents` and `places` are there where rows are packed: the number of each token's document in its row, and its
    place in the document. `sources` is there where the examples come from several sources.

    Where rows are classified, `labels`, `weights` and `sources` are those of the rows, without a time, and what is padding
    is told.
    """

    input_ids: "Tensor"  # [batch, time] int64
    labels: "Tensor"  # [batch, time] int64, already shifted: labels[t] is the token to predict at t
    weights: "Tensor"  # [batch, time] float32
    positions: NotRequired["Tensor"]  # [kept] int64: the places at which any row has a label, for logits of those alone
    documents: NotRequired["Tensor"]  # [batch, time] int64
    places: NotRequired["Tensor"]  # [batch, time] int64
    sources: NotRequired["Tensor"]  # [sources, batch, time] bool: which labels are of which source
    attention_mask: NotRequired["Tensor"]  # [batch, time] int64: 1 for a token, 0 for padding
    token_type_ids: NotRequired["Tensor"]  # [batch, time] int64: the segment of each token
