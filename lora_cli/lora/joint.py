"""One frozen base under the adapters of several runs: the rows of a batch belong to the runs, group by group.

    x      rows of run 0 │ rows of run 1 │ …        [rows, …, in]
    W₀ x   ───────── in one product ───────
    y      + s₀ B₀A₀ x₀  │ + s₁ B₁A₁ x₁  │ …        each by a layer of its own: its r, scale, dropout, DoRA, start

The layers are those of the runs themselves, so a backward leaves in each exactly the gradient of its own rows. The same
goes for biases and rows of tokens, which move what a module gives. A module that a run trains whole, and experts, whose
weights an adapter changes before they meet x, are called with the run's own rows. Where a run changes nothing, its rows
are the base's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.inject import changed_modules, moves_of
from lora_cli.lora.layer import LoRALinear, LoRAModule
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


class JointModule(StandIn):
    """Takes the place of a module of the frozen base; `own` are those that runs have there, by the run's number."""

    def __init__(self, base: nn.Module, own: Mapping[int, nn.Module], groups: Groups) -> None:
        super().__init__()
        self.base = base
        self.own = nn.ModuleDict({str(run): module for run, module in own.items()})
        self.groups = groups

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base takes it and gives it, for the rows of all groups."""
        groups = self.groups.now
        y = self.base(*args, **kwargs) if any(map(self._adds, groups)) else None
        if len(groups) == 1:
            return self._of(groups[0], args, kwargs, y)
        rows = sum(group.rows for group in groups)
        sides = _sides((args, kwargs))
        if sides == [1] and args[0].ndim == 2 and isinstance(y, Tensor):  # positions, which are those of all rows
            args, y, sides = (args[0].expand(rows, -1),), y.expand(rows, *y.shape[1:]), [rows]
        if not sides or sides[0] not in (rows, rows * self.groups.time):  # routers and experts see all tokens in one
            raise ModelError(_no_rows(sides[0] if sides else 0, rows))
        sizes = [group.rows * (sides[0] // rows) for group in groups]
        shares = zip(groups, *(_split(each, sizes) for each in (args, kwargs, y)), strict=True)
        return _joined([self._of(*share) for share in shares])

    def _adds(self, group: Group) -> bool:
        """Whether what the base gives for the group's rows is needed."""
        run = str(group.run)
        return run not in self.own or isinstance(self.own[run], LoRAModule) or not isinstance(self.own[run], StandIn)

    def _of(self, group: Group, args: tuple, kwargs: dict, y: Any) -> Any:
        if str(group.run) not in self.own:
            return y
        own = self.own[str(group.run)]
        if not self._adds(group):
            return own(*args, **kwargs)
        if isinstance(own, LoRAModule):
            y = self._updated(own, group, args[0], y)
        for move in moves_of(own):
            y = move(own, args, y)
        return y

    def _updated(self, layer: LoRAModule, group: Group, x: Tensor, y: Tensor) -> Tensor:
        if not (isinstance(layer, LoRALinear) and layer.training and layer.dropout.p):
            return layer.added(x, y)
        if x.ndim == 2 and len(x) == group.rows * self.groups.time:  # as routers and experts see them: all rows in one
            x, y = (each.unflatten(0, (group.rows, -1)) for each in (x, y))
            return self._updated(layer, group, x, y).flatten(0, 1)
        # dropout draws one number for each that it sees: no more than it would see without the other runs
        end = group.time if x.ndim == 3 and x.shape[1] == self.groups.time else x.shape[1]
        with group.stream.of(layer, x.device):
            own = layer.added(x[:, :end], y[:, :end])
        return own if end == x.shape[1] else torch.cat([own, y[:, end:]], dim=1)


def mixes_rows(model: nn.Module) -> str | None:
    """The first module whose output an adapter changes and that belongs to no row, so that one forward has one of them.

    DeBERTa projects the distances between tokens with the layers that project the tokens, once for all rows.
    """
    shared = ("query_proj", "key_proj")
    for path in changed_modules(model):
        owner, _, name = path.rpartition(".")
        if name in shared and type(model.get_submodule(owner)).__name__ == "DisentangledSelfAttention":
            return path
    return None


def join(model: nn.Module, models: Sequence[nn.Module]) -> Groups:
    """Put joint modules over what the adapters of `models` change into `model`, which is a bare copy of the base that
    they share."""
    groups, changed = Groups(), [changed_modules(each) for each in models]
    paths = dict.fromkeys(path for modules in changed for path in modules)
    for path in sorted(
        paths, key=lambda path: -path.count(".")
    ):  # a module that is trained whole may hold adapted ones
        own = {run: modules[path] for run, modules in enumerate(changed) if path in modules}
        model.set_submodule(path, JointModule(model.get_submodule(path), own, groups))
    return groups


def _sides(value: Any) -> list[int]:
    """The first sides of the tensors in what a module is called with, in their order."""
    if isinstance(value, Tensor):
        return [len(value)] if value.ndim > 1 else []
    if isinstance(value, dict):
        value = tuple(value.values())
    return [side for each in value for side in _sides(each)] if isinstance(value, (tuple, list)) else []


def _split(value: Any, sizes: Sequence[int]) -> list[Any]:
    """A share of it for each group: of tensors some of their rows. What has no rows is the same for all."""
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == sum(sizes):
        return list(value.split(list(sizes)))
    if isinstance(value, dict):
        shares = [_split(each, sizes) for each in value.values()]
        return [dict(zip(value, share, strict=True)) for share in zip(*shares, strict=True)] or [{} for _ in sizes]
    if isinstance(value, (tuple, list)):
        shares = [_split(each, sizes) for each in value]
        return [type(value)(share) for share in zip(*shares, strict=True)] or [type(value)() for _ in sizes]
    return [value for _ in sizes]


def _joined(parts: Sequence[Any]) -> Any:
    """What the groups' modules gave, put together again."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0], (tuple, list)):
        return type(parts[0])(_joined(each) for each in zip(*parts, strict=True))
    return parts[0]


def _state(device: torch.device) -> State:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _no_rows(found: int, rows: int) -> Problem:
    what = f"a module of this base sees {found} rows where the batch has {rows}, so the runs can't be told apart in it"
    return Problem(what, fix="leave out `--together`: the runs are trained one after another then")
