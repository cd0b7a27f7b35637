import os
import pickle

import numpy as np
import pytest

from pipelines.verification_set import read_verification_set, write_verification_set

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
@pytest.mark.parametrize("content", [
    (IMAGES, SAME),
    [tuple(IMAGES), tuple(SAME)],
    ([np.frombuffer(image, dtype=np.uint8) for image in IMAGES], np.array(SAME)),
    ([bytearray(image) for image in IMAGES], list(np.array(SAME))),
], ids=["lists", "tuples", "arrays", "scalars"])
def test_every_protocol_and_plain_type(tmp_path, protocol, content):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content, protocol))
    check(tmp_path / "a.bin")


def test_python_2_strings(tmp_path):
    """A protocol-2 pickle by Python 2 holds images as 8-bit strings: opcodes SHORT_BINSTRING (U) and NEWTRUE / NEWFALSE."""
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
    with pytest.raises(ValueError, match=r"a\.bin must be a pickle of \(encoded images, is-same flags\): it refers to posix\.mkdir"):
        read_verification_set(tmp_path / "a.bin")
    assert not (tmp_path / "must-not-appear").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps((IMAGES, SAME))[:-9], pickle.dumps(3), pickle.dumps((IMAGES, SAME, 1)),
                                     pickle.dumps(([1, 2], [True])), pickle.dumps((IMAGES, ["a", "b"])), pickle.dumps((IMAGES, True))])
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
