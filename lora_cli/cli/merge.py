"""`lora merge`: base + adapter as a model of its own, proved."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.cli.options import (
    AdapterOption,
    BaseGridOption,
    BaseOption,
    DtypeOption,
    JsonOption,
    MismatchOption,
    OutOption,
    ProofRowsOption,
    TrustOption,
)

if TYPE_CHECKING:
    import torch

    from lora_cli.export.grid import Choice
    from lora_cli.export.merged import MergeReport
    from lora_cli.export.order import HeldOutRows, Order
    from lora_cli.export.proof import Proof
    from lora_cli.lora.adapter import Adapter

MOST_HELD_OUT = 64  # rows that both grids are measured on
GRIDS = {
    "trained": "base(nf4) + adapter, as it was trained",
    "original": "the base as it is stored",
    "nf4": "the base as nf4 gave it back",
}


def merge(
    adapter: AdapterOption,
    base: BaseOption = None,
    out: OutOption = None,
    dtype: DtypeOption = None,
    data: ProofRowsOption = None,
    base_grid: BaseGridOption = "auto",
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Write base + adapter as one model, and prove that it is.

    Example: lora merge --adapter out/ --out merged/
    """
    from lora_cli.cli.console import show_json
    from lora_cli.export.table import export_merged
    from lora_cli.runs.folder import RunFolder
    from lora_cli.runs.report import tell_merge

    order = read_order(
        adapter,
        "merged",
        base=base,
        out=out,
        dtype=dtype,
        data=data,
        base_grid=base_grid,
        allow_base_mismatch=allow_base_mismatch,
    )
    with weights_bar("merging", then="proving") as progress:
        report = export_merged(order, progress)
    tell_merge(RunFolder(adapter), report.as_dict())
    if as_json:
        show_json(report.as_dict())
    else:
        show_merge(report, adapter)


def read_order(
    folder: Path,
    format: str,
    *,
    base: str | None,
    out: Path | None,
    dtype: str | None,
    data: str | None,
    base_grid: str = "auto",
    allow_base_mismatch: bool,
) -> "Order":
    """What is to be exported. Everything cheap that can be wrong is found here, before any weight is read."""
    from lora_cli.export.dequantised import in_16_bits
    from lora_cli.export.merged import refuse_second_merge
    from lora_cli.export.order import Order
    from lora_cli.export.proof import proof_device
    from lora_cli.export.staging import refuse_output
    from lora_cli.export.table import FORMATS, is_transposed
    from lora_cli.lora.completion import load_for
    from lora_cli.lora.peft_format import load_alive
    from lora_cli.models.base import resolve_base
    from lora_cli.models.identity import check_tokenizer
    from lora_cli.models.load import DTYPES, default_device, load_tokenizer, tokenizer_folder

    out = out or folder / format
    refuse_output(out)
    adapter = load_alive(folder)
    # on the grid that it completes it is what was trained; on the original, what training has changed: nothing to compare
    elsewhere = adapter.completes is not None and base_grid != adapter.completes
    if elsewhere and format != "peft":
        adapter = load_for(folder)
    name = base or (adapter.config.base_model_name_or_path if FORMATS[format].needs_base else None)
    transposed = is_transposed(folder)
    if name is None:
        return Order(adapter, folder, out, transposed)
    found = resolve_base(name, None if base else adapter.config.revision)
    refuse_second_merge(found.folder, adapter)
    if FORMATS[format].whole:
        found, adapter = in_16_bits(found, adapter, allow_base_mismatch=allow_base_mismatch)
    if adapter.tokenizer:
        tokens = tokenizer_folder(folder, found.folder)
        check_tokenizer(adapter, load_tokenizer(tokens, writes=False), tokens, allow=allow_base_mismatch)
    trained = _trained_in_nf4(folder, base_grid) if FORMATS[format].whole and not elsewhere else None
    device = proof_device(found.folder)
    measured = trained is not None and device == default_device()  # losses are made where training would be
    return Order(
        adapter,
        folder,
        out,
        transposed,
        base=found,
        dtype=DTYPES.get(dtype) if dtype else None,
        type=dtype,
        token_rows=_rows(folder, found.folder, data, adapter.labels),
        device=device,
        allow_base_mismatch=allow_base_mismatch,
        trained=trained,
        base_grid=base_grid,
        held_out=_held_out(folder, found.folder, data, adapter) if measured else None,
    )


