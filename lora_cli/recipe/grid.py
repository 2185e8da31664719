"""`--grid KEY=V1,V2 …`: one run for each combination of values, each with a name that says which it is.

grid(["lora.r=4,8", "training.learning_rate=1e-4,3e-4"])  ->  r=4,learning_rate=1e-4   r=4,learning_rate=3e-4   r=8,…
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import yaml

from lora_cli.errors import Problem, RecipeError
from lora_cli.recipe.document import shown
from lora_cli.recipe.reader import LoadedRecipe, read_recipe

LONGEST_NAME = 100  # characters; a folder's name has at most 255 bytes
MOST_RUNS = 1000
FIX = "write `--grid lora.r=4,8,16`"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: the name of its folder, and what it sets, as written, by key."""

    name: str
    settings: Mapping[str, str]

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def grid(axes: Sequence[str]) -> list[Trial]:
    """Every combination, the last axis moving fastest. Raises RecipeError with all that is wrong with the axes."""
    problems: list[Problem] = []
    values: dict[str, list[str]] = {}
    for axis in axes:
        key, problem = axis.partition("=")[0], None
        try:
            found = values_of(axis)
        except ValueError as error:
            problem = Problem(str(error), where=f"--grid {shown(axis)}", fix=FIX)
        else:
            if key in values:
                problem = Problem(f"`{key}` has two grids", where=f"--grid {shown(axis)}", fix="write them as one")
            values[key] = found
        problems += [problem] if problem else []
    runs = [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
    if len(runs) > MOST_RUNS:
        what = f"the grid has {len(runs):,} runs"
        problems.append(Problem(what, fix=f"leave values out: {MOST_RUNS:,} are the most; or `--search` among them"))
    if problems:
        raise RecipeError(*problems)
    return [Trial(name, settings) for name, settings in zip(names_of(runs), runs, strict=True)]


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


def read_trials(recipe: Path, overrides: Sequence[str], trials: Sequence[Trial]) -> list[LoadedRecipe]:
    """The recipe of each run. Raises RecipeError with every problem of all of them, each told once."""
    loaded, problems = [], []
    for trial in trials:
        try:
            loaded.append(read_recipe(recipe, [*overrides, *trial.overrides]))
        except RecipeError as error:
            problems += _as_typed(error.problems, trial)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    return loaded


def _as_typed(problems: Sequence[Problem], trial: Trial) -> Iterator[Problem]:
    """What the reader says of a `--set`, said of the `--grid` that it came from."""
    for problem in problems:
        ours = any(problem.where.startswith(f"--set {key}=") for key in trial.settings)
        yield replace(problem, where=problem.where.replace("--set", "--grid", 1)) if ours else problem


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key; the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+%-]+", "-", value).strip("-") or "-"
