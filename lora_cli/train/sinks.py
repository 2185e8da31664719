"""Where events go besides the console: one function a sink, event -> None."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lora_cli.durable import replace_file, sync
from lora_cli.train.events import Event, Saved
from lora_cli.train.trackers import Tracked, open_tracker

Sink = Callable[[Event], None]

EVENTS = "events.jsonl"
OF_SESSIONS = ("started", "resumed", "interrupted", "finished")


@contextmanager
def open_sinks(trackers: Sequence[str], run: Tracked) -> Iterator[list[Sink]]:
    """events.jsonl in the run folder, and the trackers that the recipe names."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(_jsonl(run.folder, run.resumed_at)),
            *(stack.enter_context(open_tracker(name, run)) for name in dict.fromkeys(trackers)),
        ]


@contextmanager
def _jsonl(folder: Path, resumed_at: int | None) -> Iterator[Sink]:
    """One JSON object a line, flushed as it happens, and forced to disk with each checkpoint.

    What it has from behind the step that a run resumes at is dropped: it comes again.
    """
    path = folder / EVENTS
    if resumed_at is not None and path.is_file():
        replace_file(path, "".join(_until(path.read_text().splitlines(keepends=True), resumed_at)).encode())
    with path.open("a") as file:

        def write(event: Event) -> None:
            file.write(json.dumps(event.as_json()) + "\n")
            file.flush()
            if isinstance(event, Saved):
                sync(file.fileno())

        yield write


def _until(lines: list[str], step: int) -> list[str]:
    """The lines up to the checkpoint of `step`, and behind it those that tell of sessions, not of steps.

    A process that is killed leaves half a line, and lines of steps that no checkpoint holds.
    """
    events = [(line, event) for line in lines if (event := _parsed(line))]
    saved = [place for place, (_, event) in enumerate(events) if (event["event"], event["step"]) == ("saved", step)]
    end = saved[-1] if saved else -1
    # killed between the checkpoint and its line
    unsaved = step > 0 and not saved
    return [
        line
        for place, (line, event) in enumerate(events)
        if place <= end or (event["step"] <= step and (unsaved or event["event"] in OF_SESSIONS))
    ]


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
