"""Shards written by tarfile, and by hand where tarfile would refuse."""

import io
import json
import os
import resource
import tarfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.tar import TarIndex, _members, write_shard
from scf_fast.pipelines.text import one_line


def tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            shard.addfile(info, io.BytesIO(content or b""))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels(tmp_path, format, images_of):
    long = "deep/" * 30 + "x"  # 151 characters: a prefix in ustar, an extended header in the others
    uni = "gesichter/größe one" if format != tarfile.USTAR_FORMAT else "plain one"
    tar(
        tmp_path / "a.tar",
        [
            ("folder", None),
            ("b.jpg", b"first"),
            ("b.cls", b"3\n"),
            (f"{long}.json", b'{"label": 1, "x": 2}'),
            (f"{long}.png", b"second"),
            (f"{uni}.seg.png", b"no"),
            (f"{uni}.WebP", b"third"),
            (f"{uni}.cls", b"0"),
            (f"{uni}.txt", b"a caption"),
        ],
        format,
    )
    tar(tmp_path / "b.tar", [("b.cls", b"2"), ("b.jpg", b"fourth" * 200)], format)
    source = open_source(tmp_path)
    assert isinstance(source, TarIndex) and source.labels.tolist() == [3, 1, 0, 2] and source.num_classes == 4
    assert images_of(source) == [b"first", b"second", b"third", b"fourth" * 200]
    assert (
        source.name(0) == f"{tmp_path / 'a.tar'} member b.jpg"
        and source.name(3) == f"{tmp_path / 'b.tar'} member b.jpg"
    )
    source.will_need(np.array([0, 3]))
    (tmp_path / "property").write_text("10,112,112")
    assert open_source(tmp_path).num_classes == 10
    assert images_of(open_source(tmp_path / "b.tar")) == [b"fourth" * 200]


def test_members_without_their_pair_are_skipped_and_counted(tmp_path, caplog, images_of):
    tar(
        tmp_path / "a.tar",
        [
            ("1.jpg", b"one"),
            ("2.cls", b"4"),
            ("3.jpg", b""),
            ("3.cls", b"1"),
            ("4.jpg", b"four"),
            ("4.json", b"{}"),
            ("5.jpg", b"five"),
            ("5.cls", b"0"),
        ],
    )
    with caplog.at_level("INFO"):
        source = TarIndex.open(tmp_path)
    assert images_of(source) == [b"five"]
    assert source.skipped == {"images without label": 2, "labels without image": 1, "empty images": 1}
    assert (
        "1 images in tar shards" in caplog.text
        and "skipped 2 images without label; skipped 1 labels without image" in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.cls", b"one"),
        ("a.cls", b""),
        ("a.json", b'{"label": "3"}'),
        ("a.json", b"{"),
        ("a.json", b"[" * 99999),
        ("a.cls", b"9" * 400),
        ("a.json", b"9" * 400),
        ("a.cls", b"9" * 9999),
    ],
)
def test_labels_that_are_none(tmp_path, name, content):
    path = tar(tmp_path / "a.tar", [("a.jpg", b"x"), (name, content)])
    with pytest.raises(ValueError, match=rf"a\.tar: member {name} must hold a label, a whole number, got"):
        TarIndex.open(path)


@pytest.mark.parametrize("content", [b"-1", b"1.5", b"3000000000"])
def test_labels_out_of_range(tmp_path, content):
    path = tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.json", b'{"cls": ' + content + b"}")])
    with pytest.raises(ValueError, match=r"a\.tar: member a has label .*; a label must be a whole number in 0\.\."):
        TarIndex.open(path)


def counted(source):
    """What was skipped, by the first words of the reason."""
    return {" ".join(reason.replace(",", "").split()[:3]): count for reason, count in source.skipped.items()}


