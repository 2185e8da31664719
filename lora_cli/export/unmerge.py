"""Unmerging: a merged model minus its adapter, on disk, and how far that can be from the true base.

Merging stored W + Δ rounded to the nearest number of its dtype. Taking Δ off in float32 and storing again leaves, for
each weight, at most half a unit in the last place of the merged weight, and half of one of the result.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import frexp
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.errors import ModelError, Problem
from lora_cli.export.files import (
    Change,
    Progress,
    copy_side_files,
    planned_bytes,
    read_weight,
    rewrite_weights,
    row_blocks,
    write_config,
)
from lora_cli.export.merged import RECORD, merge_record, rows_of
from lora_cli.export.names import Place, places
from lora_cli.export.staging import need_space, refuse_output, staged
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import StoredTensor, stored_tensors

Original = tuple[StoredTensor, bool]
"""The base's own weight, and whether it is stored [in, out]."""


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
    originals = _originals(base, adapter)
    retied = set(entry["untied"]) if entry and not others else set()
    distances = {path: Distance() for path in where if where[path].updated not in retied}
    roundings = 1 + len(others)
    changes = {
        place.tensor: _change(place, adapter, originals.get(place.path), distances.get(place.path), roundings)
        for place in where.values()
    }
    with staged(out, beside=merged_folder) as draft:
        need_space(draft, planned_bytes(merged_folder, changes, dtype))
        size = rewrite_weights(merged_folder, draft, changes, dtype=dtype, progress=progress)
        write_config(merged_folder, draft, dtype=dtype, tied=True if retied else None)
        copy_side_files(merged_folder, draft)
        _write_record(merged_folder, draft, others)
        _check_possible(distances, measured=base is not None)
    return _report(out, size, distances, measured=base is not None, recorded=entry is not None)


def _change(
    place: Place,
    adapter: Adapter,
    original: Original | None,
    distance: Distance | None,
    roundings: int,
) -> Change:
    if distance is None:  # the head gets its tie back: its own weight goes
        return Change(place.updated, None)
    factors, scale = adapter.layers[place.path], adapter.config.at(place.path).scale
    edit = partial(_unmerged, factors=factors, scale=scale, original=original, distance=distance, roundings=roundings)
    return Change(place.updated, edit, place.transposed, place.kept)


def _unmerged(
    M: Tensor,
    dtype: torch.dtype,
    *,
    factors: Factors,
    scale: float,
    original: Original | None,
    distance: Distance,
    roundings: int,
) -> Tensor:
    W = torch.empty(M.shape, dtype=dtype)
    for rows in row_blocks(M):
        W[rows] = rows_of(factors, rows).merge_into(M[rows], -scale).to(dtype)
    distance.weights = W.numel()
    distance.possible = (
        roundings * _half_unit(M, M.dtype) + _half_unit(W, dtype) + _float32_noise(M, factors, scale, roundings)
    )
    if original is not None:
        base = read_weight(original[0], transposed=original[1])
        for rows in row_blocks(W):
            distance.add(W[rows], base[rows])
    return W


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
    return {path: (stored[place.tensor], place.transposed) for path, place in places(base, adapter).items()}


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
