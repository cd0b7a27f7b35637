"""DALI's files in the temporary folder are gone once they are imported; those of killed processes at the next start."""

import os
import sys
import tempfile
import time

import numpy as np
import pytest

from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading import generated_files
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import EncodedImages

OURS = "def outer_factory():\n    def autograph___face_pipeline(feed):\n        pass\n"


def read_faces(dali):
    source = EncodedImages([dali._PROBE[0][0].tobytes()] * 4, labels=np.zeros(4))
    with make_loader(source, EpochSampler(4, 2), backend="dali", num_workers=1) as loader:
        return len(list(loader.batches(0)))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def leave(folder, name, text, age=3600.0):
    path = folder / name
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_run_leaves_nothing_and_takes_what_a_killed_one_has_left(temporary, monkeypatch):
    api = pytest.importorskip("nvidia.dali._autograph.impl.api")
    from nvidia.dali._autograph.pyct import cache

    from scf_fast.pipelines.loading import dali

    read_faces(dali)  # makes the translator
    monkeypatch.setattr(api._TRANSPILER, "_cache", cache.CodeObjectCache())  # else a process translates once
    dali._tidy_up.cache_clear()
    leave(temporary, "__autograph_generated_file_killed.py", OURS)
    others = leave(temporary, "__autograph_generated_file_tf.py", "def tf__call(x):\n    pass\n")
    before = set(sys.modules)
    assert read_faces(dali) == 2
    assert any(name.startswith("__autograph_generated_file") for name in set(sys.modules) - before)  # there was one
    assert list(temporary.rglob("*")) == [others]
    assert not sys.dont_write_bytecode or os.environ.get("PYTHONDONTWRITEBYTECODE")


def test_only_what_is_ours_and_old_is_deleted(temporary):
    kept = [
        leave(temporary, "__autograph_generated_file_young.py", OURS, age=5),
        leave(temporary, "__autograph_generated_file_other.py", "def autograph__another_pipeline(x):\n    pass\n"),
        leave(temporary, "something_else.py", OURS),
    ]
    link = temporary / "__autograph_generated_file_link.py"
    link.symlink_to(leave(temporary, "target.txt", OURS))
    leave(temporary, "__autograph_generated_file_ours.py", OURS)
    (temporary / "__pycache__").mkdir()
    (temporary / "__pycache__" / "__autograph_generated_file_ours.cpython-311.pyc").touch()
    assert generated_files.delete_left_over("_face_pipeline") == 1
    found = {path.name for path in temporary.rglob("*")}
    assert found == {*(path.name for path in kept), link.name, "target.txt", "__pycache__"}
