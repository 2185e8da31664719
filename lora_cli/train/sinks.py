"""Where events go besides the console: one function a sink, event -> None."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from lora_cli.errors import Problem, RecipeError
from lora_cli.train.events import Evaluated, Event, Sampled, Step

Sink = Callable[[Event], None]


def check_trackers(names: list[str]) -> None:
    """Raise RecipeError for a tracker whose package is missing: before a run loads anything."""
    if "tensorboard" in names and find_spec("tensorboard") is None:
        what = "`training.trackers: [tensorboard]` needs the package `tensorboard`"
        raise RecipeError(Problem(what, fix="pip install 'lora-cli[tensorboard]', or leave the tracker out"))


@contextmanager
def open_sinks(names: list[str], folder: Path) -> Iterator[list[Sink]]:
    """events.jsonl in the run folder, and the trackers that the recipe names."""
    with ExitStack() as stack:
        yield [stack.enter_context(SINKS[name](folder)) for name in ["jsonl", *names]]


@contextmanager
def _jsonl(folder: Path) -> Iterator[Sink]:
    """One JSON object a line, flushed as it happens; a resumed run appends."""
    with (folder / "events.jsonl").open("a") as file:

        def write(event: Event) -> None:
            file.write(json.dumps(event.as_json()) + "\n")
            file.flush()

        yield write


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

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
