"""Files of many images that were joined, cut off, or copied with a hole in them."""

import pytest

from scf_fast.pipelines.formats.recordio import RecordWriter
from scf_fast.pipelines.formats.tfrecord import write_shard as write_tfrecords
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.tar import write_shard as write_tar

IMAGES = [bytes([65 + i]) * (700 + i) for i in range(6)]


def write(path):
    if path.suffix == ".tar":
        write_tar(path, [(f"{i}", ".jpg", image, i % 3) for i, image in enumerate(IMAGES)])
    elif path.suffix == ".tfrecord":
        write_tfrecords(path, [(image, i % 3) for i, image in enumerate(IMAGES)])
    else:
        with RecordWriter(path, path.with_suffix(".idx")) as writer:
            writer.write_header_record(len(IMAGES), 3)
            for i, image in enumerate(IMAGES):
                writer.write_image(i + 1, i % 3, image)
            writer.write_identity_record(len(IMAGES) + 1, 1, len(IMAGES))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["tar", "tfrecord", "rec"])
def test_joined_files_are_read_to_the_end(tmp_path, suffix, images_of):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(write(path) * 3)
    source = open_source(path)
    assert (
        images_of(source) == IMAGES * 3 and source.labels.tolist() == [0, 1, 2] * 6 and not any(source.skipped.values())
    )


@pytest.mark.parametrize("suffix", ["tar", "tfrecord", "rec"])
@pytest.mark.parametrize("damage", ["hole", "cut", "joined and cut"])
def test_what_is_missing_is_an_error_that_says_where(tmp_path, suffix, damage):
    path = tmp_path / f"a.{suffix}"
    whole = write(path)
    hole = whole[:2560] + bytes(2048) + whole[4608:]  # over the beginning of a member or record
    path.write_bytes({"hole": hole, "cut": whole[:3700], "joined and cut": whole + whole[:3700]}[damage])
    where = r"byte \d+" if damage == "hole" else r"truncated: the \w+ at byte \d+ ends at byte \d+ and the file at \d+"
    with pytest.raises(ValueError, match=where):
        open_source(path)
