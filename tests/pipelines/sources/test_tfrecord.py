"""TFRecords written here from TensorFlow's description of the format, read by our sources and by DALI's reader."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scf_fast.pipelines.convert import convert
from scf_fast.pipelines.formats.array_file import map_arrays, write_arrays
from scf_fast.pipelines.formats.crc32c import crc32c
from scf_fast.pipelines.formats.tfrecord import images_in, pack_record, parse_example
from scf_fast.pipelines.index import main, open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import ConcatenatedSources, EncodedImages, SelectedImages
from scf_fast.pipelines.sources.tfrecord import TFRecordIndex, TFRecordList


def masked_crc(data):
    register = int(crc32c(np.frombuffer(data, dtype=np.uint8)))  # test_crc32c.py has it against the definition
    return struct.pack("<I", ((register >> 15 | register << 17) + 0xA282EAD8) % (1 << 32))


def record(example):
    size = struct.pack("<Q", len(example))
    return size + masked_crc(size) + example + masked_crc(example)


def varint(number):
    return (bytes([number % 128 + 128]) + varint(number // 128)) if number > 127 else bytes([number])


def field(number, content):
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def feature(name, value):
    if isinstance(value, bytes):
        kind = field(1, field(1, value))
    elif isinstance(value, float):
        kind = field(2, field(1, struct.pack("<f", value)))
    else:
        kind = field(3, field(1, varint(value % (1 << 64))))
    return field(1, field(1, name.encode()) + field(2, kind))


def example(**features):
    return field(1, b"".join(feature(name.replace("__", "/"), value) for name, value in features.items()))


def read_all(source):
    """What read() gives, None where it leaves the image to encoded()."""
    data, starts, lengths = source.read(np.arange(len(source)))
    return [data[start : start + length].tobytes() if length else None for start, length in zip(starts, lengths)]


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (112, 112), (shade, 0, 255 - shade)).save(file, "PNG")
    return file.getvalue()


EXAMPLES = [
    example(image=b"first", label=3),
    example(label=0, image=b"second" * 100),
    example(score=0.5, label=1, name=b"a", image=b"third"),
    example(image=b"", label=1),
    example(a=b"", b=1, c=0.5, d=b"x", e=2, label=(1 << 31) - 1, image=b"fourth" * 9999),
]
IMAGES = [b"first", b"second" * 100, b"third", b"fourth" * 9999]


def shard(folder, examples=EXAMPLES, name="a.tfrecord"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(record, examples)))
    return path


def listed(folder, lines=None, big=b"b" * 50_000):
    """Two names, three shards, 12 records without labels; by default all are listed, in no order."""
    places = []
    for name, number in (("TFR-a", 0), ("TFR-a", 12), ("TFR-b", 0)):
        path, end = f"{name}/{name}-{number:05d}.tfrecord", 0
        examples = [example(image=big if at == 1 else f"{name} {number} {at}".encode() * 20) for at in range(4)]
        shard(folder, examples, path)
        for content in examples:
            places.append(f"{name}\t{number}\t{end}\t")
            end += len(record(content))
    lines = (
        [f"{place}{i % 5}\n" for i, place in enumerate(places)][::-1]
        if lines is None
        else [line.format(*places) for line in lines]
    )
    (folder / "train.txt").write_text("".join(lines))
    return folder / "train.txt"


def test_shards_with_labels(tmp_path, caplog, images_of):
    shard(tmp_path)
    shard(
        tmp_path,
        [example(image__encoded=b"fifth", image__class__label=7), example(image_raw=b"sixth", label=2)],
        "b.tfrecord",
    )
    with caplog.at_level("INFO"):
        source = open_source(tmp_path)
    assert (
        isinstance(source, TFRecordIndex)
        and source.labels.tolist() == [3, 0, 1, (1 << 31) - 1, 7, 2]
        and source.num_classes == 1 << 31
    )
    assert images_of(source) == [*IMAGES, b"fifth", b"sixth"]
    assert read_all(source) == [*IMAGES[:3], None, None, None]  # too many features before it, and other names
    assert source.name(1) == f"{tmp_path / 'a.tfrecord'} record at byte {len(record(EXAMPLES[0]))}"
    assert (
        source.skipped == {"empty images": 1}
        and "6 images in TFRecord" in caplog.text
        and "skipped 1 empty images" in caplog.text
    )
    assert images_of(pickle.loads(pickle.dumps(source))) == images_of(source)
    assert images_of(open_source(tmp_path / "b.tfrecord")) == [b"fifth", b"sixth"]
    source.will_need(np.array([0, 5]))
    for i in range(6):
        source.check(i)
    (tmp_path / "property").write_text("9,112,112")
    assert open_source(tmp_path / "b.tfrecord").num_classes == 9
    with pytest.raises(ValueError, match=r"record at byte \d+ has label 2147483647, but .*property says 9 classes"):
        open_source(tmp_path)


def test_other_forms_of_the_same_message(tmp_path, images_of):
    """What protobuf allows: numbers that are not packed, unknown fields of every type, a tag in more bytes than it
    needs.
    """
    unpacked = field(1, field(1, field(1, b"label") + field(2, field(3, b"\x08\x05"))) + feature("image", b"face"))
    others = (b"\x78\x96\x01" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + field(9, b"x")) + unpacked + b"\x78\x00"
    long = b"\x8a\x00" + unpacked[1:]
    path = shard(tmp_path, [unpacked, others, long, example(label=6, other=9, image=b"face")])
    source = open_source(path)
    assert (
        source.labels.tolist() == [5, 5, 5, 6]
        and images_of(source) == [b"face"] * 4
        and read_all(source) == [b"face", None, None, b"face"]
    )


def test_dali_reads_the_same(tmp_path, images_of):
    """DALI is an oracle twice: on files written above, and on what convert writes."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import tfrecord as tfrec

    def by_dali(paths):
        indices, count = [], 0
        for path in paths:
            data, end, lines = path.read_bytes(), 0, []
            while end < len(data):
                size = 16 + int.from_bytes(data[end : end + 8], "little")
                lines.append(f"{end} {size}\n")
                end += size
            indices.append(str(path.with_suffix(".places")))
            path.with_suffix(".places").write_text("".join(lines))
            count += len(lines)

        @pipeline_def(batch_size=count, num_threads=1, device_id=None)
        def pipeline():
            found = fn.readers.tfrecord(
                path=list(map(str, paths)),
                index_path=indices,
                features={
                    "image": tfrec.FixedLenFeature((), tfrec.string, ""),
                    "label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
                },
            )
            return found["image"], found["label"]

        built = pipeline()
        built.build()
        images, labels = built.run()
        return [np.asarray(image).tobytes() for image in images], np.asarray(labels.as_array()).reshape(-1).tolist()

    path = shard(tmp_path, [content for content in EXAMPLES if content is not EXAMPLES[3]])
    source = open_source(path)
    assert by_dali([path]) == (images_of(source), source.labels.tolist()) and images_of(source) == IMAGES
    faces = [png(shade) for shade in range(7)]
    convert(EncodedImages(faces, [4, 4, 0, 1, 300, 0, 70_000]), tmp_path / "faces", "tfrecord", shard_images=3)
    found, labels = by_dali(sorted((tmp_path / "faces").glob("*.tfrecord")))
    assert found == [faces[i] for i in (2, 5, 3, 0, 1, 4, 6)] and labels == [0, 0, 1, 4, 4, 300, 70_000]


