"""The preflight: what can be proved wrong with a recipe before its base's weights are loaded.

Recipe, config, tokenizer, template, rows and disk are looked at through the pipeline that training uses. A check is one
function and a row of CHECKS: it returns what it proved, returns a Problem to warn of, or raises a UserError.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from torch import nn

from lora_cli.budget.modules import biases_of, counted, of_tokens, whole_of, whole_paths
from lora_cli.budget.params import budget_of, full_budget
from lora_cli.data.chat_template import tokenized
from lora_cli.data.duplicates import found_in
from lora_cli.data.examples import SIDES, Array, Block, Examples
from lora_cli.data.formats import FORMATS, PREFERENCE
from lora_cli.data.pipeline import OnTokenized
from lora_cli.data.render import Renderer, as_conversation
from lora_cli.data.report import MAX_DROPPED
from lora_cli.data.sources import label, quote, rows
from lora_cli.data.types import CHOSEN, REJECTED, BadRow, Conversation, Example, Instruction, Preference, RowId
from lora_cli.errors import DataError, ModelError, Problem, RecipeError, SafetyError, StorageError, UserError
from lora_cli.export.runtimes import RUNTIMES, TRAITS, Subject, Unserved, findings
from lora_cli.lora.targets import check_patterns, choose_targets
from lora_cli.lora.tokens import check_tokens, tables
from lora_cli.lora.vocabulary import make_room
from lora_cli.lora.weights import weights_of
from lora_cli.models.base import Base, resolve_base
from lora_cli.models.heads import Head
from lora_cli.models.load import by_name_alone, check_vocabulary, skeleton
from lora_cli.models.tokens import ids_of_tokens
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import Recipe, objective_of, share_of, sources_of
from lora_cli.runs.figures import Figures, figures_of
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import load_rows, new_head, planned, recipe_tokenizer, refuse_pairs
from lora_cli.runs.start import start_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FEW_STEPS = 50
FEW_ROWS = 500
TALKING = ("messages", "sharegpt", "alpaca", PREFERENCE)  # formats that the chat template renders
SAMPLED = 32  # rows of a source whose prompts are rendered as inference renders them
NAMED = 5  # rows that a message names
LARGEST_SHARE = 0.8  # of the rows, that one label may have
UNLIKE_LENGTHS = 2  # times as many tokens in the answers of one side as of the other
IMBALANCE = 10  # times as many rows of one label as of another
NO_TALK = "no row is a conversation: prompts are plain text"
SUBTRACTED = ("pissa", "olora")  # starts that are taken off again, which doubles the rank
COPIES = 1 + 2  # an adapter in a checkpoint, with Adam's two moments


@dataclass(frozen=True)
class Facts:
    """What the checks look at; None where it could not be made, for a reason that is a finding of its own."""

    loaded: LoadedRecipe
    tokenizer: "PreTrainedTokenizerBase | None"
    rows: Rows | None
    model: "PreTrainedModel | None"  # without weights
    runtimes: tuple[str, ...] = ()  # that are to serve the adapter
    base: Base | None = None  # perhaps without its weights

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def kind(self) -> str:
        """Of the objective."""
        return objective_of(self.recipe.training).kind

    @property
    def examples(self) -> Examples:
        return self.rows.all


@dataclass(frozen=True)
class Finding:
    level: Literal["fail", "warn", "ok"]
    check: str
    what: str
    where: str = ""
    line: str = ""
    fix: str = ""
    code: int = 0  # the exit code of a failure's class

    @property
    def problem(self) -> Problem:
        return Problem(self.what, self.where, self.line, self.fix)


@dataclass(frozen=True)
class Report:
    findings: tuple[Finding, ...]
    figures: Figures | None  # None where there are no rows to count

    @property
    def code(self) -> int:
        return next((finding.code for finding in self.findings if finding.level == "fail"), 0)

    def of(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]


def check(loaded: LoadedRecipe, progress: OnTokenized | None = None, *, runtimes: Sequence[str] = ()) -> Report:
    """Everything, to the end: one fault does not hide the next, unless there is nothing left to look at.

    `runtimes` are those that shall serve the adapter: what one of them refuses is a fault.
    """
    faults: list[Finding] = []
    model, training = loaded.recipe.model, loaded.recipe.training
    base = _made("base", lambda: resolve_base(model.base, model.revision, weights=False), faults)
    if base is None:
        return Report(tuple(faults), None)
    tokenizer = _made("tokenizer", lambda: recipe_tokenizer(loaded.recipe, base.folder), faults)
    found = _made("rows", lambda: load_rows(loaded, tokenizer, progress, pairs=True), faults) if tokenizer else None
    if found:
        _made("objective", lambda: refuse_pairs(found.report), faults)
    head = new_head(training, found.labels if found else ())
    model = _made("model", lambda: _skeleton(loaded.recipe, base, head, tokenizer), faults)
    facts = Facts(loaded, tokenizer, found, model, tuple(runtimes), base)
    findings = (*faults, *_findings(facts))
    return Report(findings, figures_of(loaded.recipe, found, facts.model) if found else None)


def check_rows(loaded: LoadedRecipe, base: Base, tokenizer: "PreTrainedTokenizerBase", rows: Rows) -> None:
    """The checks on rows that are there already: raises what `check` would call a failure, and logs its warnings."""
    head = new_head(loaded.recipe.training, rows.labels)
    # without one, `prepare` finds out on the real model
    model = _made("model", lambda: _skeleton(loaded.recipe, base, head, tokenizer), [])
    findings = _findings(Facts(loaded, tokenizer, rows, model, base=base))
    if fails := [finding for finding in findings if finding.level == "fail"]:
        raise ERRORS[fails[0].code](*(finding.problem for finding in fails))
    for finding in findings:
        if finding.level == "warn":
            log.warning("%s; fix: %s", finding.what, finding.fix)


def _skeleton(
    recipe: Recipe, base: Base, head: Head | None, tokenizer: "PreTrainedTokenizerBase | None"
) -> "PreTrainedModel":
    """The base's modules, with room for the recipe's tokens."""
    model = skeleton(base.folder, head)
    if tokenizer is not None:
        with suppress(ModelError):  # told of the targets
            make_room(model, ids_of_tokens(tokenizer, recipe.lora.tokens_with_rows))
    return model


def target_paths(recipe: Recipe, model: "PreTrainedModel", whole: Sequence[str] = ()) -> list[str]:
    """The modules that the recipe's targets name in this model. Raises ModelError for a target or pattern without any."""
    lora = recipe.lora
    paths = choose_targets(
        lora.targets,
        list(weights_of(model)),
        head=by_name_alone(model),
        exclude=lora.exclude,
        layers=lora.layers,
        whole=whole,
    )
    check_patterns(lora.rank_pattern, paths, key="lora.rank_pattern")
    check_patterns(lora.alpha_pattern, paths, key="lora.alpha_pattern")
    return paths


