"""A small RecordIO data set, and the images of any."""

from typing import NamedTuple

import pytest

from scf_fast.pipelines.formats.recordio import RecordWriter, write_property


class SmallSet(NamedTuple):
    """Images of made-up bytes, and their labels."""

    images: list[bytes]
    labels: list[int]

    def write(self, folder, images=None, labels=None, num_classes=3):
        """Writes them, or others, with the records of identities that MS1M has too, and returns the folder."""
        images = self.images if images is None else images
        labels = self.labels if labels is None else labels
        folder.mkdir(exist_ok=True)
        with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
            writer.write_header_record(len(images), 1)
            for record_id, (image, label) in enumerate(zip(images, labels), start=1):
                writer.write_image(record_id, label, image)
            writer.write_identity_record(len(images) + 1, 1, len(images))
        if num_classes:
            write_property(folder, num_classes)
        return folder


def _images_of(source):
    return [source.encoded(i).tobytes() for i in range(len(source))]


@pytest.fixture(scope="session")
def records():
    return SmallSet([bytes([i]) * (i + 1) for i in range(6)], [2, 0, 1, 1, 0, 2])


@pytest.fixture(scope="session")
def images_of():
    """``images_of(source)``: all images as they are stored."""
    return _images_of
