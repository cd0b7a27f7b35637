import logging

import numpy as np
import pytest

from scf_fast.pipelines.errors import InputError, UnreadableError
from scf_fast.pipelines.loading.broken import LEFT_OUT, BrokenImages, OnBroken
from scf_fast.pipelines.sources.base import EncodedImages


def source_of(count, broken=()):
    source = EncodedImages([b"x"] * count)
    source.broken = np.array(broken, dtype=np.int64)
    return source


def loading(bad):
    def load(i):
        if i in bad:
            raise InputError(f"image {i} cannot be decoded: it is bad")
        return f"face {i}"

    return load


def test_the_next_good_image_takes_the_place(caplog):
    broken = BrokenImages(source_of(8, broken=[2]), OnBroken.REPLACE)
    tried = []
    load = loading({1, 6, 7})
    assert [broken.load(i, lambda j: tried.append(j) or load(j), None) for i in (0, 1, 2, 6, 1)] == [
        (0, "face 0"),
        (3, "face 3"),
        (3, "face 3"),
        (0, "face 0"),
        (3, "face 3"),
    ]
    assert tried == [0, 1, 3, 3, 6, 7, 0, 3]  # what is known to be broken is not tried again
    assert list(broken.found) == [1, 6, 7] and len(broken) == 4
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (
            logging.WARNING,
            f"broken image, the next one takes its place: image {i} cannot be decoded: it is bad ({n} so far)",
        )
        for n, i in enumerate((1, 6, 7), start=1)
    ]


def test_without_replacement_the_error_passes():
    broken = BrokenImages(source_of(3, broken=[1]), OnBroken.RAISE)
    assert broken.load(1, loading(()), None) == (1, "face 1")
    with pytest.raises(ValueError, match="image 2 cannot be decoded"):
        broken.load(2, loading({2}), None)


@pytest.mark.parametrize(("count", "tries"), [(3, 3), (1000, 100)])
def test_data_that_is_gone_ends_the_search(count, tries):
    tried = []

    def load(i):
        tried.append(i)
        raise InputError("the mount is gone")

    with pytest.raises(
        ValueError,
        match=rf"image 1 and the {tries - 1} images after it cannot be read or decoded: the mount is gone; check that",
    ):
        BrokenImages(source_of(count), OnBroken.REPLACE, log=False).load(1, load, None)
    assert len(tried) == tries


def test_what_others_found_counts_once(caplog):
    broken = BrokenImages(source_of(5), OnBroken.REPLACE)
    broken.add({1: "one", 2: "two"})
    broken.add({2: "two again"})
    assert len(broken) == 2 and broken.found == {1: "one", 2: "two"} and len(caplog.records) == 2
    assert broken.load(1, loading(()), None) == (3, "face 3")


def test_a_bug_is_not_a_broken_image():
    def load(i):
        raise ValueError("operands could not be broadcast together")

    broken = BrokenImages(source_of(3), OnBroken.REPLACE)
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        broken.load(0, load, None)
    assert not broken.found


def test_images_that_are_left_out_have_no_number(caplog):
    broken = BrokenImages(source_of(8, broken=[2]), OnBroken.LEAVE_OUT)
    assert [broken.load(i, loading({1, 6, 7}), "black") for i in (0, 1, 2, 6, 1)] == [
        (0, "face 0"),
        *[(LEFT_OUT, "black")] * 4,
    ]
    assert list(broken.found) == [1, 2, 6] and broken.found[2] == "image 2 is broken, as recorded before"
    assert [record.message for record in caplog.records] == [
        f"image left out: image {i} cannot be decoded: it is bad ({n} so far)" for n, i in ((1, 1), (3, 6))
    ]


def test_any_number_of_bad_images_is_left_out_but_data_that_is_gone_ends_it():
    broken = BrokenImages(source_of(400), OnBroken.LEAVE_OUT, log=False)
    for i in range(150):
        broken.load(i, loading(range(150)), None)

    def gone(i):
        raise UnreadableError("Input/output error")

    with pytest.raises(UnreadableError, match="Input/output error"):
        for i in range(150, 400):
            broken.load(i, gone if i != 200 else loading(()), None)  # one image that is there begins the count anew
    assert i == 300 and len(broken.found) == 150 + 50 + 99
