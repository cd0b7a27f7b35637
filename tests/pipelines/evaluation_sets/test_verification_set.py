import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.evaluation_sets.verification_set import (
    draw_pairs,
    read_verification_set,
    write_verification_set,
)
from scf_fast.pipelines.sources.base import EncodedImages

IMAGES = [b"\xff\xd8 one", b"", b"\x00two\x80", b"three"]
SAME = [True, False]


def check(path):
    pairs = read_verification_set(path)
    assert [pairs.source.encoded(i).tobytes() for i in range(len(pairs.source))] == IMAGES
    assert pairs.same.tolist() == SAME and pairs.same.dtype == bool


def test_written_set_is_a_plain_pickle_and_reads_back(tmp_path):
    write_verification_set(tmp_path / "lfw.bin", IMAGES, np.array(SAME))
    assert pickle.loads((tmp_path / "lfw.bin").read_bytes()) == (IMAGES, SAME)
    check(tmp_path / "lfw.bin")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "content",
    [
        (IMAGES, SAME),
        [tuple(IMAGES), tuple(SAME)],
        ([np.frombuffer(image, dtype=np.uint8) for image in IMAGES], np.array(SAME)),
        ([bytearray(image) for image in IMAGES], list(np.array(SAME))),
    ],
    ids=["lists", "tuples", "arrays", "scalars"],
)
def test_every_protocol_and_plain_type(tmp_path, protocol, content):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content, protocol))
    check(tmp_path / "a.bin")


def test_python_2_strings(tmp_path):
    """A protocol-2 pickle by Python 2 holds images as 8-bit strings: opcodes SHORT_BINSTRING (U) and NEWTRUE /
    NEWFALSE.
    """
    strings = b"".join(b"U" + bytes([len(image)]) + image for image in IMAGES)
    (tmp_path / "a.bin").write_bytes(b"\x80\x02](" + strings + b"e](\x88\x89e\x86.")
    check(tmp_path / "a.bin")


class _Hostile:
    def __reduce__(self):
        return os.mkdir, ("must-not-appear",)


@pytest.mark.parametrize("content", [_Hostile(), ([_Hostile()] * 4, SAME), (np.array([_Hostile()] * 4), SAME)])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError,
        match=r"a\.bin must be a pickle of \(encoded images, is-same flags\): it (refers to posix\.mkdir|holds an "
        r"array of 'O8')",
    ):
        read_verification_set(tmp_path / "a.bin")
    assert not (tmp_path / "must-not-appear").exists()


def _dtype(code):
    return b"cnumpy\ndtype\n\x8c" + bytes([len(code)]) + code + b"\x85R"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        # ndarray((1,), "O", b"AAAAAAAA") is an object at the address that the file names
        (b"cnumpy\nndarray\nK\x01\x85" + _dtype(b"O") + b"C\x08AAAAAAAA\x87R", "it holds an array of 'O'"),
        (b"cnumpy.core.multiarray\nscalar\n" + _dtype(b"O") + b"C\x08AAAAAAAA\x86R", "it holds an array of 'O'"),
        (_dtype(b"i4,O"), "it holds an array of 'i4,O'"),
        (b"cnumpy\ndtype\n]\x8c\x01a\x8c\x01O\x86a\x85R", "unhashable"),
        (b"cbuiltins\nbytes\n\x8a\x05\0\0\0\0\x10\x85R", "it makes bytes of a int"),  # 64 GB
        (b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R", "it makes bytes of a int"),
        (b"\x96\0\0\0\0\x10\0\0\0", "flags"),  # as an opcode
        (b"]r\xff\xff\xff\x7f", "not enough values"),  # a place in the memo that would take 16 GB to get to
        (b"ccopyreg\n__newobj__\n", "it refers to copyreg.__newobj__"),
        (b"c_codecs\nencode\nN}\x8c\x0c__defaults__)s\x86b", "it sets the state of a function"),
        (b"]" + b"2" * 40 + b"\x86" * 40, "flags"),
        (b"](\x43\x01a\x43\x01be](]2\x86]2\x86e\x86", "its flags are no list of booleans"),
    ],
)
def test_pickles_that_would_read_or_fill_memory(tmp_path, content, reason):
    (tmp_path / "a.bin").write_bytes(b"\x80\x04" + content + b".")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            read_verification_set(tmp_path / "a.bin")
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()


