"""One frozen layer under the adapters of several runs: the rows of a batch belong to the runs, group by group.

    x      rows of run 0 │ rows of run 1 │ …        [rows, time, in]
    W₀ x   ───────── in one product ───────
    y      + s₀ B₀A₀ x₀  │ + s₁ B₁A₁ x₁  │ …        each by a layer of its own: its r, scale, dropout, DoRA, start

The layers are those of the runs themselves, so a backward leaves in each exactly the gradient of its own rows. A run that
adapts other modules than its neighbours has no layer here, and its rows are the base's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.inject import lora_layers
from lora_cli.lora.layer import LoRALinear
from lora_cli.lora.stand_in import StandIn

State = Tensor


class Stream:
    """What a run draws at random in one forward, apart from what others draw in the same one.

    Dropout knows torch's global generator alone, so the run's own takes its place for as long as its layer is at work. A
    layer that comes again is being recomputed for the backward: it draws what it drew.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now: State | None = None
        self.began: dict[int, State] = {}

    @contextmanager
    def of(self, layer: nn.Module, device: torch.device) -> Iterator[None]:
        again = self.began.get(id(layer))
        self._start(again if again is not None else self.now, device)
        if again is None:
            self.began[id(layer)] = _state(device)
        yield
        if again is None:
            self.now = _state(device)

    def _start(self, state: State | None, device: torch.device) -> None:
        if state is None:
            torch.manual_seed(self.seed)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


@dataclass(frozen=True)
class Group:
    """The rows of one run in a batch: how many, and how long they are without the padding that other runs' rows cause."""

    run: int
    rows: int
    time: int
    stream: Stream


@dataclass
class Groups:
    """Whose rows the batch has, in their order; all joint layers of a model look here, and it is set before each forward."""

    now: Sequence[Group] = ()
    time: int = 0


class JointLinear(StandIn):
    """Takes the place of a frozen linear layer; `layers` are those of the runs that adapt it, by the run's number."""

    def __init__(self, base: nn.Module, layers: Mapping[int, LoRALinear], groups: Groups) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleDict({str(run): layer for run, layer in layers.items()})
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, …, in] -> [rows, …, out]"""
        y = self.base(x)
        groups = self.groups.now
        sizes = [group.rows for group in groups]
        if len(x) != sum(sizes):
            raise ModelError(_no_rows(len(x), sum(sizes)))
        parts = zip(groups, x.split(sizes), y.split(sizes), strict=True)
        return torch.cat([self._added(*part) for part in parts]) if len(groups) > 1 else self._added(groups[0], x, y)

    def _added(self, group: Group, x: Tensor, y: Tensor) -> Tensor:
        if str(group.run) not in self.layers:
            return y
        layer = self.layers[str(group.run)]
        if not (layer.training and layer.dropout.p):
            return layer.added(x, y)
        # dropout draws one number for each that it sees: no more than it would see without the other runs
        end = group.time if x.ndim == 3 and x.shape[1] == self.groups.time else x.shape[1]
        with group.stream.of(layer, x.device):
            own = layer.added(x[:, :end], y[:, :end])
        return own if end == x.shape[1] else torch.cat([own, y[:, end:]], dim=1)


def join(model: nn.Module, models: Sequence[nn.Module]) -> Groups:
    """Put joint layers over the adapters of `models` into `model`, which is a bare copy of the base that they share."""
    groups, adapted = Groups(), [lora_layers(each) for each in models]
    for path in dict.fromkeys(path for layers in adapted for path in layers):
        layers = {run: layers[path] for run, layers in enumerate(adapted) if path in layers}
        model.set_submodule(path, JointLinear(model.get_submodule(path), layers, groups))
    return groups


def _state(device: torch.device) -> State:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _no_rows(found: int, rows: int) -> Problem:
    what = f"a layer of this base sees {found} rows where the batch has {rows}, so the runs can't be told apart in it"
    return Problem(what, fix="leave out `--together`: the runs are trained one after another then")
