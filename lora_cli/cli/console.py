"""What a person sees: results on stdout, progress and notices on stderr, errors in one block.

Foreign text (rows, model output, file names) is printed inert: control characters become visible, and nothing in it is
taken for markup. No secret of the environment is shown.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lora_cli.wording import bytes_text as bytes_text
from lora_cli.wording import duration as duration
from lora_cli.wording import inert as inert
from lora_cli.wording import number as number

WIDEST = 1000  # columns of a table in a file

# highlight and markup off: text is data
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def show(text: str, style: str = "") -> None:
    """A line of the result, on stdout."""
    out.print(Text(_without_secrets(text), style=style), soft_wrap=True)


def note(text: str, style: str = "") -> None:
    """A line about the progress, on stderr."""
    err.print(Text(_without_secrets(text), style=style), soft_wrap=True)


def animated() -> bool:
    """Whether stderr may move: a terminal that can, of someone who has not set NO_COLOR."""
    return err.is_interactive and not err.no_color


@contextmanager
def working(title: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that tells what is being worked on; nothing where nothing may move."""
    if not animated():
        yield lambda what: None
        return
    with err.status(title) as status:
        yield lambda what: status.update(f"{title} {inert(what)}")


def show_json(document: Mapping) -> None:
    """One JSON document on stdout, and nothing else there."""
    sys.stdout.write(_without_secrets(json.dumps(document, indent=2, default=str)) + "\n")


def plain_table(*columns: str, title: str | None = None) -> Table:
    """The look of all our tables: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show_table(table: Table) -> None:
    """On stdout; where that is no terminal, its lines are as long as they need to be."""
    known = out.width
    if not out.is_terminal:
        needed = Measurement.get(out, out.options.update(width=WIDEST), table).maximum
        out.width = max(known, needed)
    out.print(table)
    out.width = known


def show_notices() -> None:
    """Print what lower floors log: information plainly, warnings marked."""
    logger = logging.getLogger("lora_cli")
    logger.handlers = [_Notices()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def told_once() -> Iterator[None]:
    """What lower floors log is shown once inside the block, however many runs it is said of."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return text not in told and not told.add(text)

    handlers = list(logging.getLogger("lora_cli").handlers)
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def _without_secrets(text: str) -> str:
    from lora_cli.recipe.secrets import redacted

    return redacted(text)


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        note(("warning: " if warning else "") + inert(record.getMessage()), style="yellow" if warning else "dim")