def test_packed_record_is_the_described_one():
    assert pack_record(b"face" * 99, 1 << 20) == record(example(image=b"face" * 99, label=1 << 20))
    assert pack_record(b"x", 0) == record(example(image=b"x", label=0))


def test_list_of_tface(tmp_path, images_of):
    source = open_source(listed(tmp_path))
    assert isinstance(source, TFRecordList) and len(source) == 12 and source.num_classes == 5
    expected = {
        f"{name} {number} {at}".encode() * 20 if at != 1 else b"b" * 50_000: (4 * shard + at) % 5
        for shard, (name, number) in enumerate((("TFR-a", 0), ("TFR-a", 12), ("TFR-b", 0)))
        for at in range(4)
    }
    assert [label for image, label in zip(images_of(source), source.labels.tolist()) if len(image) < 50_000] == [
        expected[image] for image in images_of(source) if len(image) < 50_000
    ]
    assert sorted(images_of(source)) == sorted(
        [*(image for image in expected if len(image) < 50_000), *[b"b" * 50_000] * 3]
    )
    read = read_all(source)
    assert [i for i, image in enumerate(read) if image is None] == [
        1,
        3,
        5,
        7,
        9,
        11,
    ]  # the large ones, and the last of each shard: where it ends is not known
    assert all(image in (None, other) for image, other in zip(read, images_of(source)))
    assert [source.name(i) for i in (0, 4, 8)] == [
        f"{tmp_path / name.partition('-0')[0] / name}.tfrecord record at byte 0"
        for name in ("TFR-b-00000", "TFR-a-00012", "TFR-a-00000")
    ]
    assert images_of(pickle.loads(pickle.dumps(source))) == images_of(source)
    for i in range(12):
        source.check(i)


