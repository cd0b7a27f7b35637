"""RecordIO against frames built with struct alone, and the writer against a reader that walks frame by frame."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.formats.recordio import (
    RecordWriter,
    images_in,
    read_num_classes,
    read_record,
    scan_image_records,
    whole_records,
    write_property,
)

MAGIC = struct.pack("<I", 0xCED7230A)
# Byte strings rich in the magic, at aligned and unaligned places.
IMAGES = st.lists(st.sampled_from([MAGIC, MAGIC[:2], b"a", b"bcde", bytes(7)]), min_size=1, max_size=8).map(b"".join)


def frame(cflag, part):
    return MAGIC + struct.pack("<I", cflag << 29 | len(part)) + part + bytes(-len(part) % 4)


def payload(label, image, record_id=0):
    if isinstance(label, list):
        return struct.pack("<IfQQ", len(label), 0.0, record_id, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, record_id, 0) + image


def as_array(file):
    return np.frombuffer(file, dtype=np.uint8)


def read_frames(file):
    """[(offset, payload)] by the definition: parts joined with the magic they were cut at."""
    records, at = [], 0
    while at < len(file):
        start, parts = at, []
        while True:
            magic, cflag_length = struct.unpack_from("<4sI", file, at)
            assert magic == MAGIC
            cflag, length = cflag_length >> 29, cflag_length & (1 << 29) - 1
            assert cflag in ((0, 1) if not parts else (2, 3))
            parts.append(file[at + 8 : at + 8 + length])
            at += 8 + (length + 3) // 4 * 4
            if cflag in (0, 3):
                break
        records.append((start, MAGIC.join(parts)))
    return records


def test_scan_picks_image_records_of_a_distributed_file():
    cut = payload(2.0, b"abcd" + MAGIC + b"ef", record_id=4)
    at = cut.index(MAGIC)
    frames = [
        frame(0, payload([4.0, 6.0], b"")),  # header record
        frame(0, payload(1.0, b"jpeg one", record_id=1)),
        frame(0, payload([7.0, 3.5, 0.0], b"odd", record_id=2)),
        frame(0, payload(3.0, b"z", record_id=3)),
        frame(1, cut[:at]) + frame(3, cut[at + 4 :]),
        frame(0, payload([1.0, 3.0], b"", record_id=5)),  # identity records
        frame(0, payload([3.0, 5.0], b"", record_id=6)),
    ]
    data = as_array(b"".join(frames))
    starts = np.cumsum([0, *map(len, frames)])
    offsets, lengths, labels, num_empty = scan_image_records(data)
    np.testing.assert_array_equal(offsets, starts[1:5])
    np.testing.assert_array_equal(lengths, np.diff(starts)[1:5])
    assert num_empty == 0
    np.testing.assert_array_equal(labels, [1, 7, 3, 2])
    records = [read_record(data, int(offset)) for offset in offsets]
    assert [record.image.tobytes() for record in records] == [b"jpeg one", b"odd", b"z", b"abcd" + MAGIC + b"ef"]
    assert [record.record_id for record in records] == [1, 2, 3, 4]
    np.testing.assert_array_equal(records[1].labels, np.float32([7, 3.5, 0]))
    assert np.shares_memory(records[0].image, data)


def test_scan_across_blocks(monkeypatch):
    monkeypatch.setattr("scf_fast.pipelines.formats.recordio._SCAN_BLOCK", 4)
    frames = [frame(0, payload(float(i), bytes(i + 1), i)) for i in range(13)]
    progress = []
    offsets, lengths, labels, _ = scan_image_records(as_array(b"".join(frames)), progress.append)
    np.testing.assert_array_equal(offsets, np.cumsum([0, *map(len, frames)])[:-1])
    assert lengths.tolist() == list(map(len, frames)) and sum(progress) == sum(map(len, frames)) and len(progress) == 4
    np.testing.assert_array_equal(labels, np.arange(13))


@given(
    st.lists(st.tuples(IMAGES, st.one_of(st.just(1.0), st.lists(st.just(2.0), max_size=3))), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=3),
)
def test_images_in_many_records(contents, damages):
    """What it vouches for is what read_record gives; in intact files only cut records are left to that."""
    frames = [
        frame(0, payload(label, image))
        if MAGIC not in payload(label, image)
        else b"".join([frame(1, payload(label, b"")), frame(3, image)])
        for image, label in contents
    ]
    lengths = np.array([len(f) for f in frames])
    starts = np.cumsum(lengths) - lengths
    data = as_array(b"".join(frames)).copy()
    for place, value in damages:
        data[place % len(data)] = value
    for b, (first, size) in enumerate(zip(*(places.tolist() for places in images_in(data, starts, lengths)))):
        if size:
            assert data[first : first + size].tobytes() == read_record(data, int(starts[b])).image.tobytes()
            assert starts[b] <= first and first + size <= starts[b] + lengths[b]
        elif not damages:
            assert MAGIC in payload(contents[b][1], contents[b][0])


@given(
    images=st.lists(IMAGES, min_size=1, max_size=4),
    labels=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    as_list=st.booleans(),
)
def test_writer_against_the_definition(tmp_path_factory, images, labels, as_list):
    folder = tmp_path_factory.mktemp("rec")
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        writer.write_header_record(len(images), 2)
        for record_id, (image, label) in enumerate(zip(images, labels), start=1):
            writer.write_image(record_id, [label, 0.25] if as_list else label, image)
        writer.write_identity_record(len(images) + 1, 1, 1)
    file = (folder / "train.rec").read_bytes()
    offsets, payloads = zip(*read_frames(file))
    n = len(images)
    assert list(payloads) == [
        payload([n + 1, n + 3], b""),
        *(
            payload([label, 0.25] if as_list else label, image, i)
            for i, (image, label) in enumerate(zip(images, labels), start=1)
        ),
        payload([1, 2], b"", n + 1),
    ]
    assert (folder / "train.idx").read_text() == "".join(f"{i}\t{offset}\n" for i, offset in enumerate(offsets))

    found, _, found_labels, _ = scan_image_records(as_array(file))
    assert tuple(found) == offsets[1:-1] and list(found_labels) == labels[:n]
    assert [read_record(as_array(file), int(offset)).image.tobytes() for offset in found] == images


def test_images_of_no_bytes_are_counted():
    """A plain label and no image; header and identity records have label arrays."""
    frames = [
        frame(0, payload([3.0, 4.0], b"")),
        frame(0, payload(1.0, b"jpeg")),
        frame(0, payload(1.0, b"")),
        frame(0, payload([1.0, 3.0], b"")),
    ]
    records = scan_image_records(as_array(b"".join(frames)))
    assert len(records.offsets) == 1 and records.num_empty == 1


def test_whole_records_end_where_damage_starts():
    frames = [
        frame(0, payload(1.0, b"four", 1)),
        frame(1, payload(2.0, b"", 2)) + frame(3, b"tail."),
        frame(0, payload([3.0], b"x", 3)),
    ]
    file = b"".join(frames)
    ends = np.cumsum([0, *map(len, frames)])
    for cut in range(len(file) + 1):
        damages = [b""] if cut not in ends else [b"", bytes(64), frame(3, b"lost"), frame(0, b"short"), b"\1"]
        for damage in damages:
            starts, end = whole_records(as_array(file[:cut] + damage))
            assert end == max(e for e in ends if e <= cut)
            assert starts.tolist() == [e for e in ends[:-1] if e < end]


def test_truncated_file_is_refused_unless_it_ends_with_a_record():
    frames = [
        frame(0, payload(1.0, b"four", 1)),
        frame(1, payload(2.0, b"", 2)) + frame(3, b"tail."),
        frame(0, payload([3.0], b"x", 3)),
    ]
    file = b"".join(frames)
    ends = [0, *np.cumsum([len(f) for f in frames])]
    for cut in range(1, len(file)):
        if cut in ends:
            assert len(scan_image_records(as_array(file[:cut]))[0]) == ends.index(cut)
        else:
            with pytest.raises(ValueError, match="truncated: the record at byte") as error:
                scan_image_records(as_array(file[:cut]))
            named = int(str(error.value).split("record at byte ")[1].split()[0])
            assert max(end for end in ends if end <= cut) <= named <= cut


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG" + bytes(60), "byte 0 must start a record with magic"),
        (frame(0, payload(1.0, b"ok")) + bytes(40), "byte 36 must start a record with magic"),
        (frame(3, payload(1.0, b"ok")), "byte 0 must start a record and lies inside one"),
        (frame(1, payload(1.0, b"ok..")) + frame(0, payload(1.0, b"ok")), "last part is missing"),
        (frame(0, b"short"), "must hold a 24-byte header, got 5 bytes"),
        (frame(0, struct.pack("<IfQQ", 9, 0, 0, 0) + bytes(8)), "announces 9 labels in 32 bytes"),
    ],
)
def test_damage_is_named(file, message):
    with pytest.raises(ValueError, match=message):
        scan_image_records(as_array(file))


def test_failed_writer_leaves_the_old_files(tmp_path):
    rec, idx = tmp_path / "train.rec", tmp_path / "train.idx"
    rec.write_bytes(b"old")
    with (
        pytest.raises(ValueError, match="record 1: an image record needs image bytes"),
        RecordWriter(rec, idx) as writer,
    ):
        writer.write_header_record(1, 1)
        writer.write_image(1, 0, b"")
    assert rec.read_bytes() == b"old" and list(tmp_path.iterdir()) == [rec]


def test_property(tmp_path):
    write_property(tmp_path, 85742)
    assert (tmp_path / "property").read_text() == "85742,112,112\n"
    assert read_num_classes(tmp_path / "property") == 85742
    for text in ("many,112,112", "9999999999", "9" * 5000, ""):
        (tmp_path / "property").write_text(text)
        with pytest.raises(
            ValueError, match=f"must hold 'classes,height,width' with up to 2147483648 classes, got '{text[:60]}'"
        ):
            read_num_classes(tmp_path / "property")
