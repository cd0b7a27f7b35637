import io
import itertools

import numpy as np
import pytest
from PIL import Image

from scf_fast.pipelines import convert as module
from scf_fast.pipelines.convert import _STATE, FORMATS, convert, main
from scf_fast.pipelines.formats.recordio import RecordWriter
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.base import EncodedImages

LABELS = [3, 0, 3, 1, 0, 0, 5, 1, 3]


def encode(seed, fmt):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, fmt)
    return file.getvalue()


@pytest.fixture(scope="module")
def source():
    kinds = itertools.cycle(["JPEG", "PNG", "WEBP", "PPM"])
    source = EncodedImages([encode(seed, fmt) for seed, fmt in zip(range(len(LABELS)), kinds)], LABELS)
    source.num_classes = 8
    return source


def content(source):
    return [(int(label), source.encoded(i).tobytes()) for i, label in enumerate(source.labels)]


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".index"
    }


@pytest.mark.parametrize("chain", itertools.permutations(FORMATS, 2))
def test_from_each_format_to_each(source, tmp_path, chain):
    expected = sorted(content(source), key=lambda pair: pair[0])
    for to in chain:
        assert convert(source, tmp_path / to, to, shard_images=4) == len(LABELS)
        source = open_source(tmp_path / to)
        assert content(source) == expected and source.num_classes == 8


def test_record_file_is_what_the_writer_writes(source, tmp_path):
    convert(source, tmp_path / "a", "recordio")
    images = sorted(content(source), key=lambda pair: pair[0])
    with RecordWriter(tmp_path / "b.rec", tmp_path / "b.idx") as writer:
        writer.write_header_record(9, 8)
        for record_id, (label, image) in enumerate(images, start=1):
            writer.write_image(record_id, label, image)
        first = 1
        for identity in range(8):
            count = LABELS.count(identity)
            writer.write_identity_record(10 + identity, first, first + count - 1)
            first += count
    assert (tmp_path / "a" / "train.rec").read_bytes() == (tmp_path / "b.rec").read_bytes()
    assert (tmp_path / "a" / "train.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert (tmp_path / "a" / "property").read_text() == "8,112,112\n"


@pytest.mark.parametrize("to", FORMATS)
def test_interrupted_conversion_goes_on(source, tmp_path, to):
    class Stops(EncodedImages):
        def encoded(self, i):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().encoded(i)

    stops = Stops([image for _, image in content(source)], LABELS)
    stops.num_classes = 8
    for number in itertools.count():
        stops.left = 9 + 5  # the digest takes 9; some attempts end in the comparison
        if number > 1:
            stops.left += 9
        try:
            convert(stops, tmp_path / "dst", to, shard_images=2)
            break
        except KeyboardInterrupt:
            if to == "recordio" and number == 0:  # and a torn last record
                with open(tmp_path / "dst" / "train.rec.partial", "ab") as file:
                    file.write(b"\x0a\x23\xd7\xce garbage")
    assert number >= 1
    convert(source, tmp_path / "whole" / "dst", to, shard_images=2)
    assert files(tmp_path / "dst") == files(tmp_path / "whole" / "dst")
    stops.left = 9
    assert convert(stops, tmp_path / "dst", to, shard_images=2) == 9  # complete: nothing to do


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_killed_conversion_has_left_is_its_own(source, tmp_path, to):
    """Of the state, before anything else was there, and of an image."""
    dst, token = tmp_path / "dst", "0123456789ab"
    dst.mkdir()
    (dst / f".{_STATE}.{token}.part").write_bytes(b"{")
    convert(source, dst, to, shard_images=2)
    if to == "folder":
        (dst / _STATE).write_text((dst / _STATE).read_text().replace('"complete": true', '"complete": false'))
        image = next(dst.glob("*/*"))
        image.rename(image.with_name(f".{image.name}.{token}.part"))
        convert(source, dst, to, shard_images=2)
    convert(source, tmp_path / "whole" / "dst", to, shard_images=2)
    assert files(dst) == files(tmp_path / "whole" / "dst") and not list(dst.rglob("*.part"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.part").write_text("mine")
    with pytest.raises(ValueError, match="it holds other files"):
        convert(source, tmp_path / "other", to)


def test_broken_images_are_left_out(source, tmp_path):
    some = EncodedImages([image for _, image in content(source)], LABELS)
    some.broken = np.array([0, 6])
    assert convert(some, tmp_path / "dst", "folder") == 7
    assert open_source(tmp_path / "dst").labels.tolist() == [0, 0, 0, 1, 1, 3, 3]
    some = EncodedImages([b"garbage"], [0])
    with pytest.raises(
        ValueError,
        match=r"image 0 is no image of a known kind \(unknown format\); run `python -m scf_fast\.pipelines\.index SRC "
        r"--verify`",
    ):
        convert(some, tmp_path / "bad", "tar")


def test_difference_to_the_source_is_found(source, tmp_path, monkeypatch):
    class Fails(EncodedImages):
        def encoded(self, i):
            self.reads += 1
            data = super().encoded(i).copy()
            if self.reads == 9 + 5:  # one bad read while writing
                data[50] ^= 1
            return data

    images = Fails([image for _, image in content(source)], LABELS)
    images.reads = 0
    with pytest.raises(ValueError, match=r"record 5 differs from image \d, which it was copied from"):
        convert(images, tmp_path / "dst", "recordio")


def test_folder_with_something_else_is_refused(source, tmp_path, capsys):
    convert(source, tmp_path / "dst", "tar")
    with pytest.raises(ValueError, match="holds the conversion of another source or to another format"):
        convert(source, tmp_path / "dst", "folder")
    with pytest.raises(ValueError, match="holds the conversion of another source"):
        convert(EncodedImages([content(source)[0][1]], [0]), tmp_path / "dst", "tar")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="it holds other files; give another folder"):
        convert(source, tmp_path / "mine", "tar")
    with pytest.raises(ValueError, match="every image must have a label"):
        convert(EncodedImages([b"x"]), tmp_path / "new", "tar")
    many = EncodedImages([content(source)[0][1]], [1 << 25])
    with pytest.raises(ValueError, match="RecordIO holds labels up to 16777216"):
        convert(many, tmp_path / "new", "recordio")
    with pytest.raises(ValueError, match="the format must be one of recordio, tar, tfrecord, folder, got 'zip'"):
        convert(source, tmp_path / "new", "zip")
    assert not (tmp_path / "new").exists()


def test_command_line(source, tmp_path, capsys, monkeypatch):
    convert(source, tmp_path / "a", "recordio")
    assert (
        main(
            [
                str(tmp_path / "a"),
                str(tmp_path / "a" / "train.rec"),
                str(tmp_path / "b"),
                "--to",
                "tar",
                "--shard-images",
                "4",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: 18 images of 16 identities, equal to the source\n"
    assert len(list((tmp_path / "b").glob("*.tar"))) == 5
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "tar"]) == 2 and "error: " in capsys.readouterr().err
    assert main([str(tmp_path / "a"), str(tmp_path / "c"), "--to", "tar", "--shard-images", "0"]) == 2

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "convert", stop)
    assert (
        main([str(tmp_path / "a"), str(tmp_path / "c"), "--to", "tar"]) == 130
        and "the same command continues" in capsys.readouterr().err
    )
