"""What a person sees: results on stdout, progress and notices on stderr, errors in one block.

Foreign text (rows, model output, file names) is printed inert: control characters become visible, and nothing in it is
taken for markup.
"""

import json
import logging
import sys
import unicodedata
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

# highlight and markup off: text is data
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def inert(text: str) -> str:
    """Foreign text with every control and invisible format character written out, but for line ends and tabs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else _escaped(c) for c in text)


def show(text: str, style: str = "") -> None:
    """A line of the result, on stdout."""
    out.print(Text(text, style=style), soft_wrap=True)


def note(text: str, style: str = "") -> None:
    """A line about the progress, on stderr."""
    err.print(Text(text, style=style), soft_wrap=True)


def animated() -> bool:
    """Whether stderr may move: a terminal that can, of someone who has not set NO_COLOR."""
    return err.is_interactive and not err.no_color


def show_json(document: Mapping) -> None:
    """One JSON document on stdout, and nothing else there."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def plain_table(*columns: str, title: str | None = None) -> Table:
    """The look of all our tables: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show_notices() -> None:
    """Print what lower floors log: information plainly, warnings marked."""
    logger = logging.getLogger("lora_cli")
    logger.handlers = [_Notices()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def number(count: float) -> str:
    return f"{count:,.0f}"


def bytes_text(count: float) -> str:
    """`16.8 MB`: decimal units, as disks and download pages count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """`3 min 20 s`, `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        note(("warning: " if warning else "") + inert(record.getMessage()), style="yellow" if warning else "dim")