def test_some_records_several_times(tmp_path, images_of):
    """As after cleaning and oversampling: a list is all that changes."""
    source = open_source(listed(tmp_path, ["{3}0\n", "\n", "{0}2\r\n", "{0}1\n", "{2}1"]))
    contents = [f"TFR-a 0 {at}".encode() * 20 for at in (0, 0, 2, 3)]
    assert images_of(source) == contents and source.labels.tolist() == [2, 1, 1, 0] and source.num_classes == 3
    assert read_all(source) == [*contents[:3], None]


def test_root_of_a_list(tmp_path):
    path = listed(tmp_path / "data")
    path = path.rename(tmp_path / "train.txt")
    assert len(open_source(path, root=tmp_path / "data")) == 12
    with pytest.raises(
        ValueError,
        match=r"train\.txt names .*TFR-b-00000\.tfrecord, and there is no such file; give the folder that its names "
        r"start from",
    ):
        open_source(path)


def test_list_of_other_shards(tmp_path):
    path = listed(tmp_path)
    path.write_text("TFR-a\t0\t5\t0\nTFR-a\t0\t6\t0\n")
    with pytest.raises(
        ValueError,
        match=r"train\.txt fits none of the 2 records looked at: .*00000\.tfrecord record at byte 5: the checksum of "
        r"its length",
    ):
        open_source(path)
    path.write_text("TFR-a\t0\t9000000\t0\n")
    with pytest.raises(ValueError, match=r"train\.txt fits none of the 1 records looked at: .* ends inside image 0"):
        open_source(path)


@pytest.mark.parametrize(
    "line",
    [
        "TFR-a\t0\t0",
        "TFR-a\t0\t0\t1\t2",
        "TFR-a\tx\t0\t1",
        "TFR-a\t-1\t0\t1",
        "TFR-a\t0\t-16\t1",
        "TFR-a\t0\t0\t0.5",
        f"TFR-a\t0\t{1 << 63}\t1",
        f"TFR-a\t{'9' * 5000}\t0\t1",
        "T\0\t0\t0\t1",
        "TFR-a 0 0 1",
    ],
)
def test_bad_lines_are_named(tmp_path, line):
    with pytest.raises(
        ValueError,
        match=r"train\.txt line 2 must be a name, a shard, an offset and a label, whole numbers, separated by tabs, "
        r"got ",
    ):
        open_source(listed(tmp_path, ["{0}0\n", line + "\n"]))


@pytest.mark.parametrize("label", ["-1", "2147483648"])
def test_labels_out_of_range(tmp_path, label):
    with pytest.raises(ValueError, match=rf"train\.txt line 2 has label {label}; a label must lie in 0\.\."):
        open_source(listed(tmp_path, ["{0}0\n", "{1}" + label]))
    path = shard(tmp_path, [example(image=b"x", label=int(label))])
    with pytest.raises(
        ValueError, match=r"a\.tfrecord: record at byte 0 has label .*; a label must be a whole number in 0\.\."
    ):
        open_source(path)


