"""Rows being tokenized, as a person watches it: a bar on a terminal, elsewhere a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora_cli.cli.console import animated, err, inert, note

if TYPE_CHECKING:
    from lora_cli.data.pipeline import Tokenized

SHOWN_AFTER = 2  # seconds of tokenizing: what takes less needs no display
PLAIN_SECONDS = 10  # between lines, where there is no terminal to animate


@contextmanager
def tokenizing() -> Iterator[Callable[["Tokenized"], None]]:
    """What to call while rows are tokenized; nothing is shown of few rows."""
    columns = (TextColumn("tokenizing"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"))
    columns += (TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
    bar = Progress(*columns, console=err, transient=True, disable=not animated())
    task = bar.add_task("", total=1.0)
    began = shown = last = 0.0

    def show(at: "Tokenized") -> None:
        nonlocal began, shown, last
        now = time.monotonic()
        if not began or at.share < last:  # another source of rows, such as `data.eval`
            began, shown = now, now + SHOWN_AFTER - PLAIN_SECONDS
        last = at.share
        rate = at.tokens / max(now - began, 1e-3)
        figures = f"{at.rows:,} rows  {at.tokens:,} tokens  {rate:,.0f} tokens/s"
        bar.update(task, completed=at.share, description=figures)
        if now - began > SHOWN_AFTER and at.share < 1 and not bar.disable:
            bar.start()
        if at.share == 1:
            bar.stop()
        if now - shown > PLAIN_SECONDS and (bar.disable or at.share == 1):
            shown = now
            note(f"tokenizing {inert(at.source)}  {at.share:4.0%}  {figures}")

    try:
        yield show
    finally:
        bar.stop()
