"""Which modules an adapter changes: letters, names, patterns or `all-linear`, over any architecture's own names.

Pure functions over module paths, so that `lora params` (formula, no torch) and `inject` (real modules) choose the same.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.config import matches, of_expert

ALL_LINEAR = "all-linear"
ADAPTABLE = "weight of this model that can get an adapter"
LETTERS = {
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "o": "attention output projection",
    "g": "MLP gate projection",
    "u": "MLP up projection",
    "d": "MLP down projection",
}

# What a module's name says it is. The first row that matches wins, so `attention.output.dense` comes before `output.dense`.
ROLES = (
    (r"qkv_proj|query_key_value|Wqkv|qkv|attn\.c_attn", "qkv"),
    (r"q_proj|query|query_proj|q_lin", "q"),
    (r"k_proj|key|key_proj|k_lin", "k"),
    (r"v_proj|value|value_proj|v_lin", "v"),
    (r"o_proj|out_lin|\w*att\w*\.(out_proj|dense|c_proj|output\.dense)", "o"),
    (r"gate_up_proj", "gu"),
    (r"gate_proj", "g"),
    (r"up_proj|c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense|lin1", "u"),
    (r"down_proj|mlp\.c_proj|fc2|fc_out|dense_4h_to_h|output\.dense|lin2", "d"),
)


def role(path: str) -> str:
    """The letters a module stands for: `q` for a q_proj, `qkv` for a fused projection, nothing for others."""
    return next((letters for pattern, letters in ROLES if matches(pattern, path)), "")


def kind_of(path: str) -> str:
    """`q_proj` where the name alone says what the module is, else with its parents: `attn.c_proj`, `output.dense`; of an
    expert, its parameter's."""
    parts = of_expert(path)[0].split(".")
    start = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return parts[-1] if role(parts[-1]) else ".".join(parts[start:])


def is_letters(targets: str | Sequence[str]) -> bool:
    return isinstance(targets, str) and bool(targets) and set(targets) <= set(LETTERS)


def choose_targets(
    targets: str | Sequence[str],
    weights: Sequence[str],
    *,
    head: Collection[str] = (),
    exclude: Iterable[str] = (),
    layers: Collection[int] | None = None,
    whole: Collection[str] = (),
) -> list[str]:
    """The paths among `weights` that `targets` name, in the model's order.

    `head` is what letters and all-linear leave out and an explicit name reaches: output projections, and all that is no
    linear layer. `whole` are modules that are trained whole: letters and all-linear leave out what is in them, an
    explicit name is an error.
    Raises ModelError for every entry that matches nothing, naming the nearest modules.
    """
    held = {path for path in weights if path in whole or inside(path, whole)}
    body = [path for path in weights if path not in head and path not in held]
    if targets == ALL_LINEAR:
        chosen = set(body)
    elif is_letters(targets):
        chosen = _by_letters(targets, body)
    else:
        entries = [targets] if isinstance(targets, str) else list(targets)
        chosen = _by_patterns(entries, weights, key="lora.targets")
        if both := [path for path in weights if path in chosen & held]:
            what = f"{both[0]} is trained whole, and `lora.targets` names it too"
            raise ModelError(Problem(what, fix="name it in one of `lora.targets` and `lora.modules_to_save`"))
    if exclude := list(exclude):
        chosen -= _by_patterns(exclude, weights, key="lora.exclude")
    if layers is not None:
        chosen = {path for path in chosen if layer_index(path) in layers}
    if not chosen:
        raise ModelError(
            Problem(
                "no module is left to adapt after `lora.exclude` and `lora.layers`",
                fix=f"choose among {_listing(body)}",
            )
        )
    return [path for path in weights if path in chosen]


def check_patterns(patterns: Iterable[str], chosen: Sequence[str], *, key: str) -> None:
    """Raise ModelError for each pattern that matches none of the chosen modules: it would change nothing, unsaid."""
    idle = [pattern for pattern in patterns if not any(matches(pattern, path) for path in chosen)]
    if idle:
        raise ModelError(
            *(
                Problem(
                    f"`{pattern}` in `{key}` matches no module that gets an adapter",
                    fix=f"the nearest: {_nearest(pattern, chosen)}",
                )
                for pattern in idle
            )
        )