def show_merge(report: "MergeReport", adapter: Path) -> None:
    """Four short paragraphs: what was written, the proof, what storing lost, what to do with it."""
    from lora_cli.cli.console import bytes_text, inert, show

    show(f"merged   {inert(str(adapter))} into {inert(report.base)}", style="bold")
    show(f"         {report.tensors} weights changed · {bytes_text(report.bytes)} · {' and '.join(report.dtypes)}")
    if report.whole:
        show(f"         trained whole, and written as trained: {', '.join(report.whole)}")
    for line in [
        *_base_lines(report),
        *grid_lines(report.grid),
        *proof_lines(report.proof, "the merged model"),
        *_storage_lines(report),
    ]:
        show(line)
    show(f"written  {inert(str(report.out))}: a plain transformers folder, ready for `lora eval`, vLLM and others")


@contextmanager
def weights_bar(title: str, then: str | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while weights are written, and a spinner for what comes `then`; nothing where nothing may move."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from lora_cli.cli.console import animated, err

    if not animated():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=err, transient=True)
    task = bar.add_task(title, total=None)

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if then and done == total and bar.live.is_started:
            bar.stop()
            shown.enter_context(err.status(then))

    with ExitStack() as shown:
        shown.enter_context(bar)
        yield show


def mismatch_lines(differences: Sequence[str]) -> list[str]:
    """Where `--allow-base-mismatch` let another base pass, what tells it from the adapter's own."""
    differ = ", ".join(differences[:3])
    return [f"         NOT the base it was trained on (--allow-base-mismatch): {differ} differ"] if differences else []


def proof_lines(proof: "Proof", other: str) -> list[str]:
    """What base + adapter and the `other` answer to the same rows."""
    return [
        f"proof    base + adapter and {other} read the same {proof.positions} {proof.position}s ({proof.computed_in})",
        f"         largest logit difference {proof.largest_logit_difference:.2g}, where logits go up to "
        f"{proof.largest_logit:.3g}",
        f"         KL {proof.kl:.2g} nats a {proof.position}; the adapter itself moves {proof.adapter_kl:.2g}",
        f"         same first choice at {proof.same_top1:.1%} of the {proof.position}s",
    ]


def grid_lines(choice: "Choice | None") -> list[str]:
    """Of an adapter that was trained beside nf4: how far a merge on either grid is from what was trained, and what each
    loses on held-out rows."""
    if choice is None:
        return []
    losses = choice.held_out or {}
    rows = [
        (GRIDS[name], "" if name == "trained" else f"{choice.kl[name]:.2g}", f"{loss:.4f}" if loss is not None else "")
        for name, loss in (losses or dict.fromkeys(choice.kl)).items()
    ]
    head = ("", "KL to what was trained", f"loss on {choice.rows} held-out rows" if losses else "")
    wide = max(len(name) for name, *_ in rows)
    table = [
        f"{name:<{wide}}  {kl:>{len(head[1])}}  {loss:>{len(head[2])}}".rstrip() for name, kl, loss in (head, *rows)
    ]
    why = "as --base-grid says" if choice.asked else "the nearer"
    table.append(f"merged into {GRIDS[choice.name]}, {why}")
    if choice.better:
        less = losses[choice.nearest] - losses[choice.better]
        table.append(
            f"the two measures disagree: {GRIDS[choice.better]} loses {less:.4f} less; `--base-grid {choice.better}` takes it"
        )
    return [f"{'grid' if i == 0 else '':<9}{line}" for i, line in enumerate(table)]


def _base_lines(report: "MergeReport") -> list[str]:
    if report.base_differences:
        return mismatch_lines(report.base_differences)
    return (
        [] if report.base_checked else ["         the adapter doesn't say which weights it was trained on: not checked"]
    )