def test_what_tface_has_no_labels_in(tmp_path):
    """The folder of shards, and the index before it has labels."""
    listed(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"TFR-a-00000\.tfrecord: record at byte 0 must hold a label, an int64_list label or image/class/label; "
        r"where",
    ):
        open_source(tmp_path / "TFR-a")
    (tmp_path / "TFR-a.index").write_text("some/face.jpg\t0\t0\n")
    with pytest.raises(ValueError, match=r"TFR-a\.index line 1 must be a name, a shard, an offset and a label"):
        open_source(tmp_path / "TFR-a.index")


def test_list_of_images_is_none_of_records(tmp_path, images_of):
    (tmp_path / "a\t0\t1.jpg").write_bytes(b"face")
    (tmp_path / "list.txt").write_text("a\t0\t1.jpg\t5\n")
    assert images_of(open_source(tmp_path / "list.txt")) == [b"face"]


def test_every_truncation_is_one_clear_error(tmp_path):
    content = b"".join(map(record, EXAMPLES[:4]))
    ends = np.cumsum([0, *(len(record(one)) for one in EXAMPLES[:4])]).tolist()
    path = tmp_path / "a.tfrecord"
    for cut in [*range(0, 120), *range(120, len(content), 17), len(content)]:
        path.write_bytes(content[:cut])
        if cut in ends[1:]:
            assert len(open_source(path)) == min(ends.index(cut), 3)
        else:
            with pytest.raises(
                ValueError, match=r"a\.tfrecord: (it is truncated: the (record|header) at byte \d+|the file is empty)"
            ):
                open_source(path)


def test_damaged_lengths_are_noticed(tmp_path):
    whole = b"".join(map(record, EXAMPLES[:3]))
    second = len(record(EXAMPLES[0]))
    for at in range(second, second + 12):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        (tmp_path / "a.tfrecord").write_bytes(damaged)
        with pytest.raises(
            ValueError,
            match=rf"a\.tfrecord: no record starts at byte {second}: compressed, damaged or no TFRecord file",
        ):
            open_source(tmp_path)
    source = open_source(listed(tmp_path))
    with open(tmp_path / "TFR-b" / "TFR-b-00000.tfrecord", "r+b") as file:
        file.write(b"\x07")
    with pytest.raises(
        ValueError, match=r"TFR-b-00000\.tfrecord record at byte 0: the checksum of its length is wrong"
    ):
        source.encoded(0)
    assert (
        read_all(source)[0] is None and len(open_source(tmp_path / "train.txt")) == 12
    )  # one of them is a broken image


def test_damaged_bytes_are_found_by_verify(tmp_path, capsys):
    """Here where a decoder does not look."""
    path = shard(tmp_path, [example(image=png(shade), label=shade) for shade in range(3)])
    data, size = bytearray(path.read_bytes()), len(record(example(image=png(0), label=0)))
    data[data.index(b"IEND", size) + 4] ^= 1
    path.write_bytes(data)
    source = open_source(path)
    assert read_all(source)[1] == source.encoded(1).tobytes()
    for view, i in ((source, 1), (SelectedImages(source, [2, 1]), 1), (ConcatenatedSources([source, source]), 4)):
        with pytest.raises(ValueError, match=rf"a\.tfrecord record at byte {size} differs from its checksum"):
            view.check(i)
    assert main([str(path), "--verify", "--workers", "1"]) == 1
    assert f"record at byte {size} differs from its checksum" in capsys.readouterr().out and open_source(
        path
    ).broken.tolist() == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its features are none"),
        (example(label=1), "must hold an image, a bytes_list image or .*; its features are 'label'"),
        (example(image=5, label=1), "must hold an image"),
        (bytes(4000), "must have fewer than 1000 fields"),
        (b"\x0b", "a field has wire type 3"),
        (b"\x0a\xff\x01" + bytes(9), "a field ends 246 bytes after its message"),
        (b"\x0a" + b"\xff" * 20, "a number does not end"),
        (b"\x0a", "a number does not end"),
        (field(1, field(1, b"\x0a\x05image\x12\xff")), "a number does not end"),
        (b"no message", "damaged"),
    ],
)
def test_other_messages_are_refused(tmp_path, content, message):
    path = shard(tmp_path, [EXAMPLES[0], content])
    with pytest.raises(ValueError, match=rf"a\.tfrecord: record at byte {len(record(EXAMPLES[0]))}: .*{message}"):
        open_source(path)
    listed(tmp_path, ["{0}0\n", "{1}0\n"])
    (tmp_path / "TFR-a" / "TFR-a-00000.tfrecord").write_bytes(record(content) + record(EXAMPLES[0]))
    (tmp_path / "train.txt").write_text(f"TFR-a\t0\t0\t0\nTFR-a\t0\t{len(record(content))}\t1\n")
    source = open_source(tmp_path / "train.txt")
    with pytest.raises(ValueError, match=rf"record at byte 0: .*{message}"):
        source.encoded(0)
    assert source.encoded(1).tobytes() == b"first"