def layer_index(path: str) -> int | None:
    """The number of the block a module stands in: 3 for `model.layers.3.self_attn.q_proj`."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def fused_notices(targets: str | Sequence[str], chosen: Iterable[str]) -> list[str]:
    """A sentence for each kind of fused module that letters name in part: an adapter changes the whole of it, as in PEFT."""
    if not is_letters(targets):
        return []
    fused = {path.rsplit(".", 1)[-1]: role(path) for path in chosen if not set(role(path)) <= set(targets)}
    return [
        f"`{name}` holds {' '.join(letters)} in one weight: `{targets}` adapts the whole of it"
        for name, letters in fused.items()
    ]


def choose_whole(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The paths among `modules` that `lora.modules_to_save` names, outermost ones alone, in the model's order."""
    chosen = _by_patterns(names, modules, key="lora.modules_to_save", what="module of this model")
    return [path for path in modules if path in chosen and not inside(path, chosen)]


def inside(path: str, modules: Collection[str]) -> str | None:
    """The one of `modules` that the module at `path` is a part of."""
    return next((module for module in modules if path.startswith(f"{module}.")), None)


def names_to_save(chosen: Collection[str], every_module: Collection[str]) -> tuple[str, ...]:
    """The shortest endings that name exactly `chosen` among `every_module`: PEFT's `modules_to_save`, whose rule is
    plain `endswith`, across the borders of names (`norm` would be every `input_layernorm` too)."""
    others = [path for path in every_module if path not in chosen]

    def name(path: str) -> str:
        return next((end for end in _endings_of(path) if not any(other.endswith(end) for other in others)), path)

    return tuple(sorted(map(name, chosen)))


def shortest_suffixes(chosen: Collection[str], every_module: Collection[str], *, least: int = 1) -> tuple[str, ...]:
    """The fewest, shortest path endings of at least `least` parts that name exactly `chosen` among `every_module`:
    PEFT's `target_modules`, and its `target_parameters`, which begin with the name of a module."""
    chosen, suffixes = set(chosen), set()
    others = _endings(path for path in every_module if path not in chosen)
    for path in chosen:
        suffixes.add(next((end for end in _endings_of(path)[least - 1 :] if end not in others), path))
    return tuple(sorted(suffixes))


def _by_letters(letters: str, body: Sequence[str]) -> set[str]:
    roles = {path: role(path) for path in body}
    present = "".join(letter for letter in LETTERS if any(letter in found for found in roles.values()))
    if missing := [letter for letter in letters if letter not in present]:
        raise ModelError(
            *(
                Problem(
                    f"`{letter}` in `lora.targets: {letters}` matches nothing: this model has no {LETTERS[letter]}",
                    fix=f"letters here: {' '.join(present) or 'none'}; its linear layers are {_listing(body)}",
                )
                for letter in missing
            )
        )
    return {path for path, found in roles.items() if set(found) & set(letters)}


def _by_patterns(entries: Sequence[str], paths: Sequence[str], *, key: str, what: str = ADAPTABLE) -> set[str]:
    chosen: set[str] = set()
    problems = []
    for entry in entries:
        try:
            found = {path for path in paths if matches(entry, path)}
        except re.error as error:
            problems.append(
                Problem(
                    f"`{entry}` in `{key}` is not a valid pattern: {error}",
                    fix="use a name, or a regular expression such as `.*_proj`",
                )
            )
            continue
        if not found:
            problems.append(
                Problem(
                    f"`{entry}` in `{key}` matches no {what}",
                    fix=f"the nearest: {_nearest(entry, paths)}",
                )
            )
        chosen |= found
    if problems:
        raise ModelError(*problems)
    return chosen


def _nearest(entry: str, paths: Sequence[str]) -> str:
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    return ", ".join(difflib.get_close_matches(entry.rsplit(".", 1)[-1], names, n=10, cutoff=0.4) or names[:10])


def _listing(paths: Sequence[str]) -> str:
    return ", ".join(list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))[:10])


def _endings(paths: Iterable[str]) -> set[str]:
    return {end for path in paths for end in _endings_of(path)}


def _endings_of(path: str) -> list[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