def something_is_trained(facts: Facts) -> str:
    if idle := facts.examples.take(np.flatnonzero(facts.examples.column("trained") == 0)):
        raise DataError(
            Problem(
                f"{len(idle):,} of {len(facts.examples):,} examples have nothing to learn within "
                f"`data.max_length: {facts.recipe.data.max_length}`",
                where=_named(idle),
                fix="raise `data.max_length`, or take these rows out",
            )
        )
    learned = "trained tokens" if facts.kind == "sft" else "a label to learn"
    return f"each of {len(facts.examples):,} examples has {learned}"


def turns_end_on_a_stop_token(facts: Facts) -> str | Problem:
    """Every trained turn that max_length leaves whole ends on a trained special token, and some are left whole."""
    examples, ends = _rendered(facts), _Ends()
    if not examples:
        return "rows of tokens bring their own stop tokens"
    renderer, cuts = Renderer(facts.tokenizer), examples.column("cut") > 0
    special = np.array(sorted(renderer.special))
    for block in examples.blocks():
        ends.add(block, cuts[block.place :][: len(block.lengths)], special, renderer.tagged)
    if ends.missing:
        example = examples[ends.missing_in[0]]
        raise ModelError(
            Problem(
                f"{ends.missing:,} trained turns end without a trained stop token, so the model would never learn to stop",
                where=_named(examples.take(ends.missing_in)),
                line=quote(
                    facts.tokenizer.decode(example.input_ids[max(0, ends.missing_at - 15) : ends.missing_at + 1])
                ),
                fix="use a tokenizer whose template writes the end token after the assistant's content",
            )
        )
    fix = f"set `data.max_length: {facts.rows.report.lengths.p99}`, which keeps 99 % of the rows whole"
    if not ends.whole:
        what = f"`data.max_length: {facts.recipe.data.max_length}` cuts every answer before its stop token"
        raise DataError(Problem(what, fix=fix))
    if ends.cut > MAX_DROPPED * len(examples):
        what = f"`data.max_length: {facts.recipe.data.max_length}` cuts {ends.cut:,} of {len(examples):,} answers"
        return Problem(f"{what} before their stop token", fix=fix)
    stops = facts.tokenizer.convert_ids_to_tokens(list(ends.stops)[:NAMED])
    return f"{ends.whole:,} trained turns end on a trained stop token: {' '.join(stops)}"


