"""`--grid KEY=V1,V2 …`: one run for each combination of values, each with a name that says which it is; and `--search`,
values and ranges to choose from.

grid(["lora.r=4,8", "training.learning_rate=1e-4,3e-4"])   ->  r=4,learning_rate=1e-4   r=4,learning_rate=3e-4   r=8,…
space(["lora.r=4,8", "training.learning_rate=1e-5..1e-3"]) ->  {"lora.r": ["4", "8"], "training.learning_rate": Range(…)}
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf, prod
from pathlib import Path
from typing import TypeVar

import yaml

from lora_cli.errors import Problem, RecipeError
from lora_cli.recipe.document import shown
from lora_cli.recipe.reader import LoadedRecipe, read_recipe

LONGEST_NAME = 100  # characters; a folder's name has at most 255 bytes
MOST_RUNS = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: the name of its folder, and what it sets, as written, by key."""

    name: str
    settings: Mapping[str, str]

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{key}={value}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class Range:
    """Any number from `low` to `high`; a `whole` one where both are. Over a factor of ten and more, by its logarithm."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= 10


Space = Mapping[str, Range | list[str]]


def grid(axes: Sequence[str]) -> list[Trial]:
    """Every combination, the last axis moving fastest. Raises RecipeError with all that is wrong with the axes."""
    values = _axes(axes, values_of, "--grid", "lora.r=4,8,16")
    count = prod(map(len, values.values()))
    if count > MOST_RUNS:
        fix = f"leave values out: {MOST_RUNS:,} are the most; or choose among them with `--search`"
        raise RecipeError(Problem(f"the grid has {count:,} runs", fix=fix))
    runs = [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
    return [Trial(name, settings) for name, settings in zip(names_of(runs), runs, strict=True)]


def space(axes: Sequence[str]) -> Space:
    """What to choose from, by key. Raises RecipeError with all that is wrong with the axes."""
    return _axes(axes, choices_of, "--search", "training.learning_rate=1e-5..1e-3")


def corners(space: Space) -> list[Trial]:
    """Trials that try every value and both ends of every range once, to be read and not run."""
    ends = {key: [_written(of.low), _written(of.high)] if isinstance(of, Range) else of for key, of in space.items()}
    return [
        Trial("", {key: values[place % len(values)] for key, values in ends.items()})
        for place in range(max(map(len, ends.values())))
    ]


def chosen(number: int, values: Mapping[str, float | str]) -> Trial:
    """A trial of a search, by its number; of a number from a range, three digits are taken."""
    settings = {key: value if isinstance(value, str) else _written(value) for key, value in values.items()}
    [name] = names_of([settings])
    return Trial(f"{number:03d}-{name[:LONGEST_NAME]}", settings)


def _axes(axes: Sequence[str], parse: Callable[[str], T], option: str, example: str) -> dict[str, T]:
    problems: list[Problem] = []
    found: dict[str, T] = {}
    for axis in axes:
        key, where, fix = axis.partition("=")[0], f"{option} {shown(axis)}", f"write `{option} {example}`"
        if key in found:
            problems.append(Problem(f"`{key}` is given twice", where=where, fix="write its values as one"))
        try:
            found[key] = parse(axis)
        except ValueError as error:
            problems.append(Problem(str(error), where=where, fix=fix))
    if problems:
        raise RecipeError(*problems)
    return found


def choices_of(axis: str) -> Range | list[str]:
    """`training.learning_rate=1e-5..1e-3` is a range; anything else is values."""
    key, _, text = axis.partition("=")
    low, dots, high = text.partition("..")
    if not dots or not key:
        return values_of(axis)
    try:
        found = Range(float(low), float(high), whole=all(re.fullmatch(r"\s*-?[0-9]+\s*", end) for end in (low, high)))
    except ValueError:
        raise ValueError(f"the range of `{key}` is not from a number to a number") from None
    if not found.low < found.high < inf:
        raise ValueError(f"the range of `{key}` does not begin below its end")
    return found


def _written(value: float) -> str:
    """`7`, `0.25`, `2.35e-4`"""
    if float(value).is_integer():
        return str(int(value))
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{value:.3g}" if int(exponent) > -4 else f"{float(digits):g}e{int(exponent)}"


def values_of(axis: str) -> list[str]:
    """`lora.targets=qv,[q_proj, v_proj]` -> ["qv", "[q_proj, v_proj]"]: values apart as YAML has them, and as written."""
    key, equals, text = axis.partition("=")
    if not equals or not key:
        raise ValueError(f"`{shown(axis)}` is no key with values")
    if key == "output":
        raise ValueError("the runs of a sweep have folders of their own, by name")
    try:
        node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        raise ValueError(f"the values of `{key}` can't be told apart") from None
    found = [text[item.start_mark.index - 1 : item.end_mark.index - 1].strip() for item in node.value]
    if not found or not all(found):
        raise ValueError(f"`{key}` has no value" if not found else f"a value of `{key}` is empty")
    if doubled := next((value for place, value in enumerate(found) if value in found[:place]), None):
        raise ValueError(f"`{key}` has the value `{shown(doubled)}` twice")
    return found


def names_of(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """A folder's name for each, of short keys; numbered where values alone don't tell them apart."""
    short = _short([*dict.fromkeys(key for run in runs for key in run)])
    names = [",".join(f"{short[key]}={_plain(value)}" for key, value in run.items()) for run in runs]
    if len(set(names)) == len(names) and all(len(name) <= LONGEST_NAME for name in names):
        return names
    return [f"{number:03d}-{name[:LONGEST_NAME]}" for number, name in enumerate(names, 1)]


def read_trials(
    recipe: Path, overrides: Sequence[str], trials: Sequence[Trial], option: str = "--grid"
) -> list[LoadedRecipe]:
    """The recipe of each run, whose settings were given with the option. Raises RecipeError with every problem of all of them, each told once."""
    loaded, problems = [], []
    for trial in trials:
        try:
            loaded.append(read_recipe(recipe, [*overrides, *trial.overrides]))
        except RecipeError as error:
            problems += _as_typed(error.problems, trial, option)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    return loaded


def _as_typed(problems: Sequence[Problem], trial: Trial, option: str) -> Iterator[Problem]:
    """What the reader says of a `--set`, said of the option that it came from."""
    for problem in problems:
        ours = any(problem.where.startswith(f"--set {key}=") for key in trial.settings)
        yield replace(problem, where=problem.where.replace("--set", option, 1)) if ours else problem


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key; the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+%-]+", "-", value).strip("-") or "-"
