"""Scales with even ticks, and lines that lose no spike."""

import itertools

import pytest

from lora_cli.runs.charts import SIZE, Line, chart, charts_of, curve_lines, ticks_of
from lora_cli.runs.history import history_of


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.1, 4.4), (0, 5e-4), (-2, 7), (1e6, 1.1e6), (5, 5), (0, 0), (-3, -3), (0.2, 0.200001)]
)
def test_ticks_are_even_and_hold_the_values(low, high):
    ticks = ticks_of(low, high)
    gaps = [after - before for before, after in itertools.pairwise(ticks)]

    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 7
    assert max(gaps) == pytest.approx(min(gaps))


def drawn(points, **options):
    return chart("t", "", [Line("a", "train", points)], last=points[-1][0], format=str, **options)


def test_the_curve_lies_in_its_plot():
    line = drawn([(0, 4.0), (50, 3.5), (100, 3.0)]).lines[0]

    assert line.path == f"M0 0L{SIZE // 2} {SIZE // 2}L{SIZE} {SIZE}"


def test_what_spans_decades_is_drawn_by_its_logarithm():
    points = [(0, 1.0), (1, 10.0), (2, 100.0)]
    found = drawn(points, wide=True)

    assert found.y_labels == ("100.0", "10.0", "1.0")
    assert found.lines[0].path == f"M0 {SIZE}L{SIZE // 2} {SIZE // 2}L{SIZE} 0"
    assert drawn(points).y_labels[-1] == "0.0"


def test_a_spike_survives_in_a_line_of_many_points():
    points = [(step, 1.0) for step in range(1, 10_001)]
    points[7_777] = (7_778, 9.0)

    line = drawn(points).lines[0]

    assert (7_778, 9.0) in line.points
    assert len(line.points) <= 400


def test_a_single_point_and_no_point():
    assert drawn([(1, 2.0)]).lines[0].path.endswith("h0")
    assert chart("t", "", [Line("a", "train", [])], last=1, format=str) is None


def test_a_short_curve_is_not_smoothed_and_a_long_one_keeps_its_raw_line():
    assert [line.look for line in curve_lines("a", "train", [(i, 1.0) for i in range(5)])] == ["train"]
    assert [line.look for line in curve_lines("a", "train", [(i, 1.0) for i in range(50)])] == ["train raw", "train"]


def test_sources_and_metrics_have_charts_of_their_own():
    events = [{"event": "step", "step": i, "loss": 1.0, "sources": {"a": 1.0, "b": 2.0}} for i in (1, 2)]
    events.append({"event": "evaluated", "step": 2, "loss": 1.0, "f1": 0.5})

    titles = [found.title for found in charts_of(history_of(events))]

    assert titles == ["Loss", "Loss by source", "f1"]
