"""The planted faults fit the code and the tests: what `make mutants` runs, without running it."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


def test_there_are_many_faults_and_each_has_a_name_of_its_own():
    names = Counter(mutant.name for mutant in mutants.MUTANTS)

    assert len(names) >= 60
    assert max(names.values()) == 1


def test_the_text_of_each_fault_stands_in_the_code_once():
    assert mutants.stale(mutants.MUTANTS) == []


def test_a_fault_whose_text_is_gone_is_called_stale():
    gone = mutants.MUTANTS[0]._replace(text="no such line")

    assert mutants.stale([gone]) == [f"the fault `{gone.name}` is stale: its text stands 0 times in {gone.path}"]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_with_its_fault_the_code_still_parses(mutant):
    ast.parse((ROOT / mutant.path).read_text().replace(mutant.text, mutant.planted))


def test_the_tests_that_must_notice_are_there():
    for mutant in mutants.MUTANTS:
        for file, _, name in (test.partition("::") for test in mutant.selection):
            assert (ROOT / file).exists(), mutant.name
            assert not name or f"def {name}(" in (ROOT / file).read_text(), mutant.name
