"""Where events go besides the console: one function a sink, event -> None."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from lora_cli.durable import replace_file, sync
from lora_cli.errors import Problem, RecipeError
from lora_cli.train.events import Evaluated, Event, Sampled, Saved, Step

Sink = Callable[[Event], None]

EVENTS = "events.jsonl"
OF_SESSIONS = ("started", "resumed", "interrupted", "finished")


def check_trackers(names: list[str]) -> None:
    """Raise RecipeError for a tracker whose package is missing: before a run loads anything."""
    if "tensorboard" in names and find_spec("tensorboard") is None:
        what = "`training.trackers: [tensorboard]` needs the package `tensorboard`"
        raise RecipeError(Problem(what, fix="pip install 'lora-cli[tensorboard]', or leave the tracker out"))


@contextmanager
def open_sinks(names: list[str], folder: Path, *, resumed_at: int | None = None) -> Iterator[list[Sink]]:
    """events.jsonl in the run folder, and the trackers that the recipe names.

    What they have from behind the step that a run resumes at is dropped: it comes again.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(SINKS[name](folder, resumed_at)) for name in ["jsonl", *names]]


@contextmanager
def _jsonl(folder: Path, resumed_at: int | None) -> Iterator[Sink]:
    """One JSON object a line, flushed as it happens, and forced to disk with each checkpoint."""
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


@contextmanager
def _tensorboard(folder: Path, resumed_at: int | None) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resumed_at is None else resumed_at + 1)

    def write(event: Event) -> None:
        match event:
            case Step():
                for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
                    writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
            case Evaluated():
                writer.add_scalar("eval/loss", event.loss, event.step)
            case Sampled():
                for prompt, answer in event.samples.items():
                    writer.add_text(prompt, answer, event.step)

    try:
        yield write
    finally:
        writer.close()


SINKS = {"jsonl": _jsonl, "tensorboard": _tensorboard}
