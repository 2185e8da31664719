"""Examples that say the same: equal ones by a digest of their tokens, near ones by MinHash (Broder 1997).

    tokens -> shingles of 5 tokens -> the least hash under each of 64 functions -> 16 bands of 4: rows that share a band
    are compared, and are near if 80 % of the least hashes agree, which estimates the overlap of their shingles

What more than a tenth of the examples share (a system prompt, an instruction) counts as template and is left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.data.types import Example

SHINGLE = 5  # tokens
FUNCTIONS, BAND = 64, 4
NEAR = 0.8  # estimated overlap
COMMON = 0.1  # share of the examples that makes a shingle part of the template
FEW = 10  # examples that may share a shingle in any case
Hashes = NDArray[np.uint64]


def exact_duplicates(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(place, place of the first equal one) of each example that was there before."""
    one, other = _digests(Examples.of(examples)).T
    _, first, which = np.unique(one, return_index=True, return_inverse=True)
    before = first[which]
    places = np.flatnonzero((before != np.arange(len(one))) & (other == other[before]))
    return list(zip(places.tolist(), before[places].tolist(), strict=True))


def found_in(examples: Sequence[Example], others: Sequence[Example]) -> list[tuple[int, int]]:
    """(place, place of the last equal one among the others) of each example that stands among them too."""
    (one, two), (one_of_others, two_of_others) = (_digests(Examples.of(found)).T for found in (examples, others))
    ranked = np.argsort(one_of_others, kind="stable")
    at = np.searchsorted(one_of_others[ranked], one, side="right") - 1
    match = ranked[np.maximum(at, 0)]
    places = np.flatnonzero((at >= 0) & (one_of_others[match] == one) & (two_of_others[match] == two))
    return list(zip(places.tolist(), match[places].tolist(), strict=True))


def near_duplicates(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(place, place of an earlier one) of each example that is almost an earlier one, and not equal to it."""
    repeated = {place for place, _ in exact_duplicates(examples)}
    places = [place for place in range(len(examples)) if place not in repeated]
    distinct = _without_template([_shingles(examples[place].input_ids) for place in places])
    signed = [(place, _signature(shingles)) for place, shingles in zip(places, distinct, strict=True) if len(shingles)]
    return list(_near(signed))


def _digests(examples: Examples) -> Hashes:
    """[examples, 2]: 128 bits that are equal for examples of equal tokens and equal length before max_length."""
    digests = np.zeros((len(examples), 2), np.uint64)
    cuts = examples.column("cut").astype(np.uint64)
    for block in examples.blocks():
        rows = slice(block.place, block.place + len(block.lengths))
        filled = block.lengths > 0
        salted = block.tokens.astype(np.uint64) | (block.within.astype(np.uint64) << np.uint64(32))
        for half in range(2):
            mixed = _mixed(salted + np.uint64(half))
            digests[rows, half][filled] = np.add.reduceat(mixed, block.starts[filled]) if filled.any() else 0
            digests[rows, half] += _mixed(cuts[rows] + np.uint64(half + 2))
    return digests


def _shingles(ids: Sequence[int]) -> Hashes:
    """The hashes of the runs of SHINGLE tokens, each once; of the whole where it is shorter."""
    tokens = np.asarray(ids, np.uint64)
    width = min(SHINGLE, len(tokens))
    windows = np.lib.stride_tricks.sliding_window_view(tokens, width)
    hashes = np.zeros(len(windows), np.uint64)
    for column in windows.T:
        hashes = _mixed(hashes * np.uint64(31) + column)
    return np.unique(hashes)


def _mixed(x: Hashes) -> Hashes:
    """splitmix64's finaliser."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _without_template(shingles: list[Hashes]) -> list[Hashes]:
    if not shingles:
        return []
    _, which, counts = np.unique(np.concatenate(shingles), return_inverse=True, return_counts=True)
    rare = (counts <= max(FEW, COMMON * len(shingles)))[which]
    ends = np.cumsum([len(found) for found in shingles])[:-1]
    return [found[kept] for found, kept in zip(shingles, np.split(rare, ends), strict=True)]


def _signature(shingles: Hashes) -> Hashes:
    seeds = _mixed(np.arange(FUNCTIONS, dtype=np.uint64))
    return _mixed(shingles ^ seeds[:, None]).min(axis=1)


def _near(signed: Sequence[tuple[int, Hashes]]) -> Iterator[tuple[int, int]]:
    bands: dict[tuple[int, bytes], list[tuple[int, Hashes]]] = {}
    for place, signature in signed:
        cells = [(start, signature[start : start + BAND].tobytes()) for start in range(0, FUNCTIONS, BAND)]
        before = {other: of for cell in cells for other, of in bands.get(cell, [])[:FEW]}
        match = next((other for other, of in before.items() if (of == signature).mean() >= NEAR), None)
        if match is not None:
            yield place, match
        for cell in cells:
            bands.setdefault(cell, []).append((place, signature))
