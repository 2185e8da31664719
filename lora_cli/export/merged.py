"""Merging: a copy of the base whose weights hold the update, W + scale · B A, computed in float32 and stored once.

Storing rounds: bfloat16 keeps 8 bits of a weight, and what an update changes below the last of them is lost. How much
that is gets measured while writing, for the dtype written and for the others it could have been.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isinf, sqrt
from pathlib import Path

import torch
from torch import Tensor

from lora_cli import __version__
from lora_cli.errors import ModelError, Problem
from lora_cli.export.files import (
    DTYPES,
    Change,
    Changes,
    Progress,
    copy_side_files,
    dtype_name,
    planned_bytes,
    rewrite_weights,
    row_blocks,
    write_config,
)
from lora_cli.export.grid import Choice, Grid
from lora_cli.export.names import Files, Others, Place, Table, matrix_at, others, places, tables_in_files
from lora_cli.export.proof import Proof
from lora_cli.export.staging import need_space, refuse_output, staged
from lora_cli.limits import read_json
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import Fingerprint, fingerprint, stored_tensors
from lora_cli.lora.tokens import ROWS
from lora_cli.lora.vocabulary import longer
from lora_cli.models.base import read_config
from lora_cli.models.heads import architecture, head_of
from lora_cli.models.load import load_tokenizer, skeleton

log = logging.getLogger(__name__)

RECORD = "merge.json"
COMPARED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Rounding:
    """What one dtype loses of an update, as sums over all changed weights."""

    update: float = 0.0  # ‖Δ‖²
    error: float = 0.0  # ‖stored − (W + Δ)‖²
    moving: int = 0  # weights with Δ ≠ 0
    unmoved: int = 0  # those of them that are stored as if there were no update

    @property
    def lost(self) -> float:
        """‖stored − (W + Δ)‖ / ‖Δ‖; infinite when a weight is too large for the dtype."""
        return sqrt(self.error / self.update) if self.update else 0.0

    @property
    def unmoved_share(self) -> float:
        return self.unmoved / self.moving if self.moving else 0.0

    def add(self, W: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        update = exact - W.float()
        stored = exact.to(dtype)
        moving = update != 0
        self.update += _squared_norm(update)
        self.error += _squared_norm(stored.float() - exact)
        self.moving += int(moving.sum())
        self.unmoved += int((moving & (stored == W.to(dtype))).sum())


@dataclass
class Tally:
    """Rounding by dtype, and as written (tensors of one base may be stored in several dtypes)."""

    written: Rounding = field(default_factory=Rounding)
    by_dtype: dict[torch.dtype, Rounding] = field(default_factory=lambda: {dtype: Rounding() for dtype in COMPARED})

    def add(self, W: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        self.written.add(W, exact, dtype)
        for compared, rounding in self.by_dtype.items():
            rounding.add(W, exact, compared)


@dataclass(frozen=True)
class MergeReport:
    """`lost` is as written, `lost_by_dtype` what each dtype would lose: shares of ‖Δ‖."""

    out: Path
    base: str
    adapter_sha256: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    lost: float
    unmoved_share: float
    lost_by_dtype: Mapping[str, float]
    base_checked: bool
    base_differences: tuple[str, ...]
    untied: tuple[str, ...]
    proof: Proof | None
    whole: tuple[str, ...] = ()  # modules that were trained whole
    grid: Choice | None = None  # of an adapter that was trained beside a base in nf4

    def as_dict(self) -> dict:
        """For JSON, which knows no infinity: a dtype that can't hold the weights has null."""
        finite = {name: None if isinf(lost) else lost for name, lost in self.lost_by_dtype.items()}
        return asdict(self) | {"out": str(self.out), "lost_by_dtype": finite}


