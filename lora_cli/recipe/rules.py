"""What keys must mean together: one small function a rule, `(Recipe) -> Problem | None`.

A rule names the keys it reads. Its problem points to the first of them, and it is not asked when one has no usable
value. Limits of a single value are not here but in `schema.py`.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lora_cli.errors import Problem
from lora_cli.recipe.document import shown
from lora_cli.recipe.schema import LoRA, Recipe, labels_of, share_of, sources_of
from lora_cli.recipe.template import how_to_ask, prompt_text


class Rule(NamedTuple):
    keys: tuple[str, ...]
    check: Callable[[Recipe], Problem | None]


def share_leaves_rows_on_both_sides(recipe: Recipe) -> Problem | None:
    source = recipe.data.eval or ""
    share = share_of(source)
    if share is None or 0 < share < 1:
        return None
    what = f"`data.eval: {shown(source)}` leaves no rows to {'train on' if share else 'evaluate'}"
    return Problem(what, fix="set a share above 0 % and below 100 %, such as `data.eval: 5%`")


def share_has_its_sign(recipe: Recipe) -> Problem | None:
    source = recipe.data.eval or ""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", source):
        return None
    return Problem(f"`data.eval: {shown(source)}` is a number without `%`", fix="write a share such as `data.eval: 5%`")


def sources_have_a_weight_or_a_share(recipe: Recipe) -> Problem | None:
    """Where one source has a share, all of them have, and none has a weight."""
    sources = sources_of(recipe.data.train)
    if all(source.share is None for source in sources):
        return None
    if with_weight := [source.source for source in sources if source.weight is not None]:
        what = f"`data.train` mixes by `weight` and by `share`: `{shown(with_weight[0])}` has a weight"
        return Problem(what, fix="give every source a `share`, or none")
    if without := [source.source for source in sources if source.share is None]:
        what = f"`data.train` mixes by `share`, and `{shown(without[0])}` has none"
        return Problem(what, fix="give every source a `share`, or use `weight`")
    return None


def mixed_sources_stand_once(recipe: Recipe) -> Problem | None:
    sources = sources_of(recipe.data.train)
    if all(source.weight is None and source.share is None for source in sources):
        return None
    names = [(source.source, source.config, source.split, source.revision) for source in sources]
    twice = next((name[0] for name in names if names.count(name) > 1), None)
    if twice is None:
        return None
    return Problem(f"`data.train` mixes `{shown(twice)}` in twice", fix="name it once, with a `weight` for both")


def shares_sum_to_one(recipe: Recipe) -> Problem | None:
    """Within 1 %, so that thirds may be written 0.33."""
    sources = sources_of(recipe.data.train)
    shares = [source.share for source in sources if source.share is not None]
    if len(shares) < len(sources) or abs(sum(shares) - 1) <= 0.0101:
        return None
    scaled = ", ".join(f"{share / sum(shares):.3g}" for share in shares)
    what = f"the shares of `data.train` sum to {sum(shares):g}, not to 1"
    return Problem(
        what, fix=f"in the same proportion they are {scaled}; or use `weight`, which need not sum to anything"
    )


def a_template_is_a_format(recipe: Recipe) -> Problem | None:
    data = recipe.data
    if data.template is None or data.format == "auto":
        return None
    what = f"`data.template` and `data.format: {data.format}` both say how a row is read"
    return Problem(what, fix="leave one of them out; a source in `data.train` may have a `format` of its own")


def labelled_rows_are_classified(recipe: Recipe) -> Problem | None:
    if labels_of(recipe.training) is not None or "labelled" not in _formats(recipe):
        return None
    what = "`data.format: labelled` has a label for each row, and `training.objective` is not `classify`"
    return Problem(what, fix="set `training.objective: classify`, or another `data.format`")


def classified_rows_are_labelled(recipe: Recipe) -> Problem | None:
    others = _formats(recipe) - {"auto", "labelled"}
    if labels_of(recipe.training) is None or not others:
        return None
    what = f"`training.objective: classify` reads rows with a label, and `data.format: {min(others)}` has none"
    return Problem(what, fix="set `data.format: labelled`, or leave it out")


def a_classifier_writes_nothing(recipe: Recipe) -> Problem | None:
    if labels_of(recipe.training) is None:
        return None
    data, training = recipe.data, recipe.training
    idle = {
        "data.template": data.template is not None,
        "data.train_on": data.train_on != "answers",
        "training.sample_prompts": bool(training.sample_prompts),
    }
    if not (names := [f"`{name}`" for name, given in idle.items() if given]):
        return None
    what = f"`training.objective: classify` learns labels and writes no text: {' and '.join(names)} mean nothing there"
    return Problem(what, fix=f"leave {'it' if len(names) == 1 else 'them'} out")


def labels_stand_once(recipe: Recipe) -> Problem | None:
    labels = labels_of(recipe.training) or ()
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is None:
        return None
    return Problem(f"`training.objective.labels` names `{shown(twice)}` twice", fix="name each label once")


def _formats(recipe: Recipe) -> set[str]:
    return {recipe.data.format, *(source.format for source in sources_of(recipe.data.train) if source.format)}


def micro_batch_fits_the_global_batch(recipe: Recipe) -> Problem | None:
    micro, whole = recipe.training.micro_batch_size, recipe.training.global_batch_size
    if micro == "auto" or micro <= whole:
        return None
    what = f"`training.micro_batch_size: {micro}` is larger than `training.global_batch_size: {whole}`"
    return Problem(what, fix=f"set `training.micro_batch_size: {whole}` or less, or `auto`")


def patience_needs_evaluations(recipe: Recipe) -> Problem | None:
    if recipe.training.early_stopping_patience is None:
        return None
    missing = {"`data.eval`": recipe.data.eval, "`training.eval_steps`": recipe.training.eval_steps}
    if not (names := [name for name, value in missing.items() if value is None]):
        return None
    what = f"`training.early_stopping_patience` needs {' and '.join(names)}: it counts evaluations"
    return Problem(what, fix="set `data.eval: 5%` and `training.eval_steps: 100`, or leave the patience out")


def the_best_needs_evaluations(recipe: Recipe) -> Problem | None:
    missing = {"`data.eval`": recipe.data.eval, "`training.eval_steps`": recipe.training.eval_steps}
    names = [name for name, value in missing.items() if value is None]
    if not recipe.training.keep_best or not names:
        return None
    what = f"`training.keep_best` needs {' and '.join(names)}: the best is the lowest held-out loss"
    return Problem(what, fix="set `data.eval: 5%` and `training.eval_steps: 100`, or leave `keep_best` out")


def full_training_has_no_adapter(recipe: Recipe) -> Problem | None:
    training = recipe.training
    if not training.full:
        return None
    others = {key: getattr(recipe.lora, key) != field.default for key, field in LoRA.model_fields.items()}
    idle = {
        **{f"lora.{key}": given for key, given in others.items()},
        "training.loraplus_lr_ratio": training.loraplus_lr_ratio != 1,
        f"model.quantize: {recipe.model.quantize}": recipe.model.quantize != "none",
        "training.objective: classify": labels_of(training) is not None,
    }
    if not (names := [f"`{name}`" for name, given in idle.items() if given]):
        return None
    listed = " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
    what = f"`training.method: full` trains every weight of a language model and no adapter: it goes without {listed}"
    return Problem(what, fix=f"leave {'it' if len(names) == 1 else 'them'} out, or set `training.method: lora`")


def a_start_has_no_init(recipe: Recipe) -> Problem | None:
    lora = recipe.lora
    if lora.start_from is None or lora.init == "default":
        return None
    what = f"`lora.start_from` and `lora.init: {lora.init}` both say how the factors start"
    return Problem(what, fix="leave one of them out")


def a_frozen_A_is_no_slower_than_B(recipe: Recipe) -> Problem | None:
    ratio = recipe.training.loraplus_lr_ratio
    if not recipe.lora.freeze_A or ratio == 1:
        return None
    what = f"`training.loraplus_lr_ratio: {ratio:g}` sets B's rate beside A's, and `lora.freeze_A` trains no A"
    return Problem(
        what, fix=f"set `training.learning_rate: {recipe.training.learning_rate * ratio:g}` and leave it out"
    )


def loftq_completes_a_quantised_base(recipe: Recipe) -> Problem | None:
    if recipe.lora.init != "loftq" or recipe.model.quantize != "none":
        return None
    what = "`lora.init: loftq` makes good what quantising takes from the base, and `model.quantize` is `none`"
    return Problem(what, fix="set `model.quantize: nf4`, or leave `init` out")


def eva_chooses_the_ranks(recipe: Recipe) -> Problem | None:
    if recipe.lora.init != "eva" or not (recipe.lora.rank_pattern or recipe.lora.alpha_pattern):
        return None
    what = (
        "`lora.init: eva` chooses the rank of each module, and `lora.rank_pattern` or `lora.alpha_pattern` sets it too"
    )
    return Problem(what, fix="leave the patterns out, or use another `init`")


def evaluations_need_rows(recipe: Recipe) -> Problem | None:
    training = recipe.training
    if training.eval_steps is None or recipe.data.eval or training.sample_prompts or training.early_stopping_patience:
        return None
    return Problem("`training.eval_steps` needs `data.eval`: there is nothing to evaluate", fix="set `data.eval: 5%`")


def sample_prompts_fill_the_template(recipe: Recipe) -> Problem | None:
    data = recipe.data
    if data.template is None or sources_of(data.train)[0].format not in (None, "template"):
        return None
    for prompt in recipe.training.sample_prompts:
        try:
            prompt_text(data.template, prompt)
        except ValueError as error:
            return Problem(f"{error}: `{shown(prompt)}` in `training.sample_prompts`", fix=how_to_ask(data.template))
    return None


def patterns_compile(key: str, patterns: Iterable[str]) -> Problem | None:
    """PEFT's patterns are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            what = f"`{shown(pattern)}` in `{key}` is not a valid pattern: {error}"
            return Problem(what, fix="use a name, or a regular expression such as `.*_proj`")
    return None