def begins_once(facts: Facts) -> str:
    bos = facts.tokenizer.bos_token_id
    if bos is None:
        return "the tokenizer has no BOS"
    doubled: list[int] = []
    for block in facts.examples.blocks():
        second = (block.tokens[1:] == bos) & (block.tokens[:-1] == bos) & (block.within[1:] == 1)
        doubled += (block.place + block.examples[1:][second]).tolist()
    if doubled:
        token = facts.tokenizer.bos_token
        raise DataError(
            Problem(
                f"{len(doubled):,} examples begin with `{token}` twice",
                where=_named(facts.examples.take(doubled)),
                fix=f"take `{token}` out of the data: it is added by itself",
            )
        )
    return "no example begins with BOS twice"


def prompts_are_those_of_inference(facts: Facts) -> str:
    """On real rows: what stands before each trained answer is what `apply_chat_template` puts there at inference."""
    if not facts.tokenizer.chat_template:
        return NO_TALK
    talks, compared = list(_conversations(facts)), 0
    kept: dict[RowId, list[Example]] = {}
    for example in facts.examples.of_rows(row for row, _ in talks):
        kept.setdefault(example.row, []).append(example)
    for row, talk in talks:
        if row not in kept:
            continue  # left out, which is counted elsewhere
        prompts = list(_inference_prompts(facts.tokenizer, talk))
        for prompt in prompts if facts.recipe.data.train_on == "answers" else prompts[-1:]:
            if len(prompt) >= facts.recipe.data.max_length:
                continue  # cut away
            if not any(example.input_ids[: len(prompt)] == prompt for example in kept[row]):
                raise ModelError(_another_prompt(facts.tokenizer, kept[row][0], prompt))
            compared += 1
    return f"training prompts are inference prompts, compared on {compared:,} answers" if compared else NO_TALK


def targets_are_found(facts: Facts) -> str:
    if facts.recipe.training.full:
        return f"every weight is trained: {sum(p.numel() for p in facts.model.parameters()):,} parameters"
    whole = whole_paths(facts.model, facts.recipe.lora.modules_to_save)
    paths = target_paths(facts.recipe, facts.model, whole)
    tokens = ids_of_tokens(facts.tokenizer, facts.recipe.lora.tokens_with_rows)
    if tokens:
        check_tokens(facts.model, tokens, [*paths, *whole])
    beside = [*whole, *(found.module for found in of_tokens(facts.model, facts.recipe.lora.tokens_with_rows))]
    return f"{len(paths):,} modules get an adapter" + (f", trained whole: {', '.join(beside)}" if beside else "")