def test_names_with_dots_pair_by_all_but_the_suffix(tmp_path, images_of):
    members = [
        *[("a.jpg", b"a"), ("a.cls", b"0")],
        *[("b.1.jpg", b"b1"), ("b.1.cls", b"1"), ("b.2.PNG", b"b2"), ("b.2.json", b'{"label": 2}')],
        *[("d.0/c.v1.jpg", b"c1"), ("d.0/c.v2.jpg", b"c2"), ("d.0/c.v1.cls", b"3"), ("d.0/c.v2.cls", b"4")],
        *[("e.jpg", b"e"), ("e.cls", b"5"), ("e.seg.png", b"no"), ("e.meta.json", b"not even json")],
        *[("01.face.jpg", b"no"), ("01.cls", b"6")],
        *[("f.jpg", b"no"), ("f.png", b"f"), ("f.cls", b"7")],
        *[("g.1.heic", b"no"), ("g.1.cls", b"8")],
    ]
    source = open_source(tar(tmp_path / "a.tar", members))
    assert images_of(source) == [b"a", b"b1", b"b2", b"c1", b"c2", b"e", b"f"]
    assert source.labels.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert counted(source) == {
        "images without label": 2,  # whose names have further dots
        "labels without image": 2,
        "images beside another": 1,
        ".heic images which": 1,
    }
    assert sum(source.skipped.values()) == 6
    dotted = open_source(
        tar(
            tmp_path / "b.tar",
            [("x.face.jpg", b"1"), ("x.cls", b"0")] * 1 + [("y.1.jpg", b"2")] * 1 + [("y.1.cls", b"1")],
        )
    )
    assert images_of(dotted) == [b"2"]
    with pytest.raises(
        ValueError, match=r"holds no image; .*1 images without label, whose names have further dots, as in"
    ):
        open_source(tar(tmp_path / "c.tar", [("x.face.jpg", b"1"), ("x.cls", b"0")]))


def test_images_and_labels_that_stand_apart_are_paired_by_their_names(tmp_path, images_of):
    """As tar packs a folder that it does not sort; of names that come twice nobody can say which belong together."""
    members = [
        ("a.jpg", b"a"),
        ("b.1.png", b"b"),
        ("c.jpg", b"c"),
        ("d.jpg", b"no"),
        ("d.jpg.meta", b""),
        ("e.jpg", b""),
    ]
    members += [("e.cls", b"4"), ("c.cls", b"2"), ("x.cls", b"9"), ("b.1.cls", b"1"), ("a.json", b'{"label": 0}')]
    members += [
        ("f.jpg", b"f"),
        ("f.cls", b"5"),
        ("d.cls", b"3"),
        ("g.cls", b"6"),
        ("d.jpg", b"no"),
        ("y.meta.json", b"{"),
    ]
    source = open_source(tar(tmp_path / "a.tar", members))
    assert images_of(source) == [b"a", b"b", b"c", b"f"] and source.labels.tolist() == [0, 1, 2, 5]
    assert source.skipped == {"images without label": 2, "labels without image": 3, "empty images": 1}
    assert [source.name(i).rpartition(" ")[2] for i in range(4)] == ["a.jpg", "b.1.png", "c.jpg", "f.jpg"]
    twice = open_source(
        tar(
            tmp_path / "b.tar",
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"0"), ("b.cls", b"1")] * 2
            + [("c.jpg", b"3"), ("c.cls", b"2")],
        )
    )
    assert images_of(twice) == [b"3"] and twice.skipped == {"images without label": 4, "labels without image": 4}


def test_what_macos_and_a_nas_put_into_an_archive_is_skipped(tmp_path, images_of):
    apple = b"\0\5\x16\7Mac OS X"
    members = [("./._a.jpg", apple), ("./a.jpg", b"a"), ("./._a.cls", apple), ("./a.cls", b"0"), (".DS_Store", apple)]
    members += [
        ("__MACOSX/b.jpg", apple),
        ("__MACOSX/b.cls", apple),
        ("c/@eaDir/d.jpg", b"no"),
        ("c/@eaDir/d.cls", b"1"),
    ]
    source = open_source(tar(tmp_path / "a.tar", members))
    assert images_of(source) == [b"a"] and source.skipped == {"hidden files and folders": 7}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_that_were_joined_are_read_to_the_end(tmp_path, format, images_of):
    """With the zeros between them that tar pads an archive with, with two blocks, one, or megabytes."""
    parts = [
        tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", b"%d" % i), (f"{i}.cls", b"%d" % i)], format).read_bytes()
        for i in range(4)
    ]
    cut = [part.rstrip(b"\0") for part in parts]
    cut = [part + bytes(-len(part) % 512) for part in cut]
    joined = parts[0] + cut[1] + bytes(1024) + cut[2] + bytes(512) + cut[3] + bytes(3 << 20) + parts[0]
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined/all.tar").write_bytes(joined)
    source = open_source(tmp_path / "joined")
    assert images_of(source) == [b"0", b"1", b"2", b"3", b"0"] and source.labels.tolist() == [0, 1, 2, 3, 0]


