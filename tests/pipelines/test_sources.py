import numpy as np
import pytest

from pipelines.sources import EncodedImages, ImageFiles


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