def tokens_have_embeddings(facts: Facts) -> str:
    check_vocabulary(facts.model, facts.examples)
    return f"every token is one of the model's {facts.model.get_input_embeddings().num_embeddings:,}"


def the_disk_has_room(facts: Facts) -> str:
    """For the adapter and for as many checkpoints as are kept, with the one that is being written."""
    try:
        one = _learned_bytes(facts)
    except ModelError:
        return "unknown until the targets are found"
    what = "checkpoints and model" if facts.recipe.training.full else "checkpoints and adapter"
    output = Path(facts.recipe.output).resolve()
    there = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(there).free
    needed = one * COPIES * (facts.recipe.training.keep_checkpoints + 1)
    if free < needed:
        raise StorageError(
            Problem(
                f"{what} need up to {_size(needed)}, and the disk has {_size(free)} free",
                where=str(output),
                fix="free some space, lower `training.keep_checkpoints`, or give another folder with `--out`",
            )
        )
    return f"{what} need up to {_size(needed)} of {_size(free)} free"


def _learned_bytes(facts: Facts) -> int:
    """Of the adapter's file, or of a model's, in float32. Raises ModelError for targets without any module."""
    if facts.recipe.training.full:
        return full_budget(sum(p.numel() for p in facts.model.parameters())).adapter_bytes
    whole = whole_paths(facts.model, facts.recipe.lora.modules_to_save)
    return adapter_bytes(facts.recipe, facts.model, target_paths(facts.recipe, facts.model, whole), whole)


def runtimes_take_it(facts: Facts) -> str:
    """What serves adapters, and what of this one it would not serve: before it is trained, and not after."""
    if facts.recipe.training.full:
        return "the result is a model of its own, as transformers writes it: there is no adapter to serve"
    try:
        subject = _served(facts)
    except ModelError:
        return "unknown until the targets are found"
    found = {name: findings(name, subject) for name in facts.runtimes or RUNTIMES}
    refused = {name: [f for f in each if f.verdict.outcome == "refused"] for name, each in found.items()}
    if facts.runtimes and any(refused.values()):
        problems = [Problem(f.what, fix=f.verdict.fix) for each in refused.values() for f in each]
        raise ModelError(*problems)
    served = [RUNTIMES[name].name for name in found if not refused[name]]
    told = [f"{', '.join(served)} can serve the adapter"] if served else []
    told += [
        f"{RUNTIMES[name].name} can't: {', '.join(TRAITS[f.trait].shown for f in each)}"
        for name, each in refused.items()
        if each
    ]
    told += [note for name, each in found.items() for note in _notes(name, each) if facts.runtimes]
    return "; ".join(told)


def _notes(runtime: str, found: Sequence[Unserved]) -> Iterator[str]:
    """How the runtime is started, and what `lora export` has to change for it."""
    shown = RUNTIMES[runtime].name
    yield from (f"{shown}: {f.verdict.fix}, for {TRAITS[f.trait].shown}" for f in found if f.verdict.outcome == "flag")
    changed = [TRAITS[f.trait].shown for f in found if f.verdict.outcome == "converted"]
    if changed:
        yield f"{shown}: as `lora export --to {runtime}` writes it, for {' and '.join(changed)}"


def _served(facts: Facts) -> Subject:
    whole = whole_paths(facts.model, facts.recipe.lora.modules_to_save)
    paths = target_paths(facts.recipe, facts.model, whole)
    config = facts.recipe.lora.config()
    weights, base = weights_of(facts.model), facts.model.config
    return Subject(
        config=config.with_rank_times(2) if facts.recipe.lora.init in SUBTRACTED else config,
        paths=paths,
        whole=[*whole, *(tables(facts.model) if facts.recipe.lora.tokens_with_rows else ())],
        tied=bool(base.tie_word_embeddings),
        model_type=base.model_type,
        kinds={weights[path].kind for path in paths},
    )


