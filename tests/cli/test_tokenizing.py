"""What is shown while rows are tokenized: nothing of few rows, and of many a line now and then on stderr."""

import pytest

from lora_cli.cli import tokenizing as module
from lora_cli.cli.tokenizing import tokenizing
from lora_cli.data.pipeline import Tokenized


@pytest.fixture
def shown(monkeypatch, capsys):
    """shown([(second, share), …]) -> the lines on stderr."""

    def show(moments):
        with tokenizing() as progress:
            for second, share in moments:
                monkeypatch.setattr(module.time, "monotonic", lambda second=second: 1000.0 + second)
                progress(Tokenized("a\x1b.jsonl", share, round(2000 * share), round(100_000 * share)))
        done = capsys.readouterr()
        assert not done.out
        return done.err.splitlines()

    return show


def test_nothing_is_shown_of_what_takes_a_moment(shown):
    assert shown([(0, 0.5), (1, 1.0)]) == []


def test_long_work_is_told_now_and_then_with_its_rate_and_at_its_end(shown):
    lines = shown([(0, 0.01), (5, 0.1), (6, 0.12), (9, 0.2), (16, 0.5), (20, 0.6), (27, 1.0)])

    assert lines == [
        "tokenizing a\\x1b.jsonl   10%  200 rows  10,000 tokens  2,000 tokens/s",
        "tokenizing a\\x1b.jsonl   50%  1,000 rows  50,000 tokens  3,125 tokens/s",
        "tokenizing a\\x1b.jsonl  100%  2,000 rows  100,000 tokens  3,704 tokens/s",
    ]


def test_the_held_out_rows_are_counted_anew(shown):
    assert shown([(0, 0.5), (1, 1.0), (50, 0.5), (51, 1.0)]) == []
