import random
from hashlib import sha256

import numpy as np
import pytest

from lora_cli.data import examples as module
from lora_cli.data.examples import Examples, Store, Writer, fingerprint, flat, mapped
from lora_cli.data.types import Example, RowId


def some(count=40, seed=0, repeats=1.0, labelled=False):
    """Examples of all lengths from 0 on, with weights of all kinds."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        length = generator.randrange(12)
        weights = [generator.choice([0.0, 0.0, 1.0, 1.0, 0.1]) for _ in range(length)]
        row = RowId(generator.choice(["a.jsonl", "b.parquet"]), number // 2, is_line=False)
        ids = [generator.randrange(2**32) for _ in range(length)]
        label = generator.choice([None, 0, 3]) if labelled else None
        segments = (0,) * (length // 2) + (1,) * (length - length // 2) if label and length else None
        cut = generator.randrange(3)
        found.append(Example(ids, weights, row, cut=cut, repeats=repeats, label=label, segments=segments))
    return found


@pytest.fixture(params=[1 << 20, 7], ids=["one block", "many blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
def test_flat_examples_are_the_examples():
    listed = some()

    found = Examples.of(listed)

    assert list(found) == listed
    assert [found[place] for place in range(-40, 40)] == listed + listed
    assert found[3:30:4] == listed[3:30:4]
    assert Examples.of(found) is found
    assert found.lengths.tolist() == [len(example.input_ids) for example in listed]
    assert found.trained_tokens == sum(weight > 0 for example in listed for weight in example.weights)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labelled"])
def test_examples_of_several_stores_in_any_order_are_those_of_the_lists(labelled):
    one, two = some(20), some(30, seed=1, repeats=0.5, labelled=labelled)
    places = random.Random(2).sample(range(50), 35)

    found = (Examples.of(one) + Examples.of(two)).take(np.array(places))

    listed = [(one + two)[place] for place in places]
    assert found == listed
    assert fingerprint(found) == fingerprint(listed) == by_hand(listed)
    assert found.column("row").tolist() == [example.row.number for example in listed]
    assert found.labels.tolist() == [-1 if example.label is None else example.label for example in listed]
    assert found.repeats.tolist() == [example.repeats for example in listed]
    assert [found.origins[origin].source for origin in found.column("origin")] == [e.row.source for e in listed]
    keys = dict(zip(found.row_keys.tolist(), [example.row for example in listed], strict=True))
    assert len(keys) == len(set(keys.values())) == len({example.row for example in listed})


@pytest.mark.usefixtures("_blocks")
def test_blocks_hold_every_token_with_its_weight_and_its_place():
    listed = some()
    seen = []

    for block in Examples.of(listed).blocks():
        places = zip(block.examples.tolist(), block.within.tolist(), strict=True)
        seen += [(block.place + example, place) for example, place in places]
        for number, (start, length) in enumerate(zip(block.starts, block.lengths, strict=True)):
            example = listed[block.place + number]
            assert block.tokens[start : start + length].tolist() == example.input_ids
            assert block.weights[start : start + length].tolist() == example.weights

    assert seen == [(n, place) for n, example in enumerate(listed) for place in range(len(example.input_ids))]


def test_examples_are_found_by_row_and_by_source():
    listed = some()

    found = Examples.of(listed)

    wanted = [listed[3].row, listed[20].row]
    assert found.of_rows(wanted) == [example for example in listed if example.row in wanted]
    assert found.of_source("a.jsonl") == [example for example in listed if example.row.source == "a.jsonl"]
    assert not found.of_source("c.jsonl")


@pytest.fixture
def written(tmp_path):
    """(folder, manifest, examples) of arrays that were written in several parts."""
    listed = some()
    origins = Examples.of(listed).stores[0].origins
    numbers = Examples.of(listed).column("origin").tolist()
    with Writer(tmp_path) as writer:
        for start in range(0, 40, 9):
            writer.append(flat(listed[start : start + 9], numbers[start : start + 9]))
    return tmp_path, writer.manifest, listed, origins


def test_mapped_examples_are_those_that_were_written_also_once_the_files_are_gone(written):
    folder, manifest, listed, origins = written

    found = Examples([Store(mapped(folder, manifest), origins)])
    for file in folder.iterdir():
        file.unlink()

    assert found == listed


@pytest.mark.parametrize("name", module.FILES)
def test_one_wrong_byte_or_a_missing_one_is_found(written, name):
    folder, manifest, _, _ = written
    content = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=name):
        mapped(folder, manifest)

    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)

    with pytest.raises(ValueError, match="damaged"):
        mapped(folder, manifest)


def by_hand(examples):
    """The fingerprint as its words define it."""
    digest = sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(np.asarray(example.input_ids, "<i8").tobytes() + np.asarray(example.weights, "<f8").tobytes())
        if example.repeats != 1:
            digest.update(np.float64(example.repeats).tobytes())
        if example.label is not None:
            digest.update(repr((example.label, example.segments)).encode())
    return digest.hexdigest()
