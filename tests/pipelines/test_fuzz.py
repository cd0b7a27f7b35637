"""Any bytes in an untrusted file are data or an InputError; ``bench.fuzz`` looks further, by hand."""

import contextlib
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.robustness import fuzz
from bench.robustness.fuzz import TARGETS
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.recordio import read_num_classes

EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 14),
        st.integers(0, 40),
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from(fuzz._NUMBERS).map(lambda number: number.to_bytes(8, "little")),
            st.integers(0, 10**400).map(lambda number: str(number).encode()),
        ),
    ),
    max_size=5,
)


@pytest.mark.parametrize("target", sorted({*TARGETS} - {"bin"}))  # that one is in test_verification_set
@settings(max_examples=60)
@given(number=st.integers(0, 7), edits=EDITS, length=st.integers(0, 1 << 12))
def test_any_bytes_are_data_or_an_input_error(target, number, edits, length):
    function, seeds = TARGETS[target]
    content = bytearray(seeds[number % len(seeds)])
    for place, removed, added in edits:
        place %= len(content) + 1
        content[place : place + removed] = added
    if length < len(content):
        del content[length:]
    with contextlib.suppress(InputError):
        function(bytes(content))


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_good(target):
    for seed in TARGETS[target][1]:
        TARGETS[target][0](seed)


def test_findings_and_coverage(tmp_path, monkeypatch):
    property_file = tmp_path / "property"

    def target(content):
        property_file.write_bytes(content)
        if read_num_classes(property_file) != 12:
            raise KeyError("planted")

    good, error = fuzz.run(target, b"12,112,112")
    assert isinstance(fuzz.run(target, b"13")[1], KeyError)
    bad, refused = fuzz.run(target, b"x")
    assert (
        error is None
        and refused is None
        and good
        and bad - good
        and any(code.co_name == "read_num_classes" for code, *_ in good)
    )
    monkeypatch.setattr(fuzz, "TIMEOUT", 0.05)
    assert isinstance(fuzz.run(lambda _: time.sleep(1), b"")[1], fuzz.Slow)
    monkeypatch.undo()

    monkeypatch.setitem(TARGETS, "planted", (target, [b"12,112,112"]))
    assert fuzz.fuzz("planted", 1.0, tmp_path / "out", seed=0) == 1
    (finding,) = (path for path in (tmp_path / "out").glob("planted-*") if not path.suffix)
    with pytest.raises(KeyError, match="planted"):
        target(finding.read_bytes())
    assert (
        "KeyError: 'planted'" in finding.with_suffix(".txt").read_text()
        and len(list((tmp_path / "out" / "planted").iterdir())) >= 2
    )
    assert not list((tmp_path / "out").glob("*.running"))


def test_mutations_differ_and_repeat():
    one, same = ([fuzz.mutate(b"abcdefgh" * 4, [b"XYZ"], random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert one == same and len(set(one)) > 150
