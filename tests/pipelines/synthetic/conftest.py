"""Faces of average traits, from which single traits are changed."""

import dataclasses

import pytest


def _ranges(cls):
    return {f.name: f.metadata["range"] for f in dataclasses.fields(cls) if "range" in f.metadata}


@pytest.fixture(scope="session")
def trait_ranges():
    """``trait_ranges(cls)``: name -> (low, high) of the traits that are drawn."""
    return _ranges


@pytest.fixture(scope="session")
def average():
    """``average(cls, **given)``: every trait in the middle of its range, unless given."""

    def make(cls, **given):
        return cls(**{**{name: (low + high) / 2 for name, (low, high) in _ranges(cls).items()}, **given})

    return make
