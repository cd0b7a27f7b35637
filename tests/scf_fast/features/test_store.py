import errno
import json
import os
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scf_fast.features.open import cache_key
from scf_fast.features.records import CacheLayout, decode, encoding_error
from scf_fast.features.store import CacheKey, FeatureCache, read_meta
from scf_fast.pipelines.waiting import TimedOut

KEY = CacheKey("b", "d", "insightface", "fp32")


def views(layout, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, layout.z_dim, generator=generator),
            torch.randn(rows, *layout.convf_shape, generator=generator) * 3,
        )
        for _ in range(2)
    ]


@pytest.fixture
def small(tmp_path):
    layout = CacheLayout(50, 8, (4, 3, 3), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
    return tmp_path / "c", layout


def test_write_then_read_both_orientations_in_any_order(small, monkeypatch):
    monkeypatch.setattr("scf_fast.features.records._SHARD_BYTES", 2000)  # several shards
    folder, _ = small
    layout = CacheLayout(50, 8, (4, 3, 3), "fp32")
    folder = folder.with_name("sharded")
    FeatureCache.create_or_check(folder, KEY, layout)
    assert len(list(folder.glob("rows-*.bin"))) > 3
    cache = FeatureCache.open(folder, layout, 0)
    indices = np.array([49, 3, 17, 0, 31])
    plain, turned = views(layout, 5)
    cache.write(indices, [plain, turned])
    cache.close()
    again = FeatureCache.open(folder, layout, 0)
    assert again.present.nonzero()[0].tolist() == sorted(indices)
    order = np.array([2, 0, 4])
    flips = np.array([False, True, True])
    features, convf = decode(layout, again.read(indices[order], flips))
    for row, (place, flip) in enumerate(zip(order, flips)):
        expected = turned if flip else plain
        assert torch.equal(features[row], expected[0][place]) and torch.equal(convf[row], expected[1][place])
    again.close()


def store_ten(folder, layout):
    cache = FeatureCache.open(folder, layout, 0)
    cache.write(np.arange(10), views(layout, 10))
    cache.close()


def test_damaged_record_becomes_missing_and_only_that(small):
    folder, layout = small
    store_ten(folder, layout)
    with open(folder / "rows-00000.bin", "r+b") as file:
        file.seek(4 * layout.record_bytes + 20)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    cache = FeatureCache(folder, layout, 0)
    assert cache.verify(progress=False) == 1
    assert (~cache.present[:10]).nonzero()[0].tolist() == [4]
    stored = np.fromfile(folder / "rows-00000.bin", np.uint8).reshape(-1, layout.record_bytes)
    halves = [zlib.crc32(stored[3, start : start + layout.view_bytes].tobytes()) for start in (0, layout.view_bytes)]
    assert np.fromfile(folder / "checksums.bin", np.uint32).reshape(-1, 2)[3].tolist() == halves


def test_a_full_disk_leaves_what_is_stored_and_the_rest_missing(small, monkeypatch, caplog):
    folder, layout = small
    cache = FeatureCache.open(folder, layout, 0)
    cache.write(np.arange(3), views(layout, 3))
    cache.refresh()
    monkeypatch.setattr(
        "os.pwrite", lambda file, data, offset: len(data) // 2
    )  # as on a disk with room for half a record
    for _ in range(3):
        cache.write(np.arange(3, 6), views(layout, 3))
        cache.refresh()
    cache.close()
    assert caplog.text.count("cannot be written (No space left on device)") == 1 and cache.problem is not None
    monkeypatch.undo()
    assert FeatureCache(folder, layout, 0).present.nonzero()[0].tolist() == [0, 1, 2]


def test_a_damaged_record_is_refused_when_it_is_read_and_made_anew(small):
    folder, layout = small
    store_ten(folder, layout)
    with open(folder / "rows-00000.bin", "r+b") as file:
        file.seek(4 * layout.record_bytes + layout.view_bytes + 20)  # in the mirrored half
        file.write(b"\xa5\xa5")
    cache = FeatureCache.open(folder, layout, 0)
    cache.read(np.arange(10), np.zeros(10, dtype=bool))
    with pytest.raises(ValueError, match="the record of image 4 is damaged; start again with --resume"):
        cache.read(np.arange(10), np.ones(10, dtype=bool))
    cache.close()
    cache = FeatureCache.open(folder, layout, 0)
    assert (~cache.present[:10]).nonzero()[0].tolist() == [4]
    cache.write(np.array([4]), [tuple(value[4:5] for value in view) for view in views(layout, 10)])
    cache.refresh()
    cache.read(np.arange(10), np.ones(10, dtype=bool))
    cache.close()


def test_a_cache_left_open_is_checked_before_it_is_used(small):
    folder, layout = small
    cache = FeatureCache.open(folder, layout, 1)
    cache.write(np.arange(3), views(layout, 3))
    cache.refresh()
    cache._checksums[2] += 1  # a record half written when the machine died
    cache._checksums.flush()
    assert (folder / "writing-1").exists()
    with pytest.raises(ValueError, match="another run is writing to it; wait for its end, or give another folder"):
        FeatureCache.create_or_check(folder, KEY, layout)
    with pytest.raises(ValueError, match="another run is writing to it"):
        FeatureCache.open(folder, layout, 1)
    assert (folder / "writing-1").exists()
    cache._mark._file.close()  # as the system does when a process ends
    FeatureCache.create_or_check(folder, KEY, layout)
    assert not list(folder.glob("writing-*"))
    assert FeatureCache(folder, layout, 0).present.nonzero()[0].tolist() == [0, 1]


def test_a_complete_cache_is_read_by_several_runs_at_once(small):
    folder, layout = small
    first = FeatureCache.open(folder, layout, 0)
    first.write(np.arange(layout.num_images), views(layout, layout.num_images))
    first.close()
    runs = [FeatureCache.open(folder, layout, 0) for _ in range(2)]
    assert not list(folder.glob("writing-*"))
    FeatureCache.create_or_check(folder, KEY, layout)  # a third run finds no mark, and so checks nothing
    for run in runs:
        run.read(np.arange(5), np.zeros(5, dtype=bool))
        run.close()


@pytest.mark.parametrize("change", ["backbone", "data", "normalization", "precision", "dtype", "num_images"])
def test_a_cache_of_something_else_is_refused(small, change):
    folder, layout = small
    key = KEY
    if hasattr(KEY, change):
        key = replace(KEY, **{change: "other"})
    else:
        layout = replace(layout, **{change: "bf16" if change == "dtype" else 49})
    with pytest.raises(ValueError, match=f"was made for something else \\({change}: cached .*, needed"):
        FeatureCache.create_or_check(folder, key, layout)


@given(
    st.one_of(
        st.binary(),
        st.recursive(
            st.none() | st.integers() | st.text() | st.floats(),
            lambda inner: st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["format", "key", "layout", "convf_error", "num_images", "z_dim", "convf_shape", "dtype"]
                ),
                inner,
            ),
            max_leaves=10,
        ).map(lambda v: json.dumps(v).encode()),
    ),
    st.dictionaries(
        st.sampled_from(["num_images", "z_dim", "convf_shape", "dtype"]),
        st.integers() | st.lists(st.integers()) | st.text() | st.none(),
    ),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_meta_is_read_or_refused(small, content, changes):
    folder, _ = small
    good = (folder / "meta.json").read_bytes()
    changed = json.loads(good)
    changed["layout"].update(changes)
    try:
        for text in (content, json.dumps(changed).encode()):
            (folder / "meta.json").write_bytes(text)
            try:
                layout = read_meta(folder).layout
            except ValueError as error:
                assert "meta.json is damaged" in str(error)
            else:
                assert layout.record_bytes > 0 and layout.rows_per_shard > 0
    finally:
        (folder / "meta.json").write_bytes(good)