def test_what_follows_the_end_and_is_no_member_is_an_error(tmp_path):
    """A hole in the middle, as an interrupted copy leaves it, or something appended."""
    whole = tar(
        tmp_path / "a.tar", [(f"{i}.{kind}", b"7" * 700) for i in range(6) for kind in ("jpg", "png")]
    ).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:3072] + bytes(2560) + whole[5632:])
    with pytest.raises(
        ValueError, match=r"a\.tar: the archive ends at byte 3072, and what follows at byte 5632 is no tar"
    ):
        open_source(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole + b"appended" * 100)
    with pytest.raises(ValueError, match=rf"ends at byte \d+, and what follows at byte {len(whole)} is no tar member"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("old", [True, False], ids=["gnu", "pax"])
def test_sparse_members_are_counted_and_passed(tmp_path, old, images_of):
    """By hand: the header of GNU's old form with a map that goes on in two further blocks; a header of the pax form."""
    whole = tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("a.cls", b"0"), ("b.jpg", b"s" * 600)]).read_bytes()
    header, content = bytearray(whole[2048:2560]), whole[2560:3584]
    if old:
        header[156:157], header[257:265], header[482] = b"S", b"ustar  \0", 1
        sparse = bytes(header) + (bytes(504) + b"\1" + bytes(7)) + bytes(512) + content
    else:
        info = tarfile.TarInfo("GNUSparseFile.0/b.jpg")
        info.size, info.pax_headers = 600, {"GNU.sparse.major": "1", "GNU.sparse.name": "b.jpg"}
        sparse = info.tobuf(tarfile.PAX_FORMAT) + content
    end = tar(tmp_path / "b.tar", [("b.cls", b"1"), ("c.jpg", b"c"), ("c.cls", b"1")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2048] + sparse + end)
    source = open_source(tmp_path / "a.tar")
    assert images_of(source) == [b"a", b"c"]
    assert source.skipped == {"sparse members": 1, "labels without image": 1}


def test_pax_names_with_line_breaks(tmp_path, images_of):
    members = [("a\nü.jpg", b"a"), ("a\nü.cls", b"3")]
    assert open_source(tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)).labels.tolist() == [3]


def test_names_that_are_not_utf8_are_kept_and_shown(tmp_path, images_of):
    """As programs write them that take text for Latin-1, or GBK."""
    name = os.fsdecode("张.1".encode("gbk"))
    good = open_source(tar(tmp_path / "a.tar", [(f"{name}.jpg", b"a"), (f"{name}.cls", b"0")]))
    assert images_of(good) == [b"a"] and os.fsencode(good.name(0)).endswith(b"member \xd5\xc5.1.jpg")
    with pytest.raises(ValueError, match="must hold a label") as error:
        open_source(tar(tmp_path / "b.tar", [(f"{name}.jpg", b"a"), (f"{name}.cls", b"one")]))
    assert r"member \xd5\xc5.1.cls must hold" in one_line(error.value)


