"""Unmerging: a merged model minus its adapter, on disk, and how far that can be from the true base.

Merging stored W + Δ rounded to the nearest number of its dtype. Taking Δ off in float32 and storing again leaves, for
each weight, at most half a unit in the last place of the merged weight, and half of one of the result.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import frexp
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.errors import ModelError, Problem
from lora_cli.export.files import (
    Change,
    Changes,
    Progress,
    copy_side_files,
    planned_bytes,
    rewrite_weights,
    row_blocks,
    write_config,
)
from lora_cli.export.merged import RECORD, changes_of, merge_record, rows_of
from lora_cli.export.names import Parts, Place, matrix_at, places, read_parts
from lora_cli.export.staging import need_space, refuse_output, staged
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import StoredTensor, stored_tensors

Original = tuple[Mapping[str, StoredTensor], Parts]
"""The tensors of the base, and the places of a weight in them."""


@dataclass
class Distance:
    """Of one weight: the largest possible difference to the base, and what was measured where the base is at hand."""

    possible: float = 0.0
    largest: float = 0.0
    total: float = 0.0
    equal: int = 0
    weights: int = 0

    def add(self, found: Tensor, base: Tensor) -> None:
        difference = (found.double() - base.double()).abs()
        self.largest = max(self.largest, float(difference.max()))
        self.total += float(difference.sum())
        self.equal += int((difference == 0).sum())


@dataclass(frozen=True)
class UnmergeReport:
    """`possible` bounds |result − base| for every changed weight; `largest`, `mean` and `equal_share` need the base."""

    out: Path
    tensors: int
    bytes: int
    possible: float
    largest: float | None
    mean: float | None
    equal_share: float | None
    recorded: bool  # the folder's merge.json names this adapter

    def as_dict(self) -> dict:
        return asdict(self) | {"out": str(self.out)}


def unmerge(
    merged_folder: Path,
    adapter: Adapter,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write merged − adapter to `out`; the merged folder is only read.

    With `base`, the true base's folder, the difference to it is measured, and one that rounding can't explain is a
    ModelError. Raises ModelError for DoRA, and for a folder that says it holds other adapters and not this one.
    """
    adapter.check_alive()
    _refuse_dora(adapter)
    _refuse_whole(adapter)
    refuse_output(out, merged_folder)
    entry, others = _entry(merged_folder, adapter)
    where = places(merged_folder, adapter)
    retied = _retied(entry, where) if not others else {}
    found = {path: parts for path, parts in where.items() if not any(part.updated in retied for part in parts)}
    distances = {path: Distance() for path in found}
    taking_off = partial(
        _unmerged, adapter=adapter, originals=_originals(base, adapter), distances=distances, roundings=1 + len(others)
    )
    changes = retied | changes_of((part for parts in found.values() for part in parts), taking_off)
    with staged(out, beside=merged_folder) as draft:
        need_space(draft, planned_bytes(merged_folder, changes, dtype))
        size = rewrite_weights(merged_folder, draft, changes, dtype=dtype, progress=progress)
        write_config(merged_folder, draft, dtype=dtype, tied=True if retied else None)
        copy_side_files(merged_folder, draft)
        _write_record(merged_folder, draft, others)
        _check_possible(distances, measured=base is not None)
    return _report(out, size, distances, measured=base is not None, recorded=entry is not None)


def _retied(entry: dict | None, where: Mapping[str, Parts]) -> Changes:
    """What becomes of weights that the merge untied: the one that has changed goes, and the other is both of them again.

    Where both have changed, none of them is the base's any more, and they stay two.
    """
    if entry is None:
        return {}
    changes: dict[str, tuple[Change, ...]] = {}
    updated = {part.updated for parts in where.values() for part in parts}
    kept = entry.get("kept", dict.fromkeys(entry["untied"]))  # older records know heads alone
    for name in updated & set(kept):
        changes[name] = ()
        if kept[name] and kept[name]["from"] == name:
            changes[kept[name]["as"]] = (Change(name),)
    return changes


def _unmerged(
    M: Tensor,
    dtype: torch.dtype,
    *,
    parts: Sequence[Place],
    adapter: Adapter,
    originals: Mapping[str, Original],
    distances: Mapping[str, Distance],
    roundings: int,
) -> Tensor:
    W = M.to(dtype, copy=True)
    for part in parts:
        _take_off(part, matrix_at(M, part), matrix_at(W, part), adapter, distances[part.path], roundings)
        if part.path in originals:
            base = read_parts(*originals[part.path])[part.rows]
            for rows in row_blocks(base):
                distances[part.path].add(matrix_at(W, part)[rows], base[rows])
    return W