def held_out_rows_are_unseen(facts: Facts) -> str | Problem:
    """By tokens. A share of rows that repeat may leak a few, which is a warning; more would measure memory."""
    if not facts.rows.held_out:
        return "no rows are held out"
    held_out, trained = facts.rows.held_out, facts.rows.train
    seen = found_in(held_out, trained)
    if not seen:
        return f"none of {len(facts.rows.held_out):,} held-out examples stands in train"
    same = ", ".join(f"{held_out[place].row} = {trained[of].row}" for place, of in seen[:NAMED])
    problem = Problem(
        f"{len(seen):,} of {len(facts.rows.held_out):,} held-out examples stand in train too",
        where=same + (" …" if len(seen) > NAMED else ""),
        fix="take the duplicates out, so that the held-out loss measures what was learned and not what was memorised",
    )
    if share_of(facts.recipe.data.eval) is not None and len(seen) <= MAX_DROPPED * len(facts.rows.held_out):
        return problem
    raise DataError(problem)


def steps_are_many(facts: Facts) -> str | Problem:
    steps = planned(facts.recipe, facts.rows).steps
    if steps >= FEW_STEPS:
        return f"{steps:,} optimizer steps"
    raising = "`training.max_steps`" if facts.recipe.training.max_steps else "`training.epochs`"
    what = f"only {steps:,} optimizer steps in all: fewer than {FEW_STEPS} seldom teach anything"
    return Problem(what, fix=f"raise {raising}, or lower `training.global_batch_size`")


def labels_are_balanced(facts: Facts) -> str | Problem:
    """A classifier that always names the largest class would seem good, and of a label with few rows little is learned."""
    labels = list(facts.rows.report.labels)
    counts = np.bincount(Examples.of(facts.rows.train).labels, minlength=len(labels)).tolist()
    counted = Counter(dict(zip(labels, counts, strict=True)))
    (most, many), (least, few) = counted.most_common()[0], counted.most_common()[-1]
    share = many / sum(counted.values())
    if not few:
        what = f"no training row has the label `{quote(least)}` of `training.objective.labels`"
        return Problem(what, fix="add rows with it, or take it out of the labels")
    what = f"{share:.0%} of the training rows have the label `{quote(most)}`, and {few:,} have `{quote(least)}`"
    if share > LARGEST_SHARE or few * IMBALANCE < many:
        return Problem(what, fix="add rows of the rare labels; read `macro_f1`, which counts every label alike")
    return f"{len(labels):,} labels, the rarest with {few:,} training rows, the most common with {many:,}"


def pairs_are_of_a_length(facts: Facts) -> str | Problem | None:
    """Where the better answers are much longer, length is what is easiest to learn (Singhal et al. 2023)."""
    sides, trained = facts.examples.column("side"), facts.examples.column("trained")
    if not sides.any():
        return None
    chosen, rejected = (float(trained[sides == SIDES.index(side)].mean()) for side in (CHOSEN, REJECTED))
    what = f"{np.count_nonzero(sides) // 2:,} pairs; {chosen:,.0f} trained tokens a chosen answer, {rejected:,.0f} a rejected one"
    if max(chosen, rejected) < UNLIKE_LENGTHS * min(chosen, rejected):
        return what
    return Problem(what, fix="even the lengths out: a model learns first to be as long as what was chosen")


def rows_are_many(facts: Facts) -> str | Problem:
    count = len(np.unique(Examples.of(facts.rows.train).row_keys))
    if count >= FEW_ROWS:
        return f"{count:,} rows to train on"
    what = f"only {count:,} rows to train on: fewer than {FEW_ROWS} are soon learned by heart"
    return Problem(what, fix="add rows, or watch the held-out loss with `training.eval_steps`")


