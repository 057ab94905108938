"""The mutants of mutate.py still stand in the code; whether the tests notice them, `python tests/mutate.py` says."""

import mutate
import pytest


@pytest.mark.parametrize("place, code, becomes", mutate.MUTANTS)
def test_mutant_can_be_made(place, code, becomes):
    assert mutate.mutated(place, code, becomes) != (mutate.ROOT / place.partition(":")[0]).read_text()


def test_equivalent_mutants_are_mutants():
    assert mutate.EQUIVALENT.keys() <= {(place, becomes) for place, _, becomes in mutate.MUTANTS}


SOURCE = """
class Reader:
    def read(self):
        return first(
            self.a,
            "one",
        ), other()


def read():
    return first(self.a, "one")
"""


def test_an_anchor_survives_formatting():
    place, code = "file.py:Reader.read", "first(self.a, 'one')"
    start, stop = mutate.span(SOURCE, place, code)
    assert SOURCE[start:stop].startswith("first(") and SOURCE[stop:].startswith(", other()")
    for wrong, times in (("irst(self.a", 0), ("first(self.b", 0), ("self", 2)):
        with pytest.raises(ValueError, match=f"{times} times"):
            mutate.span(SOURCE, place, wrong)
    with pytest.raises(ValueError, match=r"no file\.py:Reader\.write"):
        mutate.span(SOURCE, "file.py:Reader.write", code)