def _targets(recipe: Recipe) -> list[str]:
    targets = recipe.lora.targets
    return [targets] if isinstance(targets, str) else targets


_LORA = tuple(f"lora.{key}" for key in LoRA.model_fields)

RULES = (
    Rule(("data.train",), sources_have_a_weight_or_a_share),
    Rule(("data.train",), mixed_sources_stand_once),
    Rule(("data.train",), shares_sum_to_one),
    Rule(("data.template", "data.format"), a_template_is_a_format),
    Rule(("data.eval",), share_leaves_rows_on_both_sides),
    Rule(("data.eval",), share_has_its_sign),
    Rule(("data.format", "data.train", "training.objective"), labelled_rows_are_classified),
    Rule(("data.format", "data.train", "training.objective"), classified_rows_are_labelled),
    Rule(
        ("training.objective", "data.template", "data.train_on", "training.sample_prompts"), a_classifier_writes_nothing
    ),
    Rule(("training.objective",), labels_stand_once),
    Rule(("training.micro_batch_size", "training.global_batch_size"), micro_batch_fits_the_global_batch),
    Rule(("training.early_stopping_patience", "training.eval_steps", "data.eval"), patience_needs_evaluations),
    Rule(("training.keep_best", "training.eval_steps", "data.eval"), the_best_needs_evaluations),
    Rule(
        ("training.method", "training.objective", "training.loraplus_lr_ratio", "model.quantize", *_LORA),
        full_training_has_no_adapter,
    ),
    Rule(("lora.start_from", "lora.init"), a_start_has_no_init),
    Rule(("lora.init", "model.quantize"), loftq_completes_a_quantised_base),
    Rule(("lora.init", "lora.rank_pattern", "lora.alpha_pattern"), eva_chooses_the_ranks),
    Rule(("training.loraplus_lr_ratio", "lora.freeze_A", "training.learning_rate"), a_frozen_A_is_no_slower_than_B),
    Rule(("training.eval_steps", "data.eval", "training.sample_prompts"), evaluations_need_rows),
    Rule(("training.sample_prompts", "data.template", "data.train"), sample_prompts_fill_the_template),
    Rule(("lora.targets",), lambda recipe: patterns_compile("lora.targets", _targets(recipe))),
    Rule(("lora.exclude",), lambda recipe: patterns_compile("lora.exclude", recipe.lora.exclude)),
    Rule(
        ("lora.modules_to_save",),
        lambda recipe: patterns_compile("lora.modules_to_save", recipe.lora.modules_to_save),
    ),
    Rule(("lora.rank_pattern",), lambda recipe: patterns_compile("lora.rank_pattern", recipe.lora.rank_pattern)),
    Rule(("lora.alpha_pattern",), lambda recipe: patterns_compile("lora.alpha_pattern", recipe.lora.alpha_pattern)),
)
