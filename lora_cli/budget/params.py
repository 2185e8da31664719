"""What an adapter trains: r · (in + out) parameters a module, by kind of module and in total.

The linears may come from a formula (`shapes.py`) or from real modules; a Budget doesn't know which.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

from lora_cli.budget.shapes import Linear, ModelShape
from lora_cli.errors import Problem, RecipeError
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.targets import choose_targets, kind_of

BYTES = 4  # adapters are float32, in memory and on disk
EVERY_WEIGHT = "every weight"


@dataclass(frozen=True)
class Row:
    """All adapted modules of one kind: same name, same shape, same rank."""

    module: str
    in_features: int
    out_features: int
    r: int
    count: int
    each: int  # parameters the adapter trains in one of them
    frozen: int = 0  # parameters of A in one of them, where it is not trained

    @property
    def parameters(self) -> int:
        return self.count * self.each


@dataclass(frozen=True)
class Whole:
    """A module that is trained whole: one of the base, or a new one on top of it."""

    module: str
    parameters: int
    new: bool


@dataclass(frozen=True)
class Budget:
    """The parameters of a base with its adapter; `share` is what is trained of all."""

    rows: tuple[Row, ...]
    base: int
    whole: tuple[Whole, ...] = ()
    biases: int = 0  # of the base, trained beside the adapter

    @property
    def trainable(self) -> int:
        return sum(row.parameters for row in self.rows) + self._beside

    @property
    def stored(self) -> int:
        """In the adapter's file, trained or not."""
        return self.low_rank + self._beside

    @property
    def _beside(self) -> int:
        return sum(module.parameters for module in self.whole) + self.biases

    @property
    def low_rank(self) -> int:
        """Of all A and B, and magnitudes."""
        return sum(row.count * (row.each + row.frozen) for row in self.rows)

    @property
    def total(self) -> int:
        """What is trained whole in the place of a base's module adds nothing."""
        return self.base + self.low_rank + sum(module.parameters for module in self.whole if module.new)

    @property
    def share(self) -> float:
        return self.trainable / self.total

    @property
    def adapter_bytes(self) -> int:
        """Of the tensors in the adapter's file, which are float32."""
        return BYTES * self.stored

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} ({100 * self.share:.4f} %)"


def budget_of(
    adapted: Sequence[Linear],
    base_parameters: int,
    config: LoRAConfig,
    whole: Sequence[Whole] = (),
    *,
    biases: int | None = None,
) -> Budget:
    """The budget of an adapter over the linears `adapted`, which `config` gives a rank each, and of what is trained whole.

    `biases` counts those that are trained; None counts those of `adapted`, where the config names them.
    """
    if biases is None:
        biases = sum(linear.out_features for linear in adapted if linear.bias and config.bias != "none")
    kinds: Counter[Kind] = Counter()
    for linear in adapted:
        kinds[_kind(linear, config)] += linear.copies
    rows = tuple(
        Row(*kind, count=count, each=_each(kind, config), frozen=_frozen(kind, config)) for kind, count in kinds.items()
    )
    return Budget(rows, base_parameters, tuple(whole), biases)


def full_budget(parameters: int) -> Budget:
    """Of a base whose every weight is trained: there is no adapter, and what is stored is a model."""
    return Budget((), parameters, (Whole(EVERY_WEIGHT, parameters, new=False),))


Kind = tuple[str, int, int, int]  # name, in, out, r


def _kind(linear: Linear, config: LoRAConfig) -> Kind:
    return kind_of(linear.path), linear.in_features, linear.out_features, config.at(linear.path).r


def _each(kind: Kind, config: LoRAConfig) -> int:
    _, in_features, out_features, r = kind
    magnitude = out_features if config.use_dora else 0
    return r * (in_features + out_features) + magnitude - _frozen(kind, config)


def _frozen(kind: Kind, config: LoRAConfig) -> int:
    _, in_features, _, r = kind
    return r * in_features if config.freeze_A else 0


def adapted_linears(
    shape: ModelShape,
    targets: str | Sequence[str],
    *,
    exclude: Iterable[str] = (),
    layers: Collection[int] | None = None,
    whole: Collection[str] = (),
) -> list[Linear]:
    """The weights of a base that `targets` name, chosen as on the real modules."""
    linears = {linear.path: linear for linear in (*shape.by_name, *shape.linears)}
    head = {*shape.head, *(linear.path for linear in shape.by_name)}
    chosen = choose_targets(targets, list(linears), head=head, exclude=exclude, layers=layers, whole=whole)
    return [linears[path] for path in chosen]


def largest_r(adapted: Sequence[Linear], config: LoRAConfig, limit: int, whole: Sequence[Whole] = ()) -> int:
    """The largest `config.r` with which the adapter trains at most `limit` parameters, what is trained whole with it.

    Raises RecipeError when r = 1 is already more, or when `rank_pattern` leaves nothing to choose.
    """
    one, two = (budget_of(adapted, 0, replace(config, r=r), whole).trainable for r in (1, 2))
    if one == two:
        raise RecipeError(Problem("`--budget` has no r to choose: `lora.rank_pattern` sets the rank of every module"))
    if one > limit:
        what = f"`--budget` allows {limit:,} parameters, and r = 1 on these targets already trains {one:,}"
        raise RecipeError(Problem(what, fix="name fewer targets, or allow more"))
    return 1 + (limit - one) // (two - one)


UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def parse_limit(text: str, base_parameters: int) -> int:
    """`5M`, `300K`, `1.5B` or a number of parameters; `0.1%` is a share of base and adapter together."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in {*UNITS, "%"} else (text, "")
    try:
        value = Decimal(number)
    except InvalidOperation:
        value = Decimal(0)
    if not value.is_finite() or value <= 0 or (unit == "%" and value >= 100):
        fix = "write a number of parameters such as `5M` or `300K`, or a share such as `0.1%`"
        raise RecipeError(Problem(f"`--budget {text}` is no parameter budget", fix=fix))
    if unit == "%":
        return int(base_parameters * value / (100 - value))
    return int(value * UNITS.get(unit, 1))
