"""Packing: several examples in one row, one behind the other, so that no forward is spent on padding.

    row   [ a a a a | b b | c c c ]      documents never see each other, and positions restart in each (`collate`)

It is a matter of layout alone: which examples a step trains is decided before (`pipeline.steps`), and an example counts
as one whatever row it lies in. So packed and unpacked runs take the same steps, and their gradients agree.
"""

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of `lengths` by row: the longest first, each into the first row with room.

    Uses at most 11/9 of the fewest possible rows, plus one (Dósa 2007). A length above `capacity` gets a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        row = next((row for row, left in enumerate(room) if left >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Places of `lengths` by hand, with sums as equal as the longest-first rule makes them (Graham 1969)."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        least = sums.index(min(sums))
        dealt[least].append(place)
        sums[least] += lengths[place]
    return dealt
