"""Several runs over one frozen base, each with a loop of its own: they meet where a forward is needed, and share it.

    run 0   … optimizer, checkpoint, events …  batch ─┐                                 ┌─ its loss, its gradients …
    run 1   …                                  batch ─┼─ one forward, one backward, ────┼─ its loss, its gradients …
    run 2   …                       its rows measured ┘  each with the rows of all      └─ …

A run is a thread that stands still while another one works: `Seat` hands its batch over and waits, and `train_together`,
on the thread that called it, goes round the table, makes what was asked for, and goes round again. So nothing happens at
the same time, and the loops know nothing of each other. Who has finished, or failed, leaves the table.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import nn

from lora_cli.data.types import Batch
from lora_cli.errors import first_line, is_out_of_memory
from lora_cli.lora.joint import Group, Groups, Stream
from lora_cli.objectives.base import Each, Loss, without_graph
from lora_cli.train.task import Learn, to_device


class Wanted(NamedTuple):
    """What a run needs: the loss of a batch; with `items` its gradient, too, of the loss over so many."""

    batch: Batch
    items: float | None
    seed: int


Answer = Loss | Exception
Act = Callable[[Learn], None]


@dataclass
class Table:
    """The forwards of all runs: `model` is the shared base under joint modules, `groups` what they look at, `each` their
    objective.

    `most` runs go through one forward; where there are more, one goes after the other.
    """

    model: nn.Module
    each: Each
    groups: Groups
    device: torch.device
    most: int

    def answers(self, wanted: dict[int, Wanted]) -> dict[int, Answer]:
        """By the number of the run. Learning and measuring don't mix; out of memory is told to all it may concern."""
        found: dict[int, Answer] = {}
        for learns in (True, False):
            runs = [run for run in sorted(wanted) if (wanted[run].items is not None) == learns]
            for start in range(0, len(runs), self.most):
                some = {run: wanted[run] for run in runs[start : start + self.most]}
                try:
                    found |= self._together(some, learns=learns)
                except Exception as error:
                    # without its traceback, which holds the tensors of the forward
                    failure = MemoryError(first_line(error)) if is_out_of_memory(error) else error
                    found |= dict.fromkeys(some, failure)
        return found

    def _together(self, wanted: dict[int, Wanted], *, learns: bool) -> dict[int, Loss]:
        batches = [to_device(each.batch, self.device) for each in wanted.values()]
        self.groups.time = max(batch["input_ids"].shape[1] for batch in batches)
        self.groups.now = [
            Group(run, *each.batch["input_ids"].shape, Stream(each.seed)) for run, each in wanted.items()
        ]
        self.model.train(learns)
        with torch.set_grad_enabled(learns):
            losses = self.each(self.model, batches)
        if learns:
            items = [each.items for each in wanted.values()]
            torch.stack([loss.total / count for loss, count in zip(losses, items, strict=True)]).sum().backward()
        return dict(zip(wanted, map(without_graph, losses), strict=True))


def train_together(table: Table, acts: Sequence[Act]) -> list[BaseException | None]:
    """Let each act train with the `learn` that it is given; the error that ended each, None where none did."""
    seats = [Seat(number, act) for number, act in enumerate(acts)]
    wanted = {seat.number: first for seat in seats if (first := seat.proceed(None))}
    while wanted:
        for number, answer in table.answers(wanted).items():
            if following := seats[number].proceed(answer):
                wanted[number] = following
            else:
                del wanted[number]
    return [seat.error for seat in seats]


class Seat:
    """A run's place: it is the run's `learn`, and its `task` measures held-out rows."""

    def __init__(self, number: int, act: Act) -> None:
        self.number = number
        self.act = act
        self.error: BaseException | None = None
        self.task = _Measuring(self)
        self.asked: SimpleQueue[Wanted | None] = SimpleQueue()
        self.answered: SimpleQueue[Answer | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"run {number}", daemon=True)
        self.thread.start()

    def __call__(self, batch: Batch, items: float, seed: int) -> Loss:
        return self.ask(Wanted(batch, items, seed))

    def ask(self, wanted: Wanted) -> Loss:
        """Called by the run."""
        self.asked.put(wanted)
        answer = self.answered.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def proceed(self, answer: Answer | None) -> Wanted | None:
        """Called by the table: the run goes on with the answer until it needs the next; None where it has ended."""
        self.answered.put(answer)
        return self.asked.get()

    def _run(self) -> None:
        self.answered.get()
        try:
            self.act(self)
        except BaseException as error:  # told where all have ended
            self.error = error
        self.asked.put(None)


class _Measuring(nn.Module):
    """Has no children: what it is switched to is not what the others' layers are switched to."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self.ask = seat.ask

    def forward(self, batch: Batch) -> Loss:
        return self.ask(Wanted(batch, None, 0))