@given(
    st.sampled_from([EXAMPLES[0], EXAMPLES[1], EXAMPLES[2], example(image=b"alone")]),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
    st.integers(0, 20),
)
def test_any_message_is_data_or_a_value_error(content, edits, cut):
    """Image and label lie within it; and images_in finds what parse_example does, or nothing."""
    content = bytearray(content)
    for place, value in edits:
        content[place % len(content)] = value
    content = bytes(content[: len(content) - cut])
    data = np.frombuffer(b"before" + record(content) + b"after", dtype=np.uint8)
    (start,), (length,) = images_in(data, np.array([6]), np.array([len(content) + 16]))
    try:
        expected_start, end, label = parse_example(memoryview(content), 0, len(content))
    except ValueError:
        assert edits or cut
        return
    assert 0 <= expected_start <= end <= len(content) and (label is None or -1 << 63 <= label < 1 << 63)
    assert length == 0 or (start - 18, length) == (expected_start, end - expected_start)
    assert edits or cut or length


def test_damaged_index_is_made_again(tmp_path):
    path = listed(tmp_path)
    open_source(path)
    index = tmp_path / "train.txt.index"
    meta, arrays = map_arrays(index)
    for names in (b"one", b"a\nb\nc\nd", b"a\0\nb\nc"):
        write_arrays(index, meta, {**arrays, "files": np.frombuffer(names, dtype=np.uint8)})
        assert len(open_source(path)) == 12


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_faces_reach_the_batch(tmp_path, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    faces = [png(shade) for shade in range(0, 250, 50)]
    shard(tmp_path, [example(image=face) for face in faces], "TFR-a/TFR-a-00000.tfrecord")
    ends = np.cumsum([0, *(len(record(example(image=face))) for face in faces)])
    (tmp_path / "list.txt").write_text("".join(f"TFR-a\t0\t{ends[i]}\t{i % 3}\n" for i in range(5)))
    batches = []
    for source in (open_source(tmp_path / "list.txt"), EncodedImages(faces, [0, 1, 2, 0, 1])):
        with make_loader(source, EpochSampler(5, 5, seed=0), backend=backend, num_workers=1) as loader:
            batches.append(next(iter(loader.batches(0))))
            assert not len(loader.broken)
    assert torch.equal(batches[0].images, batches[1].images) and torch.equal(batches[0].labels, batches[1].labels)


def test_converted_set_is_what_tface_trains_from(tmp_path, images_of):
    """Its index, from the parent folder; and the folder itself, with labels in the records."""
    faces, labels = [png(shade) for shade in range(5)], [2, 0, 2, 1, 0]
    convert(EncodedImages(faces, labels), tmp_path / "TFR-x", "tfrecord", shard_images=2)
    assert sorted(path.name for path in (tmp_path / "TFR-x").glob("TFR-x*")) == [
        f"TFR-x-0000{i}.tfrecord" for i in range(3)
    ] + ["TFR-x.txt"]
    sources = open_source(tmp_path / "TFR-x"), open_source(tmp_path / "TFR-x" / "TFR-x.txt", root=tmp_path)
    for source in sources:
        assert images_of(source) == [faces[i] for i in (1, 4, 3, 0, 2)] and source.labels.tolist() == [0, 0, 1, 2, 2]
    lines = (tmp_path / "TFR-x" / "TFR-x.txt").read_text().splitlines()
    assert lines[0] == "TFR-x\t0\t0\t0" and lines[2] == "TFR-x\t1\t0\t1" and len(lines) == 5