def _take_off(part: Place, M: Tensor, W: Tensor, adapter: Adapter, distance: Distance, roundings: int) -> None:
    """W = M − scale · B A, in place, and how far that may be from what was there before the merge."""
    factors, scale = rows_of(adapter.layers[part.path], part.rows), adapter.config.at(part.path).scale
    for rows in row_blocks(M):
        W[rows] = rows_of(factors, rows).merge_into(M[rows], -scale).to(W.dtype)
    distance.weights += W.numel()
    possible = roundings * _half_unit(M, M.dtype) + _half_unit(W, W.dtype)
    distance.possible = max(distance.possible, possible + _float32_noise(M, factors, scale, roundings))


def _half_unit(weight: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest number: the most that rounding to nearest can have moved any."""
    info = torch.finfo(dtype)
    _, exponent = frexp(max(float(weight.abs().max()), info.tiny))
    return info.eps / 2 * 2.0 ** (exponent - 1)


def _float32_noise(M: Tensor, factors: Factors, scale: float, roundings: int) -> float:
    """What sums of r + 2 float32 terms can be off, twice: in the merge and here (Higham 2002, section 3.1)."""
    largest_update = abs(scale) * float(factors.B.norm(dim=1).max() * factors.A.norm(dim=0).max())
    terms = factors.A.shape[0] + 2
    return (1 + roundings) * terms * 2.0**-24 * (float(M.abs().max()) + largest_update)


def _originals(base: Path | None, adapter: Adapter) -> Mapping[str, Original]:
    """The base's own weight of each module."""
    if base is None:
        return {}
    stored = stored_tensors(base)
    return {path: (stored, parts) for path, parts in places(base, adapter).items()}


def _entry(folder: Path, adapter: Adapter) -> tuple[dict | None, list[dict]]:
    """This adapter's entry in merge.json, and those of others; none at all where other tools merged."""
    entries = merge_record(folder)["adapters"]
    digest = adapter.digest()
    entry = next((entry for entry in entries if entry["sha256"] == digest), None)
    if entries and entry is None:
        raise ModelError(
            Problem(
                "this adapter is not among those merged into this folder",
                where=str(folder / RECORD),
                fix="give the adapter whose SHA-256 stands there with `--adapter`",
            )
        )
    return entry, [other for other in entries if other is not entry]


def _write_record(folder: Path, out: Path, others: list[dict]) -> None:
    if others:
        record = merge_record(folder) | {"adapters": others}
        (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _check_possible(distances: Mapping[str, Distance], *, measured: bool) -> None:
    """A measured difference above the possible one shows that the folder is not base + this adapter."""
    far = {path: d for path, d in distances.items() if measured and not d.largest <= d.possible}
    if far:
        path, distance = max(far.items(), key=lambda item: item[1].largest / item[1].possible)
        raise ModelError(
            Problem(
                f"merged − adapter is not this base: {path} differs by {distance.largest:.2g}, and rounding explains "
                f"{distance.possible:.2g} at most",
                fix="give the base and the adapter that were merged with `--base` and `--adapter`",
            )
        )


def _report(
    out: Path, size: int, distances: Mapping[str, Distance], *, measured: bool, recorded: bool
) -> UnmergeReport:
    found = distances.values()
    weights = max(1, sum(d.weights for d in found))
    return UnmergeReport(
        out=out,
        tensors=len(distances),
        bytes=size,
        possible=max((d.possible for d in found), default=0.0),
        largest=max((d.largest for d in found), default=0.0) if measured else None,
        mean=sum(d.total for d in found) / weights if measured else None,
        equal_share=sum(d.equal for d in found) / weights if measured else None,
        recorded=recorded,
    )


def _refuse_whole(adapter: Adapter) -> None:
    if adapter.extras:
        what = f"the merge wrote {', '.join(adapter.extras)} over the base's own, which is not kept anywhere"
        raise ModelError(
            Problem(
                f"an adapter with modules trained whole can't be taken off again: {what}", fix="use the base itself"
            )
        )


def _refuse_dora(adapter: Adapter) -> None:
    if adapter.config.use_dora:
        raise ModelError(
            Problem(
                "a DoRA adapter can't be taken off again: the merge scaled each row by m / ‖W + Δ‖, and ‖W + Δ‖ is not "
                "kept anywhere",
                fix="use the base itself",
            )
        )