def test_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=120_000_000))
    with pytest.raises(
        ValueError,
        match=r"needs 0\.392 GB for 1000000 images, but 0\.12 GB .*use --cache_dtype int8, or --cache_budget 0\.108",
    ):
        FeatureCache.create_or_check(tmp_path / "c", KEY, CacheLayout(1_000_000, 8, (4, 3, 3), "fp32"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"but 1e-07 GB are free; use --cache_dtype int8 and another disk$"):
        FeatureCache.create_or_check(tmp_path / "c", KEY, CacheLayout(1_000_000, 8, (4, 3, 3), "fp32"))


def test_a_cache_that_does_not_fit_leaves_nothing_and_takes_no_room_from_the_next(tmp_path, monkeypatch):
    layout, folder = CacheLayout(1000, 8, (4, 3, 3), "fp32"), tmp_path / "c"
    allocate, calls = os.posix_fallocate, []

    def refuse(descriptor, start, size):
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, start, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(ValueError, match=r"cannot allocate .*No space left"):
            FeatureCache.create_or_check(folder, KEY, layout)
    assert not list(folder.iterdir())
    (folder / "rows-00007.bin").write_bytes(bytes(1000))  # a killed process's
    (folder / "notes.txt").write_text("mine")
    FeatureCache.create_or_check(folder, KEY, layout)
    assert {path.name for path in folder.iterdir()} == {"meta.json", "rows-00000.bin", "checksums.bin", "notes.txt"}


def test_meta_reads_back_and_damage_is_named(small):
    folder, layout = small
    assert read_meta(folder).layout == layout
    (folder / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        read_meta(folder)
    with pytest.raises(ValueError, match="holds no feature cache"):
        read_meta(folder.parent)


def test_key_follows_weights_and_data():
    class Source:
        labels = np.arange(5)

        def __len__(self):
            return 5

        def encoded(self, i):
            return np.full(3, i + self.shift, np.uint8)

        shift = 0

    state = {"w": torch.ones(3)}
    key = cache_key(state, Source(), "published", "bf16")
    assert cache_key({"w": torch.ones(3)}, Source(), "published", "bf16") == key
    assert cache_key({"w": torch.tensor([1.0, 1.0, 2.0])}, Source(), "published", "bf16").backbone != key.backbone
    changed = Source()
    changed.shift = 1
    assert cache_key(state, changed, "published", "bf16").data != key.data


def test_a_file_cut_short_is_said(small):
    folder, layout = small
    cache = FeatureCache.open(folder, layout, 0)
    cache.write(np.arange(50), views(layout, 50))
    cache.refresh()
    os.truncate(folder / "rows-00000.bin", 49 * layout.record_bytes + 5)
    with pytest.raises(OSError, match="image 49 lies beyond the end of its file"):
        cache.read(np.array([3, 49]), np.array([False, True]))
    cache.close()


def test_a_map_that_the_dtype_cannot_hold_is_refused(tmp_path):
    layout = CacheLayout(1, 8, (4, 3, 3), "fp16")
    (features, convf), _ = views(layout, 16)
    error = encoding_error(layout, features, 1e5 * convf)
    with pytest.raises(ValueError, match="--cache_dtype fp16: cannot hold the last map"):
        FeatureCache.create_or_check(tmp_path / "c", KEY, layout, error)
    assert not (tmp_path / "c").exists()


def test_a_disk_that_hangs_ends_reading_and_writing_with_the_caches_name(small, monkeypatch):
    """Writing in the background, and closing after it, which does not wait once more."""
    monkeypatch.setattr("scf_fast.pipelines.waiting._JOIN", 0.1)
    folder, layout = small
    cache, hang = FeatureCache.open(folder, layout, 0, timeout=0.3), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: hang.wait())
        cache.write(np.arange(4), views(layout, 4))
        with pytest.raises(
            TimedOut, match=f"^stage 2 has waited 0 s for the background writer of the feature cache {folder}"
        ):
            cache.flush()
    began = time.monotonic()
    with pytest.raises(TimedOut):  # the writer is still held up
        cache.close()
    assert time.monotonic() - began < 2 and (folder / "writing-0").exists()
    hang.set()


def test_a_disk_that_is_slow_is_waited_for(small, monkeypatch):
    folder, layout = small
    cache, write = FeatureCache.open(folder, layout, 0, timeout=0.3), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *arguments: (time.sleep(0.1), write(*arguments))[1])
    cache.write(np.arange(48), views(layout, 48))  # six of each of the eight threads: twice the limit
    cache.close()
    again = FeatureCache.open(folder, layout, 0)
    assert again.present.sum() == 48
    again.close()