def starts_on_its_own_base(facts: Facts) -> str | None:
    """The adapter of `lora.start_from` is whole, and was trained on this base with this tokenizer."""
    if facts.recipe.lora.start_from is None:
        return None
    adapter = start_of(facts.recipe, facts.base.folder, facts.tokenizer)
    return f"it begins at an adapter of this base, SHA-256 {adapter.digest()[:12]}"


class Check(NamedTuple):
    name: str
    needs: tuple[str, ...]  # the Facts it reads that may be missing
    prove: Callable[[Facts], str | Problem | None]  # None: it's about nothing that is there
    only: str | None = None  # the objective it is about


CHECKS = (
    Check("trained", ("rows",), something_is_trained),
    Check("labels", ("rows",), labels_are_balanced, only="classify"),
    Check("stop", ("rows",), turns_end_on_a_stop_token, only="sft"),
    Check("pairs", ("rows",), pairs_are_of_a_length),
    Check("bos", ("rows",), begins_once),
    Check("template", ("rows",), prompts_are_those_of_inference, only="sft"),
    Check("held-out", ("rows",), held_out_rows_are_unseen),
    Check("targets", ("model", "tokenizer"), targets_are_found),
    Check("start", ("base", "tokenizer"), starts_on_its_own_base),
    Check("vocabulary", ("model", "rows"), tokens_have_embeddings),
    Check("runtimes", ("model",), runtimes_take_it),
    Check("disk", ("model",), the_disk_has_room),
    Check("steps", ("rows",), steps_are_many),
    Check("rows", ("rows",), rows_are_many),
)
ERRORS: dict[int, type[UserError]] = {
    error.code: error for error in (RecipeError, DataError, ModelError, StorageError, SafetyError)
}


def adapter_bytes(recipe: Recipe, model: nn.Module, paths: Sequence[str], whole: Sequence[str] = ()) -> int:
    """Of the adapter's file, from the shapes of the modules."""
    found = weights_of(model)
    adapted = counted({path: found[path] for path in paths})
    biases = biases_of(model, recipe.lora.bias, paths, whole)
    beside = [*whole_of(model, whole), *of_tokens(model, recipe.lora.tokens_with_rows)]
    return budget_of(adapted, 0, recipe.lora.config(), beside, biases=biases).adapter_bytes


def _made(name: str, make: Callable, faults: list[Finding]):
    """What `make` makes; None where a fault, added to `faults`, stands in the way."""
    try:
        return make()
    except UserError as error:
        of_template = name == "rows" and isinstance(error, ModelError)  # what rendering finds wrong with the tokenizer
        faults += _failed("template" if of_template else name, error)
        return None


def _findings(facts: Facts) -> list[Finding]:
    found = []
    for check in CHECKS:
        if check.only not in (None, facts.kind) or any(getattr(facts, need) is None for need in check.needs):
            continue
        try:
            proved = check.prove(facts)
        except UserError as error:
            found += _failed(check.name, error)
        else:
            found += [] if proved is None else [_passed(check.name, proved)]
    return found


def _failed(name: str, error: UserError) -> list[Finding]:
    return [Finding("fail", name, p.what, p.where, p.line, p.fix, error.code) for p in error.problems]


def _passed(name: str, proved: str | Problem) -> Finding:
    if isinstance(proved, str):
        return Finding("ok", name, proved)
    return Finding("warn", name, proved.what, proved.where, proved.line, proved.fix)


def _rendered(facts: Facts) -> Examples:
    """The examples that were made of text."""
    formats, examples = facts.rows.report.formats, facts.examples
    of_tokens = [number for number, o in enumerate(examples.origins) if formats.get(o.source) == "tokens"]
    return examples.take(np.flatnonzero(~np.isin(examples.column("origin"), of_tokens)))


