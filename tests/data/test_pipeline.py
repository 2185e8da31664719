import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import pytest
from templates import CHATML, GEMMA, THINKING, tiny_tokenizer

from lora_cli.data.examples import fingerprint
from lora_cli.data.order import Plan, epoch_length, order, plan, split, steps
from lora_cli.data.pipeline import load_examples
from lora_cli.data.report import SourceReport, Spread
from lora_cli.data.types import Example, RowId
from lora_cli.errors import DataError, RecipeError
from lora_cli.recipe.schema import Source

JARGON = Path(__file__).parents[2] / "recipes/jargon"
PAIR = {"prompt": "what", "completion": " the cat"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHATML)


def write(folder, *found, name="train.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))


def load(folder, tokenizer, *, sources="train.jsonl", max_length=64, **options):
    return load_examples(sources, folder=folder, tokenizer=tokenizer, max_length=max_length, **options)


def refused(folder, tokenizer, **given):
    with pytest.raises(DataError) as error:
        load(folder, tokenizer, **given)
    return str(error.value)


def numbered(count: int, *, each: int = 1) -> list[Example]:
    return [Example([number], [0.0], RowId("a", number // each)) for number in range(count)]


def test_the_report_counts_what_became_of_the_rows(tmp_path, tokenizer):
    write(
        tmp_path, *[PAIR] * 39, {"prompt": "what", "completion": " the cat sat on the mat"}, {**PAIR, "completion": ""}
    )
    short, long = (len(tokenizer(f"what the cat{rest}")["input_ids"]) + 1 for rest in ("", " sat on the mat"))

    examples, report = load(tmp_path, tokenizer, max_length=short)

    assert len(examples) == report.examples == report.used == 40
    assert (report.rows, report.dropped) == (41, {"empty answer": 1})
    assert (report.cut_rows, report.cut_tokens) == (1, long - short)
    assert report.tokens == sum(len(example.input_ids) for example in examples) == 40 * short
    assert report.trained_tokens == sum(example.items for example in examples)
    assert report.lengths == Spread(short, short, long, long)
    assert report.prompts == Spread(1, 1, 1, 1)
    assert report.summary() == (
        f"41 rows (completion), {report.trained_tokens} trained tokens of {40 * short}; 1 left out (empty answer); "
        f"1 cut to max_length by {long - short} tokens"
    )


def test_a_row_that_is_left_out_is_named_and_what_was_found_is_said(tmp_path, tokenizer, caplog):
    write(tmp_path, *[PAIR] * 39, {**PAIR, "completion": ""})

    with caplog.at_level(logging.INFO, "lora_cli"):
        load(tmp_path, tokenizer)

    assert caplog.messages == [
        "train.jsonl: format `completion` found from the columns `prompt`, `completion`",
        "1 of 40 rows have an empty answer and are left out:\n  train.jsonl:40: `completion` is empty",
    ]


def test_rows_that_cannot_be_used_are_named_by_line_all_at_once(tmp_path, tokenizer):
    write(tmp_path, PAIR, {"prompt": "what"}, PAIR, {"prompt": 3, "completion": "that"})

    assert refused(tmp_path, tokenizer) == (
        "error: 2 of 4 rows cannot be used:\n"
        "  train.jsonl:2: `completion` is missing\n"
        "  train.jsonl:4: `prompt` is not text: 3\n"
        "  fix: write `prompt` as a string"
    )


def test_one_bad_row_is_quoted(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "a" oops}\n')

    assert refused(tmp_path, tokenizer) == (
        'error: not JSON: Expecting \',\' delimiter\n  --> train.jsonl:2:14\n     | {"text": "a" oops}\n'
        "  fix: write one JSON object a line; `data.bad_rows: skip` leaves such rows out"
    )


def test_many_bad_rows_are_counted_in_a_dozen_lines(tmp_path, tokenizer):
    write(tmp_path, PAIR, *[{"prompt": 3, "completion": "that"}] * 1000)

    message = refused(tmp_path, tokenizer)

    assert message.startswith("error: 1,000 of 1,001 rows cannot be used:\n  train.jsonl:2: ")
    assert len(message.splitlines()) == 12


def test_rows_that_the_template_refuses_are_named_by_line(tmp_path):
    talk = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    write(tmp_path, {"messages": talk}, {"messages": talk, "system": "be brief"})

    assert refused(tmp_path, tiny_tokenizer(GEMMA)) == (
        "error: the chat template refuses it: no system role\n  --> train.jsonl:2"
    )


def test_the_first_row_does_not_decide_the_format_alone(tmp_path, tokenizer):
    write(tmp_path, {"prompt": "what"}, PAIR, PAIR)

    assert refused(tmp_path, tokenizer) == "error: `completion` is missing\n  --> train.jsonl:1"


def test_a_row_of_another_format_than_most_is_named_by_line(tmp_path, tokenizer):
    write(tmp_path, PAIR, PAIR, {"text": "the cat"})

    assert refused(tmp_path, tokenizer) == "error: `prompt` is missing\n  --> train.jsonl:3"


def test_columns_that_fit_no_format_name_the_formats(tmp_path, tokenizer):
    write(tmp_path, {"question": "what", "ans\x1bwer": "that"})

    assert refused(tmp_path, tokenizer) == (
        "error: the columns `question`, `ans\\x1bwer` fit no format\n"
        "  --> train.jsonl\n"
        "  fix: set `data.columns` or `data.template`; the formats are tokens (input_ids), preference (chosen + rejected), messages (messages), sharegpt (conversations), alpaca (instruction + output), "
        "completion (prompt + completion|response|output), text (text)"
    )


MAPPED = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize("own", [False, True], ids=["for all", "of the source"])
def test_columns_are_read_by_the_names_that_the_recipe_gives_them(tmp_path, tokenizer, own):
    write(tmp_path, PAIR, name="ours.jsonl")
    write(tmp_path, {"question": "what", "answer": " the cat", "text": "no", "completion": "no"})
    expected, _ = load(tmp_path, tokenizer, sources="ours.jsonl")

    source = Source(source="train.jsonl", columns=MAPPED) if own else "train.jsonl"
    [example], report = load(tmp_path, tokenizer, sources=[source], columns={} if own else MAPPED)

    assert example.input_ids == expected[0].input_ids
    assert report.formats == {"train.jsonl": "completion"}


def test_a_column_that_the_rows_do_not_have_names_the_nearest_or_all(tmp_path, tokenizer):
    write(tmp_path, {"question": "what", "text": "the cat"})

    told = refused(tmp_path, tokenizer, columns={"prompt": "qestion", "completion": "zzz"})

    assert told == (
        "error: `data.columns` takes `prompt` from `qestion`, a column that the rows do not have\n"
        "  --> train.jsonl\n"
        "  fix: write `question`\n\n"
        "error: `data.columns` takes `completion` from `zzz`, a column that the rows do not have\n"
        "  --> train.jsonl\n"
        "  fix: their columns are `question`, `text`"
    )


def test_a_name_that_no_format_reads_is_a_mistake_of_the_recipe(tmp_path, tokenizer):
    write(tmp_path, {"question": "what"})

    with pytest.raises(RecipeError) as error:
        load(tmp_path, tokenizer, columns={"promt": "question"})

    assert str(error.value) == (
        "error: `data.columns` names `promt`, a column that no format reads\n  fix: write `prompt`"
    )


def test_a_template_reads_columns_in_place_of_a_format(tmp_path, tokenizer):
    write(tmp_path, {"q": "what", "answer": "the cat"}, name="a.jsonl")
    write(tmp_path, PAIR, name="b.jsonl")

    [templated, own], report = load(
        tmp_path,
        tokenizer,
        sources=["a.jsonl", Source(source="b.jsonl", format="completion", columns={})],
        template="Q: {question} A:[[ {answer}]]",
        columns={"question": "q"},
    )

    assert tokenizer.decode(templated.input_ids) == "Q: what A: the cat<|im_end|>"
    assert tokenizer.decode(templated.input_ids[templated.prompt_length :]) == " the cat<|im_end|>"
    assert tokenizer.decode(own.input_ids) == "what the cat<|im_end|>"
    assert report.formats == {"a.jsonl": "template", "b.jsonl": "completion"}


def test_a_field_of_a_template_that_no_row_has_is_told_once(tmp_path, tokenizer):
    write(tmp_path, *[{"question": "what", "answer": "that"}] * 3)

    assert refused(tmp_path, tokenizer, template="{qestion} [[{zzz}]]") == (
        "error: `data.template` names `qestion`, a column that the rows do not have\n"
        "  --> train.jsonl\n"
        "  fix: write `question`\n\n"
        "error: `data.template` names `zzz`, a column that the rows do not have\n"
        "  --> train.jsonl\n"
        "  fix: their columns are `question`, `answer`"
    )


def test_bad_rows_are_skipped_counted_and_named(tmp_path, tokenizer, caplog):
    write(tmp_path, *[PAIR] * 238, {"prompt": "what"})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("oops\n" * 11)

    with caplog.at_level(logging.WARNING, "lora_cli"):
        examples, report = load(tmp_path, tokenizer, bad_rows="skip")

    assert len(examples) == report.used == 238
    assert report.dropped == {"unusable": 12}
    [message] = caplog.messages
    assert message.startswith("12 of 250 rows cannot be used and are left out:\n  train.jsonl:240:1: not JSON: ")
    assert len(message.splitlines()) == 11


def test_rows_that_the_template_refuses_can_be_skipped(tmp_path):
    talk = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    write(tmp_path, *[{"messages": talk}] * 19, {"messages": talk, "system": "be brief"})

    examples, report = load(tmp_path, tiny_tokenizer(GEMMA), bad_rows="skip")

    assert (len(examples), report.dropped) == (19, {"unusable": 1})


def test_more_bad_rows_than_may_be_skipped_are_an_error(tmp_path, tokenizer):
    write(tmp_path, *[PAIR] * 18, *[{"prompt": "what"}] * 2)

    assert refused(tmp_path, tokenizer, bad_rows="skip") == (
        "error: 2 of 20 rows cannot be used, and `data.bad_rows: skip` skips at most 5%:\n"
        "  train.jsonl:19: `completion` is missing\n"
        "  train.jsonl:20: `completion` is missing"
    )


def test_bad_and_empty_rows_count_together(tmp_path, tokenizer):
    write(tmp_path, *[PAIR] * 38, {"prompt": "what"}, *[{**PAIR, "completion": ""}] * 2)

    assert refused(tmp_path, tokenizer, bad_rows="skip") == (
        "error: 1 of 41 rows cannot be used:\n"
        "  train.jsonl:39: `completion` is missing\n"
        "  fix: put them right, or take the rows out\n\n"
        "error: 2 of 41 rows have an empty answer:\n"
        "  train.jsonl:40: `completion` is empty\n"
        "  train.jsonl:41: `completion` is empty\n"
        "  fix: fill the answers in, or take the rows out"
    )


def test_a_format_that_is_named_is_not_guessed(tmp_path, tokenizer):
    write(tmp_path, {**PAIR, "text": "the mat"})

    [example], report = load(tmp_path, tokenizer, format="text")

    assert tokenizer.decode(example.input_ids) == "the mat<|im_end|>"
    assert report.formats == {"train.jsonl": "text"}


def test_a_file_without_rows_is_an_error(tmp_path, tokenizer):
    write(tmp_path)

    assert refused(tmp_path, tokenizer) == "error: `train.jsonl` has no rows"


def test_many_answers_lost_to_max_length_are_an_error_that_names_the_measured_lengths(tmp_path, tokenizer):
    write(tmp_path, *[PAIR] * 18, *[{"prompt": "what is the answer to that question", "completion": " the cat"}] * 2)
    prompt = len(tokenizer("what is the answer to that question")["input_ids"])

    assert refused(tmp_path, tokenizer, max_length=prompt) == (
        f"error: 2 of 20 rows lose their whole answer to `data.max_length: {prompt}`\n"
        f"     | prompts have 1 tokens (p50), {prompt} (p95), {prompt} (longest)\n"
        f"  fix: set `data.max_length: {prompt + 3}`, which keeps 95 % of the rows whole, or shorten the prompts"
    )


def test_few_answers_lost_to_max_length_are_left_out_and_counted(tmp_path, tokenizer):
    write(tmp_path, *[PAIR] * 19, {"prompt": "what is the answer to that question", "completion": " the cat"})

    examples, report = load(tmp_path, tokenizer, max_length=6)

    assert report.dropped == {"no answer within max_length": 1}
    assert len(examples) == 19


def test_many_empty_answers_are_an_error(tmp_path, tokenizer):
    write(tmp_path, PAIR, {**PAIR, "completion": ""})

    assert refused(tmp_path, tokenizer) == (
        "error: 1 of 2 rows have an empty answer:\n"
        "  train.jsonl:2: `completion` is empty\n"
        "  fix: fill the answers in, or take the rows out"
    )


def test_sources_stand_one_behind_the_other_each_in_its_own_format(tmp_path, tokenizer):
    write(tmp_path, PAIR, name="a.jsonl")
    write(tmp_path, {"text": "the mat"}, {"text": "the cat"}, name="b.jsonl")
    done = []

    examples, report = load(tmp_path, tokenizer, sources=["a.jsonl", "b.jsonl"], progress=done.append)

    assert [str(example.row) for example in examples] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert report.formats == {"a.jsonl": "completion", "b.jsonl": "text"}
    assert [(at.source, at.rows) for at in done] == [("a.jsonl", 1), ("b.jsonl", 3)]
    assert 0 < done[0].share < done[1].share == 1
    assert done[-1].tokens == report.tokens


def test_a_conversation_of_several_examples_is_one_row(tmp_path):
    turns = [{"role": role, "content": "yes"} for role in ("user", "assistant") * 2]
    write(tmp_path, {"messages": turns})

    examples, report = load(tmp_path, tiny_tokenizer(THINKING))

    assert (report.rows, report.used, report.examples) == (1, 1, 2)
    assert [str(example.row) for example in examples] == ["train.jsonl:1"] * 2
    assert "2 examples, for the chat template renders earlier turns anew" in report.summary()


def test_the_jargon_rows_are_all_used(tokenizer):
    examples, report = load(JARGON, tokenizer, sources="jargon.jsonl", max_length=4096)

    assert report.formats == {"jargon.jsonl": "alpaca"}
    assert len(examples) == report.used == report.rows == (JARGON / "jargon.jsonl").read_bytes().count(b"\n")
    assert (report.dropped, report.cut_rows) == ({}, 0)


def test_the_fingerprint_is_of_tokens_weights_and_order():
    a, b = Example([1, 2], [0.0, 1.0], RowId("a", 1)), Example([3], [0.0], RowId("a", 2))
    others = [
        [b, a],
        [a],
        [Example([1, 2], [0.0, 0.5], a.row), b],
        [Example([1], [0.0], a.row), Example([2, 3], [1.0, 0.0], b.row)],
    ]

    assert fingerprint([a, b]) == fingerprint([Example([1, 2], [0.0, 1.0], RowId("b", 9)), b])
    assert len({fingerprint(examples) for examples in [[a, b], *others]}) == 5


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.5, 0.999])
def test_a_split_covers_all_rows_and_no_row_twice_in_file_order(share):
    examples = numbered(100, each=2)

    train, held_out = split(examples, share, seed=3)

    assert sorted(chain(train, held_out), key=examples.index) == examples
    assert not {example.row for example in train} & {example.row for example in held_out}
    assert train == sorted(train, key=examples.index)
    assert held_out == sorted(held_out, key=examples.index)
    assert len(held_out) // 2 == min(max(1, round(share * 50)), 49)


def test_a_split_is_a_function_of_the_seed():
    examples = numbered(50)

    assert split(examples, 0.2, seed=1) == split(examples, 0.2, seed=1)
    assert split(examples, 0.2, seed=1) != split(examples, 0.2, seed=2)


def test_one_row_cannot_be_split():
    with pytest.raises(DataError, match="1 usable row cannot be split"):
        split(numbered(2, each=2), 0.5, seed=1)


def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    assert sorted(order(1, 0, 100)) == list(range(100))
    assert order(1, 0, 100) == order(1, 0, 100)
    assert len({tuple(order(seed, epoch, 100)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(
    ("given", "expected", "count"),
    [
        ({"epochs": 3, "max_steps": None, "global_batch_size": 4}, Plan(30, 4), 8),
        ({"epochs": 0.5, "max_steps": None, "global_batch_size": 4}, Plan(5, 4), 2),
        ({"epochs": 0.001, "max_steps": None, "global_batch_size": 4}, Plan(1, 4), 1),
        ({"epochs": 3, "max_steps": 7, "global_batch_size": 4}, Plan(28, 4), 7),
    ],
)
def test_a_plan_takes_epochs_or_steps(given, expected, count):
    assert plan(10, **given) == expected
    assert expected.steps == count


def test_steps_take_the_epochs_one_behind_the_other_without_gaps():
    examples = numbered(10)

    taken = list(steps(examples, Plan(25, 4), seed=5))

    sequence = chain.from_iterable(order(5, epoch, 10) for epoch in range(3))
    assert [k for k, _ in taken] == list(range(7))
    assert [len(found) for _, found in taken] == [4, 4, 4, 4, 4, 4, 1]
    assert [example.row.number for _, found in taken for example in found] == list(islice(sequence, 25))


@pytest.mark.parametrize("start", range(9))
def test_resuming_is_skipping(start):
    examples, whole = numbered(10), Plan(30, 4)

    assert list(steps(examples, whole, seed=5, start=start)) == list(steps(examples, whole, seed=5))[start:]


# --- mixing


def mixture(**repeats: tuple[int, float]) -> list[Example]:
    """Source -> (rows, how often an epoch takes each)."""
    return [
        Example([1, number], [0.0, 1.0], RowId(source, number), repeats=times)
        for source, (count, times) in repeats.items()
        for number in range(count)
    ]


def epochs(examples: list[Example], count: int, seed: int = 3) -> list[list[RowId]]:
    length = epoch_length(examples)
    [(_, taken)] = steps(examples, Plan(length * count, length * count), seed=seed)
    return [[example.row for example in taken[e * length : (e + 1) * length]] for e in range(count)]


def test_a_weight_is_how_often_an_epoch_takes_each_row():
    examples = mixture(a=(10, 1), b=(6, 2), c=(10, 0.3), d=(4, 1.5))

    assert epoch_length(examples) == 10 + 12 + 3 + 6
    for epoch in epochs(examples, 3):
        assert Counter(row.source for row in epoch) == {"a": 10, "b": 12, "c": 3, "d": 6}
        counts = Counter(epoch)
        assert {counts[RowId("a", n)] for n in range(10)} == {1}
        assert {counts[RowId("b", n)] for n in range(6)} == {2}


def test_over_epochs_every_row_of_a_source_comes_equally_often():
    examples = mixture(a=(10, 0.3), b=(4, 1.5))

    counts = Counter(chain.from_iterable(epochs(examples, 20)))

    assert {counts[RowId("a", n)] for n in range(10)} == {6}
    assert {counts[RowId("b", n)] for n in range(4)} == {30}


def test_sources_are_shuffled_among_each_other():
    [epoch] = epochs(mixture(a=(50, 1), b=(25, 2)), 1)

    assert 10 < [row.source for row in epoch[:50]].count("a") < 40


def test_a_mix_is_a_function_of_seed_and_epoch():
    examples = mixture(a=(10, 0.5), b=(10, 2))

    assert epochs(examples, 3) == epochs(examples, 3)
    assert epochs(examples, 2)[1] == epochs(examples, 3)[1]
    assert len({str(epoch) for seed in range(3) for epoch in epochs(examples, 3, seed)}) == 9


@pytest.mark.parametrize("start", range(0, 12, 3))
def test_resuming_a_mix_is_skipping(start):
    examples, whole = mixture(a=(7, 0.5), b=(5, 2), c=(3, 1)), Plan(60, 4)

    assert list(steps(examples, whole, seed=5, start=start)) == list(steps(examples, whole, seed=5))[start:]


def test_sources_that_are_not_mixed_come_in_the_order_of_one():
    examples = mixture(a=(7, 1), b=(5, 1))

    assert epoch_length(examples) == 12
    [epoch] = epochs(examples, 1)
    assert epoch == [examples[place].row for place in order(3, 0, 12)]


def test_a_mix_is_part_of_the_fingerprint():
    examples = mixture(a=(3, 1), b=(3, 1))

    assert fingerprint(examples) == fingerprint([replace(e, row=RowId("c", 1)) for e in examples])
    assert fingerprint(examples) != fingerprint(mixture(a=(3, 1), b=(3, 2)))


def test_weights_become_repeats_and_the_report_says_what_each_source_gives(tmp_path, tokenizer):
    write(tmp_path, *[PAIR] * 20, name="a.jsonl")
    write(tmp_path, *[{"text": "the cat sat"}] * 38, {"text": ""}, name="b.jsonl")

    examples, report = load(tmp_path, tokenizer, sources=["a.jsonl", Source(source="b.jsonl", weight=0.5)])

    of_a, of_b = ([e for e in examples if e.row.source == name] for name in ("a.jsonl", "b.jsonl"))
    assert ({e.repeats for e in of_a}, {e.repeats for e in of_b}) == ({1.0}, {0.5})
    assert list(report.sources) == ["a.jsonl", "b.jsonl"]
    assert report.sources["b.jsonl"] == SourceReport(
        rows=39,
        examples=38,
        tokens=sum(len(e.input_ids) for e in of_b),
        trained_tokens=sum(e.items for e in of_b),
        share=19 / 39,
    )
    assert report.sources["a.jsonl"].share == 20 / 39


@pytest.mark.parametrize("shares", [(0.25, 0.75), (0.5, 0.495)])
def test_shares_are_those_of_an_epoch_as_long_as_all_rows(tmp_path, tokenizer, shares):
    for name, count in (("a.jsonl", 30), ("b.jsonl", 10)):
        write(tmp_path, *[PAIR] * count, name=name)

    examples, report = load(
        tmp_path,
        tokenizer,
        sources=[Source(source=f"{name}.jsonl", share=s) for name, s in zip("ab", shares, strict=True)],
    )

    assert epoch_length(examples) == 40
    expected = [share / sum(shares) for share in shares]
    assert [found.share for found in report.sources.values()] == pytest.approx(expected, abs=0.02)


def test_a_split_keeps_the_mix(tmp_path, tokenizer):
    examples = mixture(a=(50, 1), b=(50, 2))

    train, _ = split(examples, 0.1, seed=1)

    assert {(example.row.source, example.repeats) for example in train} == {("a", 1), ("b", 2)}
