"""The lists of mutations and of quick tests cannot rot: each mutation is still of one place of the product and of tests
that are there. Whether they die is tried by hand: python tests/mutations.py
"""

import re

import pytest

from mutations import MUTATIONS, ROOT
from quick import QUICK


def test_there_are_forty_and_each_is_another():
    assert len(MUTATIONS) >= 40
    assert len({(one.file, one.old, one.new) for one in MUTATIONS}) == len({one.fault for one in MUTATIONS})
    assert all(one.old != one.new for one in MUTATIONS)


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1))
def test_a_mutation_is_of_one_place_and_of_tests_that_are_there(number):
    mutation = MUTATIONS[number - 1]
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation.file
    file, *chosen = mutation.tests.split(" -k ")
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in names if chosen == [] or chosen[0] in name], mutation.tests


@pytest.mark.parametrize("file", QUICK)
def test_what_is_named_as_quick_is_there(file):
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), re.MULTILINE)
    for beginning in QUICK[file]:
        assert any(name.startswith(f"test_{beginning}") for name in names), beginning