def test_members_lead_nowhere(tmp_path, images_of):
    """Paths out of the folder are just names, links are no images, nothing is written."""
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, kind in (
            ("../../escape.jpg", tarfile.REGTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 4 if kind == tarfile.REGTYPE else 0
            shard.addfile(info, io.BytesIO(b"face"))
            label = tarfile.TarInfo(name[:-3] + "cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"0"))
    source = TarIndex.open(tmp_path)
    assert images_of(source) == [b"face"] and source.skipped["labels without image"] == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "tar.index"]


def test_every_truncation_is_one_clear_error(tmp_path):
    file = tar(
        tmp_path / "whole.tar", [("a.jpg", b"x" * 700), ("a.cls", b"1"), ("b.jpg", b"y"), ("b.cls", b"0")]
    ).read_bytes()
    complete = {0, 1536, 2560, 3584, 4608}  # where a member ends
    for cut in sorted({*range(0, 5200, 37), *range(0, 5200, 512)}):
        data = np.frombuffer(file[:cut], dtype=np.uint8)
        if cut in complete or cut >= 5120:  # from 5120 on, a block of zeros has closed the archive
            list(_members(memoryview(data), Counter()))
        else:
            with pytest.raises(ValueError, match="truncated"):
                list(_members(memoryview(data), Counter()))


@given(st.data())
def test_corruption_is_caught_or_harmless(data):
    """Members lie inside the file, in order, whatever its headers say; or there is one ValueError."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as shard:
        for name in ("a.jpg", "ä.cls"):
            info = tarfile.TarInfo(name)
            info.size = 5
            shard.addfile(info, io.BytesIO(b"12345"))
    damaged = bytearray(file.getvalue()[:4608])
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=5)):
        damaged[place] = data.draw(st.integers(0, 255))
    end = 0
    try:
        for _, start, size in _members(memoryview(np.frombuffer(damaged, dtype=np.uint8)), Counter()):
            assert end <= start and start + size <= len(damaged)
            end = start + size
    except ValueError as error:
        assert str(error)


def test_other_files(tmp_path):
    import gzip

    (tmp_path / "a.tar").write_bytes(gzip.compress(os.urandom(2000)))
    with pytest.raises(ValueError, match=r"a\.tar: is a file compressed by gzip; uncompress it"):
        TarIndex.open(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="it holds no image"):
        TarIndex.open(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"cannot open .*none: No such file"):
        TarIndex.open(tmp_path / "none")


def test_many_shards_need_few_open_files(tmp_path, monkeypatch, images_of):
    monkeypatch.setattr("scf_fast.pipelines.sources.packed._KEPT_OPEN", 2)
    for number in range(5):
        write_shard(tmp_path / f"{number}.tar", [("a", ".jpg", b"%d" % number, number)])
    before = len(os.listdir("/proc/self/fd"))
    source = TarIndex.open(tmp_path)
    source.will_need(np.arange(5))
    data, starts, lengths = source.read(np.array([4, 0, 2]))
    assert data.tobytes() == b"402" and starts.tolist() == [0, 1, 2] and lengths.tolist() == [1, 1, 1]
    assert (
        images_of(source) == [b"0", b"1", b"2", b"3", b"4"] and len(os.listdir("/proc/self/fd")) <= before + 1
    )  # the index


def test_written_shard_is_plain_tar(tmp_path):
    write_shard(tmp_path / "a.tar", [("000", ".jpg", b"one", 7), ("001", ".png", np.frombuffer(b"two", np.uint8), 0)])
    with tarfile.open(tmp_path / "a.tar") as shard:
        found = {member.name: shard.extractfile(member).read() for member in shard}
    assert found == {"000.jpg": b"one", "000.cls": b"7", "001.png": b"two", "001.cls": b"0"}
    assert json.loads(found["000.cls"]) == 7


def test_many_shards_leave_room_for_other_files(tmp_path):
    """A process may hold 1024 files as a rule, and several data sets have hundreds of shards each."""
    for number in range(40):
        tar(tmp_path / f"{number:02d}.tar", [(f"{number}.jpg", b"face"), (f"{number}.cls", b"%d" % (number % 3))])
    before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 60, limits[1]))
    try:
        source = open_source(tmp_path)
        assert len(os.listdir("/proc/self/fd")) < before + 10
        assert [source.encoded(i).tobytes() for i in range(40)] == [b"face"] * 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(ValueError, match=r"Too many open files \(`ulimit -n` raises the limit\)"):
            source.encoded(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
