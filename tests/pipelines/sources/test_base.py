import numpy as np
import pytest

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import LARGE_FILE, ConcatenatedSources, EncodedImages, ImageFiles, SelectedImages


def test_encoded_images():
    source = EncodedImages([b"one", b"two"], labels=[4, 2])
    assert len(source) == 2 and source.encoded(1).tobytes() == b"two" and source.encoded(1).dtype == np.uint8
    assert source.num_classes == 5 and source.labels.dtype == np.int64 and source.name(1) == "image 1"


def test_without_labels():
    source = EncodedImages([b"one"])
    assert source.labels.tolist() == [-1] and source.num_classes == 0


def test_image_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    source = ImageFiles([tmp_path / "a.jpg", tmp_path / "missing.jpg"])
    assert source.encoded(0).tobytes() == b"one" and source.name(0) == str(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"cannot read image .*missing\.jpg: No such file"):
        source.encoded(1)


def test_labels_must_match():
    with pytest.raises(ValueError, match=r"labels must be \(2,\), one for each image, got \(3,\)"):
        EncodedImages([b"one", b"two"], labels=[0, 1, 2])


def test_concatenated_sources_have_identities_of_their_own():
    first, second, third = (
        EncodedImages([b"a", b"b"], labels=[1, 0]),
        EncodedImages([b"c"], labels=[0]),
        EncodedImages([b"d", b"e"], labels=[2, 2]),
    )
    third.broken = np.array([1])
    source = ConcatenatedSources([first, second, third])
    assert [source.encoded(i).tobytes() for i in range(5)] == [b"a", b"b", b"c", b"d", b"e"]
    assert source.labels.tolist() == [1, 0, 2, 5, 5] and source.num_classes == 6 and source.sizes == (2, 1, 2)
    assert source.name(3) == "image 0" and source.broken.tolist() == [4]
    assert ConcatenatedSources([EncodedImages([b"a"]), first]).labels.tolist() == [-1, 1, 0]


def test_will_need_reaches_the_right_source():
    class Asked(EncodedImages):
        def will_need(self, indices):
            self.asked = indices.tolist()

    sources = [Asked([b"a", b"b"], [0, 0]), Asked([b"c", b"d"], [0, 0])]
    ConcatenatedSources(sources).will_need(np.array([0, 2, 3]))
    assert [source.asked for source in sources] == [[0], [0, 1]]
    SelectedImages(sources[0], [1, 0]).will_need(np.array([0]))
    assert sources[0].asked == [1]


def test_many_images_at_once():
    class Unreadable(EncodedImages):
        def encoded(self, i):
            if i == 1:
                raise InputError
            return super().encoded(i)

    first, second = Unreadable([b"a", b"?", b"ccc"]), EncodedImages([b"dd", b"x" * (LARGE_FILE + 1), b""])
    whole = ConcatenatedSources([first, second])
    indices = np.array([3, 2, 1, 0, 2, 5, 4])
    for source, order in ((whole, indices), (SelectedImages(whole, indices, with_labels=False), np.arange(7))):
        data, starts, lengths = source.read(order)
        assert data.dtype == np.uint8
        assert [data[start : start + length].tobytes() for start, length in zip(starts, lengths)] == [
            b"dd",
            b"ccc",
            b"",
            b"a",
            b"ccc",
            b"",
            b"",
        ]
    assert [len(part) for part in whole.read(indices[:0])] == [0, 0, 0]


def test_selected_images():
    source = EncodedImages([b"a", b"b", b"c"], labels=[4, 1, 2])
    source.broken = np.array([2])
    some = SelectedImages(source, [2, 0])
    assert [some.encoded(i).tobytes() for i in range(2)] == [b"c", b"a"] and some.name(0) == "image 2"
    assert some.labels.tolist() == [2, 4] and some.num_classes == 5 and some.broken.tolist() == [0]
    assert SelectedImages(source, [1], with_labels=False).labels.tolist() == [-1]