def _storage_lines(report: "MergeReport") -> list[str]:
    first = f"storage  {' and '.join(report.dtypes)} rounded off {report.lost:.2%} of the update"
    if report.unmoved_share:
        first += f"; {report.unmoved_share:.1%} of the weights it changes stay as they were"
    better = {name: lost for name, lost in report.lost_by_dtype.items() if lost < report.lost}
    if not better:
        return [first]
    choices = ", ".join(f"`--dtype {name}` {lost:.2%}" for name, lost in better.items())
    much = " (that is much next to what the adapter does)" if report.proof.storing_costs_much else ""
    return [first + much, f"         less would be lost with {choices}"]


def _rows(adapter: Path, base: Path, data: str | None, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The rows of the proof: the file's, those of the run, else sentences and code of our own."""
    from lora_cli.export.proof import SENTENCES, token_rows
    from lora_cli.models.load import load_tokenizer, tokenizer_folder
    from lora_cli.runs.proof_rows import rows_for_proof
    from lora_cli.runs.rows import rows_of_file

    if not data and (kept := rows_for_proof(adapter)):
        return tuple(map(tuple, kept))
    tokenizer = load_tokenizer(tokenizer_folder(adapter, base), writes=not labels)
    if data:
        return tuple(tuple(example.input_ids) for example in rows_of_file(data, tokenizer, labels=labels or None)[0])
    return tuple(map(tuple, token_rows(SENTENCES, tokenizer)))


def _held_out(adapter: Path, base: Path, data: str | None, trained: "Adapter") -> "HeldOutRows | None":
    """Rows to measure both grids on: the file's, else those that the run held out; of many, some from everywhere."""
    from lora_cli.cli.console import note
    from lora_cli.errors import UserError
    from lora_cli.export.order import HeldOutRows
    from lora_cli.models.load import load_tokenizer, tokenizer_folder
    from lora_cli.runs.evaluate import held_out_of, loss_on, spread
    from lora_cli.runs.rows import rows_of_file

    labels = trained.labels
    tokenizer = load_tokenizer(tokenizer_folder(adapter, base), writes=not labels)
    try:
        read = (
            rows_of_file(data, tokenizer, labels=labels or None)[0] if data else held_out_of(adapter, tokenizer, labels)
        )
    except UserError as error:
        note(f"the run's held-out rows can't be read, and the grids are compared by KL alone: {error.problems[0].what}")
        return None
    if not read:
        return None
    rows = spread(read, MOST_HELD_OUT)
    loss = loss_on(rows, "classify" if labels else "sft", len(labels) or len(tokenizer))
    return HeldOutRows(len(rows), lambda model: loss(model).loss)


def _trained_in_nf4(adapter: Path, base_grid: str) -> "torch.dtype | None":
    """Where an adapter learned beside a base in nf4, the dtype of its run; of one whose run is not there, bfloat16.

    Beside a base that was rounded otherwise, it is said that it is merged into one that is not.
    """
    import torch

    from lora_cli.cli.console import note
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.models.load import default_device, resolve_dtype
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.runs.folder import RunFolder

    recipe = RunFolder(adapter).recipe
    try:
        model = read_recipe(recipe).recipe.model if recipe.is_file() else None
    except RecipeError:
        note(f"{recipe.name} can't be read: whether the adapter was trained on a quantised base is not known")
        model = None
    if model is None:
        return torch.bfloat16 if base_grid == "nf4" else None
    if model.quantize == "nf4":
        return resolve_dtype(model.dtype, default_device())
    if base_grid == "nf4":
        fix = "leave `--base-grid` out: it is for adapters that were trained beside a base in nf4"
        raise RecipeError(
            Problem(f"the adapter was trained with `model.quantize: {model.quantize}`", str(recipe), fix=fix)
        )
    if model.quantize != "none":
        note(
            f"the adapter was trained on the base quantised to {model.quantize}; "
            "it is merged into the base as it is stored"
        )
    return None