def merge(
    base_folder: Path,
    adapter: Adapter,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    base_name: str | None = None,
    tokenizer: Path | None = None,
    prove: Callable[[Path], Proof] | None = None,
    grid: Grid | None = None,
    choice: Choice | None = None,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write base + adapter to `out` as a model of its own; the base is only read.

    `dtype` is for all floating tensors; without it each keeps its own. `tokenizer` is a folder whose tokenizer goes
    along instead of the base's. With a grid, the weights on it are moved there first, whether the adapter changes them or
    not; `choice` says why. `prove` sees the finished folder before it appears at `out`: if it raises, nothing
    does. Raises ModelError for a wrong base and for a second merge of the same adapter, StorageError for the output.
    """
    adapter.check_alive()
    refuse_output(out, base_folder)
    refuse_second_merge(base_folder, adapter)
    found = fingerprint(base_folder)
    differences = adapter.check_base(found, base_folder, allow=allow_base_mismatch)
    where, beside = places(base_folder, adapter), others(base_folder, adapter)
    tally = Tally()
    low_rank = [place for parts in where.values() for place in parts]
    edit = partial(_merged, adapter=adapter, tally=tally, grid=grid)
    tables = tables_in_files(base_folder, adapter)
    of_tables = _of_tables(tables, beside, adapter, tally)
    on_grid = _on_grid(base_folder, adapter, grid)
    changes = _changes(beside, adapter, tally) | on_grid | of_tables | changes_of(low_rank, edit)
    added = {name: tensor for name, tensor in _extras(adapter).items() if name in beside.new}
    written = [*low_rank, *beside.placed.values()]
    untied = tuple(place.updated for place in written if place.kept)
    tied = False if any(place.tied for place in written) else None
    with staged(out, beside=base_folder) as draft:
        need_space(draft, planned_bytes(base_folder, changes, dtype, added))
        size = rewrite_weights(base_folder, draft, changes, added=added, dtype=dtype, progress=progress)
        copy_side_files(base_folder, draft, tokenizer=tokenizer)
        write_config(base_folder, draft, dtype=dtype, tied=tied, changed=_changed(adapter, base_folder, draft, tables))
        report = MergeReport(
            out=out,
            base=base_name or adapter.config.base_model_name_or_path or base_folder.name,
            adapter_sha256=adapter.digest(),
            tensors=len({place.updated for place in written}) + len(added) + len(tables),
            bytes=size,
            dtypes=_dtypes(draft, low_rank),
            lost=tally.written.lost,
            unmoved_share=tally.written.unmoved_share,
            lost_by_dtype={dtype_name(d): rounding.lost for d, rounding in tally.by_dtype.items()},
            base_checked=adapter.base is not None,
            base_differences=tuple(differences),
            untied=untied,
            proof=prove(draft) if prove else None,
            whole=_beside(adapter),
            grid=choice,
        )
        _write_record(draft, report, found, merge_record(base_folder), _kept(written, changes))
        _write_card(draft, report)
    if tied is False:
        log.warning("the head was tied to the embedding; it has a weight of its own now, and the config says so")
    return report


def merge_record(folder: Path) -> dict:
    """What merge.json of a folder says; {"adapters": []} where nothing was merged."""
    file = folder / RECORD
    if not file.is_file():
        return {"adapters": []}
    fix = "merge again, or delete it if the folder is a plain base"
    found = read_json(file, fix=fix)
    entries = found.get("adapters")
    if not (isinstance(entries, list) and all(map(_is_entry, entries))):
        raise ModelError(Problem("it can't be read", where=str(file), fix=fix))
    return found


def _is_entry(found: object) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("sha256"), str)
        and isinstance(found.get("untied"), list)
        and all(isinstance(name, str) for name in found["untied"])
    )


def refuse_second_merge(base_folder: Path, adapter: Adapter) -> None:
    """Raise ModelError when the base holds this adapter already: its update would count twice."""
    if adapter.digest() in [entry["sha256"] for entry in merge_record(base_folder)["adapters"]]:
        raise ModelError(
            Problem(
                "this adapter is merged into this base already: a second merge would apply its update twice",
                where=str(base_folder / RECORD),
                fix="use the folder as it is, or give the unmerged base with `--base`",
            )
        )


def changes_of(places: Iterable[Place], edit: Callable[..., Tensor]) -> dict[str, tuple[Change, ...]]:
    """What becomes of the tensors at these places, which `edit` is given as `parts`, one tensor's together.

    What was tied to a weight that changes is written beside it as it was, unless it changes too.
    """
    groups: dict[str, dict[str, list[Place]]] = {}
    for place in places:
        groups.setdefault(place.tensor, {}).setdefault(place.updated, []).append(place)
    changes = {}
    for tensor, outputs in groups.items():
        kept = {part.kept for parts in outputs.values() for part in parts} - {None, *outputs}
        edited = [Change(name, partial(edit, parts=parts), parts[0].transposed) for name, parts in outputs.items()]
        changes[tensor] = (*map(Change, sorted(kept)), *edited)
    return changes


def _changes(beside: Others, adapter: Adapter, tally: Tally) -> dict[str, tuple[Change, ...]]:
    """What becomes of the tensors that no LoRA layer changes."""
    extras = _extras(adapter)
    exact = {place.updated: extras[name] for name, place in beside.placed.items()}
    replaced = changes_of(beside.placed.values(), partial(_replaced, exact=exact, tally=tally))
    moved = {file: (Change(name),) for file, name in beside.renamed.items()}
    return moved | dict.fromkeys(beside.left_out, ()) | replaced


def _kept(written: Iterable[Place], changes: Changes) -> dict[str, dict[str, str]]:
    """Of weights that were tied, by the name of the one that has changed: what the other is called that has not, and
    which of both names the base has."""
    names = {change.name for made in changes.values() for change in made if change.edit is None}
    return {place.updated: {"as": place.kept, "from": place.tensor} for place in written if place.kept in names}


def _extras(adapter: Adapter) -> dict[str, Tensor]:
    """What is trained whole, by the names of the parameters."""
    extras = adapter.extras.items()
    return {f"{path}.{name}": tensor for path, state in extras for name, tensor in state.items() if name != ROWS}


def _beside(adapter: Adapter) -> tuple[str, ...]:
    """What was trained beside the LoRA layers, in words."""
    biases = [f"{len(adapter.biases)} biases"] if adapter.biases else []
    rows = [f"{len(adapter.config.trainable_tokens)} rows of {path}" for path in adapter.tables]
    return (*adapter.whole, *biases, *rows)


def _of_tables(tables: Iterable[Table], beside: Others, adapter: Adapter, tally: Tally) -> Changes:
    """What becomes of the tables of which some tokens' rows are trained; a tied head stays tied, and has them too."""
    tokens, changes = list(adapter.config.trainable_tokens), {}
    for table in tables:
        rows = adapter.extras[table.path][ROWS] if table.path else None
        edit = partial(_with_rows, count=table.rows, tokens=tokens, rows=rows, tally=tally)
        name = beside.renamed.get(table.tensor, table.tensor)
        changes[table.tensor] = (Change(name, edit, rows=table.rows),)
    return changes


def _with_rows(
    W: Tensor, dtype: torch.dtype, *, count: int | None, tokens: list[int], rows: Tensor | None, tally: Tally
) -> Tensor:
    W = W if count is None else longer(W, count)
    new = W.to(dtype, copy=True)
    if rows is not None:
        tally.add(W[tokens], rows, dtype)
        new[tokens] = rows.to(dtype)
    return new


def _replaced(
    W: Tensor, dtype: torch.dtype, *, parts: Sequence[Place], exact: Mapping[str, Tensor], tally: Tally
) -> Tensor:
    new = exact[parts[0].updated]
    for rows in row_blocks(W):
        tally.add(W[rows], new[rows], dtype)
    return new.to(dtype)


def _changed(adapter: Adapter, base: Path, draft: Path, tables: Iterable[Table]) -> dict[str, object]:
    """What the config of a merged model says beside its base's: of more tokens, of a classifier."""
    rows = next((table.rows for table in tables if table.rows), None)
    return (_of_vocabulary(base, rows) if rows else {}) | _of_classifier(adapter, base, draft)


def _of_vocabulary(base: Path, rows: int) -> dict[str, object]:
    text = read_config(base).get("text_config")  # of a model that sees, too
    return {"vocab_size": rows} if text is None else {"text_config": text | {"vocab_size": rows}}


def _of_classifier(adapter: Adapter, base: Path, draft: Path) -> dict[str, object]:
    """Its class, its labels, its padding."""
    head = head_of(adapter)
    if head is None:
        return {}
    padding = {}
    if (draft / "tokenizer_config.json").is_file():
        padding = {"pad_token_id": load_tokenizer(draft, writes=False).pad_token_id}
    return architecture(skeleton(base, head), head.labels) | padding


def _on_grid(base: Path, adapter: Adapter, grid: Grid | None) -> dict[str, tuple[Change, ...]]:
    """What becomes of the weights on the grid that the adapter does not change."""
    if grid is None:
        return {}
    files = Files.of(skeleton(base, head_of(adapter)), stored_tensors(base))
    alone = [part for path in grid.paths - set(adapter.layers) for part in files.parts_of(path)]
    return changes_of(alone, lambda W, dtype, parts: grid.round(W).to(dtype))


def _merged(
    W: Tensor, dtype: torch.dtype, *, parts: Sequence[Place], adapter: Adapter, tally: Tally, grid: Grid | None
) -> Tensor:
    W = grid.round(W) if grid and parts[0].path in grid.paths else W
    new = W.to(dtype, copy=True)
    for part in parts:
        factors, scale = rows_of(adapter.layers[part.path], part.rows), adapter.config.at(part.path).scale
        old, merged = matrix_at(W, part), matrix_at(new, part)
        for rows in row_blocks(old):
            exact = rows_of(factors, rows).merge_into(old[rows], scale)
            merged[rows] = exact.to(dtype)
            tally.add(old[rows], exact, dtype)
    return new


def rows_of(factors: Factors, rows: slice) -> Factors:
    """The factors of some of a weight's rows: every row of an update stands for itself, DoRA's norm too."""
    return Factors(factors.A, factors.B[rows], None if factors.magnitude is None else factors.magnitude[rows])


def _squared_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _dtypes(folder: Path, places: Iterable[Place]) -> tuple[str, ...]:
    stored = stored_tensors(folder)
    return tuple(sorted({dtype_name(DTYPES[stored[place.updated].dtype]) for place in places}))


def _write_record(
    folder: Path, report: MergeReport, base: Fingerprint, before: dict, kept: Mapping[str, Mapping[str, str]]
) -> None:
    figures = {key: value for key, value in report.as_dict().items() if key not in ("out", "base", "adapter_sha256")}
    record = {
        "lora": __version__,
        "base": {"name": report.base, "fingerprint": json.loads(base.to_json())},
        "adapters": [
            *before["adapters"],
            {"sha256": report.adapter_sha256, "untied": list(report.untied), "kept": kept},
        ],
        "allow_base_mismatch": list(report.base_differences),
        "report": figures,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _write_card(folder: Path, report: MergeReport) -> None:
    name = json.dumps(report.base)
    proof = f"\nProof: {report.proof.sentence}\n" if report.proof else ""
    (folder / "README.md").write_text(
        f"---\nbase_model: {name}\nlibrary_name: transformers\n---\n\n"
        f"A LoRA adapter (SHA-256 `{report.adapter_sha256[:12]}`) merged into {name}: {report.tensors} weights, "
        f"stored as {' and '.join(report.dtypes)}, which rounds off {report.lost:.1%} of the update.\n{proof}\n"
        f"`{RECORD}` has all figures, and the fingerprint of the base.\n"
    )