@given(
    st.sampled_from(range(pickle.HIGHEST_PROTOCOL + 1)),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 999), st.binary(max_size=9)), max_size=4),
)
def test_any_pickle_is_a_set_or_a_value_error(tmp_path_factory, protocol, kind, changes):
    """Opcodes written over those of real files."""
    arrays = [np.frombuffer(image, np.uint8) for image in IMAGES]
    whole = bytearray(
        pickle.dumps(
            [
                (IMAGES, SAME),
                (arrays, np.array(SAME)),
                ([bytearray(image) for image in IMAGES], list(np.array(SAME))),
                (arrays, np.int64([1, 0])),
            ][kind],
            protocol,
        )
    )
    for place, new in changes:
        whole[place % len(whole) : place % len(whole) + len(new)] = new
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    path.write_bytes(whole)
    try:
        pairs = read_verification_set(path)
    except ValueError as error:
        assert "a.bin" in str(error) and changes
    else:
        assert len(pairs.source) == 2 * len(pairs.same) and all(
            pairs.source.encoded(i).dtype == np.uint8 for i in range(len(pairs.source))
        )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps((IMAGES, SAME))[:-9],
        pickle.dumps(3),
        pickle.dumps((IMAGES, SAME, 1)),
        pickle.dumps(([1, 2], [True])),
        pickle.dumps((IMAGES, ["a", "b"])),
        pickle.dumps((IMAGES, True)),
    ],
)
def test_anything_else_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.bin must be a pickle of .*; download it again"):
        read_verification_set(tmp_path / "a.bin")


def test_counts(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps((IMAGES[:3], SAME)))
    with pytest.raises(ValueError, match=r"a\.bin: P flags need 2P images and P > 0, got 2 flags and 3 images"):
        read_verification_set(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="got 2 flags and 0 images"):
        write_verification_set(tmp_path / "b.bin", [], SAME)
    assert not (tmp_path / "b.bin").exists()


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the verification set .*a\.bin: No such file"):
        read_verification_set(tmp_path / "a.bin")


def labeled(*sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(0).permutation(len(labels))
    return EncodedImages([b"%d" % i for i in range(len(labels))], labels[order])


def test_pairs_from_labeled_images():
    source = labeled(*[3] * 40, *[1] * 20, 30)
    pairs = draw_pairs(source, 80, folds=4, seed=1)
    images = np.array([int(pairs.source.encoded(i).tobytes()) for i in range(160)]).reshape(80, 2)
    labels = source.labels[images]
    np.testing.assert_array_equal(labels[:, 0] == labels[:, 1], pairs.same)
    assert pairs.same.tolist() == ([True] * 10 + [False] * 10) * 4 and (images[:, 0] != images[:, 1]).all()
    assert (pairs.source.labels == -1).all()
    genuine = [frozenset(pair) for pair in images[pairs.same].tolist()]
    assert len(set(genuine)) == 40
    folds = [set(labels[start : start + 20].ravel().tolist()) for start in range(0, 80, 20)]
    assert all(not a & b for i, a in enumerate(folds) for b in folds[:i])
    assert max(np.bincount(labels[pairs.same][:, 0])) <= 2  # every identity has its turn before one has a second
    again, other = draw_pairs(source, 80, folds=4, seed=1), draw_pairs(source, 80, folds=4, seed=2)
    np.testing.assert_array_equal(again.source._indices, pairs.source._indices)
    assert not np.array_equal(other.source._indices, pairs.source._indices)


def test_all_pairs_can_be_drawn():
    pairs = draw_pairs(labeled(4, 3), 18, folds=1)
    images = pairs.source._indices.reshape(-1, 2)[pairs.same]
    assert len({frozenset(pair) for pair in images.tolist()}) == 9


def test_too_few_images_for_the_pairs():
    with pytest.raises(
        ValueError,
        match="a fold needs two identities and 10 pairs of images of one person, but one of 1 folds has 2 identities "
        "and 9",
    ):
        draw_pairs(labeled(4, 3), 20, folds=1)
    with pytest.raises(ValueError, match="a fold needs two identities"):
        draw_pairs(labeled(9), 4, folds=1)
    with pytest.raises(ValueError, match="multiple of twice the 10 folds, got 30"):
        draw_pairs(labeled(4, 3), 30)