@dataclass
class _Ends:
    """The ends of trained turns, counted: those that max_length leaves, those without a stop token, those it cuts."""

    whole: int = 0
    cut: int = 0  # examples whose last answer is cut
    stops: dict[int, None] = field(default_factory=dict)  # tokens that turns end on
    missing: int = 0
    missing_in: list[int] = field(default_factory=list)  # the examples of the first of them
    missing_at: int = 0  # where in its example the first of them ends

    def add(self, block: Block, cuts: Array, special: Array, tagged: bool) -> None:
        """With `{% generation %}` marks a turn may be trained in parts, so only the last end is known to be a turn's."""
        trained = block.weights > 0
        last = block.within == np.repeat(block.lengths - 1, block.lengths)
        ends = np.flatnonzero(trained & (last | ~np.append(trained[1:], False)))
        example = block.examples[ends]
        cut = last[ends] & cuts[example]
        self.cut += int(cut.sum())
        kept = ~np.isin(example, example[cut]) if tagged else ~cut
        if tagged:
            kept &= np.append(example[1:] != example[:-1], True)
        ends, example = ends[kept], example[kept]
        tokens = block.tokens[ends]
        stray = np.flatnonzero(~np.isin(tokens, special))
        if len(stray) and not self.missing:
            self.missing_at = int(block.within[ends[stray[0]]])
        self.whole += len(ends)
        self.missing += len(stray)
        self.missing_in += (block.place + np.unique(example[stray])[: NAMED + 1]).tolist()
        _, first = np.unique(tokens, return_index=True)
        self.stops |= dict.fromkeys(tokens[np.sort(first)].tolist())


def _conversations(facts: Facts) -> Iterator[tuple[RowId, Conversation]]:
    """The first rows of each source that the chat template renders."""
    data, folder = facts.recipe.data, facts.loaded.path.parent
    for source in sources_of(data.train):
        format = facts.rows.report.formats.get(label(source))
        if format not in TALKING:
            continue
        names = data.columns if source.columns is None else source.columns
        for row, columns in islice(rows(source, folder=folder), SAMPLED):
            if isinstance(columns, Problem):
                continue
            ours = {name: columns[theirs] for name, theirs in names.items() if theirs in columns}
            with suppress(BadRow):
                item = FORMATS[format].parse(columns | ours)
                for side in (item.chosen, item.rejected) if isinstance(item, Preference) else (item,):
                    talk = as_conversation(side) if isinstance(side, Instruction) else side
                    if isinstance(talk, Conversation):
                        yield row, talk


def _inference_prompts(tokenizer: "PreTrainedTokenizerBase", talk: Conversation) -> Iterator[list[int]]:
    """What stands before each trained answer when the model is asked for it."""
    turns = [message.as_template_reads_it() for message in talk.messages]
    for place, message in enumerate(talk.messages):
        if message.train:
            encoded = tokenized(tokenizer, turns[:place], talk.tools, add_generation_prompt=True)
            yield list(encoded["input_ids"])


def _another_prompt(tokenizer: "PreTrainedTokenizerBase", example: Example, prompt: Sequence[int]) -> Problem:
    same = next((i for i, (a, b) in enumerate(zip(example.input_ids, prompt, strict=False)) if a != b), len(prompt))
    trained, asked = (quote(tokenizer.decode(ids[same : same + 8])) for ids in (example.input_ids, prompt))
    return Problem(
        "the chat template renders a prompt for training that is not the prompt of inference",
        where=str(example.row),
        line=f"training: {trained} · inference: {asked}",
        fix="use a tokenizer whose template renders the same messages the same way each time",
    )


def _named(examples: Examples) -> str:
    names: dict[str, None] = {}
    for example in examples:
        names[str(example.row)] = None
        if len(names) > NAMED:
            break
    return ", ".join(islice(names, NAMED)) + (" …" if len(names) > NAMED else "")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
