"""Whose folder it is, and what --overwrite may delete."""

import dataclasses
import json
import os
import time
import zlib

import pytest
import yaml

from scf_fast import config as configuration
from scf_fast.config import BackboneConfig, ConfidenceConfig
from scf_fast.errors import Incomplete
from scf_fast.run import folder as run_folder
from scf_fast.run import folder_lock
from scf_fast.run.same_folder import SameFolder


def stage2(folder, **changes):
    return ConfidenceConfig(
        **{
            "data": "data",
            "saved_bkb": "b.pth",
            "saved_fc": "f.pth",
            "output_dir": str(folder),
            "normalization": "published",
            **changes,
        },
    )


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    configuration.save(stage2(run), run / run_folder.CONFIG_FILE, {})
    return run


@pytest.mark.parametrize("flag", ["data", "saved_bkb", "saved_fc", "feature_cache", "index_dir"])
def test_overwrite_is_refused_where_it_would_delete_what_the_run_reads(folder, flag, tmp_path):
    run_folder.claim(stage2(folder, overwrite=True))
    link = tmp_path / "link"
    link.symlink_to(folder)
    for inside in (folder, folder / "x", link / "x", f"elsewhere,{folder / 'x'}"):
        with pytest.raises(ValueError, match=f"--overwrite would delete all of .*, and --{flag} .* lies in it"):
            run_folder.claim(stage2(folder, overwrite=True, **{flag: str(inside)}))


def test_overwrite_is_refused_where_it_would_delete_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in (".", "..", str(folder)):
        with pytest.raises(ValueError, match=r"the current folder \. lies in it"):
            run_folder.claim(stage2(name, overwrite=True))


def test_a_path_may_be_spelled_in_another_way(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    again = stage2(
        folder,
        resume=True,
        data=str(tmp_path / "data/"),
        saved_bkb="./b.pth",
        saved_fc="../" + tmp_path.name + "/f.pth",
    )
    assert run_folder.claim(again) is None  # the same run, without a checkpoint
    with pytest.raises(ValueError, match=r"holds a different run \(saved_fc"):
        run_folder.claim(stage2(folder, resume=True, saved_fc="g.pth"))


def test_other_pixels_are_another_run(folder):
    assert run_folder.claim(stage2(folder, resume=True)) is None
    assert (
        run_folder.claim(dataclasses.replace(stage2(folder, resume=True), normalization=None)) is None
    )  # stage 2 finds it out
    with pytest.raises(ValueError, match="normalization 'published' -> 'insightface'"):
        run_folder.claim(stage2(folder, resume=True, normalization="insightface"))


def test_an_option_that_the_run_did_not_know_yet_had_its_default(folder):
    """As in a folder of an earlier version."""
    path = folder / run_folder.CONFIG_FILE
    saved = yaml.safe_load(path.read_text())
    del saved["config"]["confidence_net"], saved["crc32"]
    path.write_text(yaml.safe_dump(saved))
    assert run_folder.claim(stage2(folder, resume=True)) is None
    with pytest.raises(ValueError, match="confidence_net 'mlp' -> 'conv'"):
        run_folder.claim(stage2(folder, resume=True, confidence_net="conv"))


STATE = {"step": 4, "schedule": {}, "num_classes": 2, "num_images": 8, "metric": None, "epoch_loss": [1.0, 2.0]}


def write_state(folder, **more):
    """The newest checkpoint of the run, with a file in place of the weights."""
    point = folder / run_folder.CHECKPOINTS / "step00000004"
    point.mkdir(parents=True)
    (point / "rank0.pt").write_bytes(b"weights")
    files = {"rank0.pt": [7, zlib.crc32(b"weights")]}
    state = {**STATE, "world_size": 1, "zero_stage": 0, "files": files, **more}
    (point / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("in_state", "in_config", "slope"),
    [
        ({}, {}, "exact"),  # before there was another
        ({}, {"slope": "bounded"}, "bounded"),  # while config.yaml alone had it
        ({"slope": "exact"}, {"slope": "bounded"}, "exact"),
        ({"slope": "bounded"}, {"slope": "exact"}, "bounded"),
        ({}, None, "exact"),  # the file was deleted
        ({"slope": "bounded"}, None, "bounded"),
    ],
)
def test_a_run_goes_on_with_the_slope_that_it_began_with(in_state, in_config, slope, folder):
    path = folder / run_folder.CONFIG_FILE
    saved = yaml.safe_load(path.read_text())
    del saved["crc32"]
    for name in ("slope", "initial_kappa", "max_first_step", "objective", "update_rule", "variance", "validation"):
        del saved["config"][name]
    if in_config is None:
        path.unlink()
    else:
        path.write_text(yaml.safe_dump({**saved, "config": saved["config"] | in_config}))
    write_state(folder, **in_state)
    for given in ({}, {"slope": "exact"}, {"slope": "bounded"}):
        config = stage2(folder, resume=True, lr=0.5, **given)
        found = run_folder.continued(config, run_folder.claim(config))
        assert found == dataclasses.replace(config, slope=slope)


def test_stage_1_has_no_slope(folder):
    config = BackboneConfig(data="data", output_dir=str(folder), resume=True)
    configuration.save(config, folder / run_folder.CONFIG_FILE, {})
    write_state(folder)
    assert run_folder.continued(config, run_folder.claim(config)) is config


@pytest.mark.parametrize(("resume", "message"), [(False, "give --resume to continue it"), (True, "start again with")])
def test_a_claim_is_repeated_once_the_folder_is_locked(resume, message, tmp_path):
    """Two launches find nothing; the second must not write over what the first has left by then."""
    config = stage2(tmp_path / "new", resume=resume)
    assert run_folder.claim(config) is None
    (tmp_path / "new").mkdir()
    with run_folder.prepare(config, is_locked=False):
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "checkpoints", "config.yaml"]
        write_state(tmp_path / "new")
    kept = (tmp_path / "new" / run_folder.CONFIG_FILE).stat().st_mtime_ns
    with pytest.raises(ValueError, match=message), run_folder.prepare(config, is_locked=False):
        pass
    assert (tmp_path / "new" / run_folder.CONFIG_FILE).stat().st_mtime_ns == kept


def test_overwrite_leaves_the_lock(folder):
    (folder / "checkpoints").mkdir()
    with folder_lock.locked(folder), run_folder.prepare(stage2(folder, overwrite=True), is_locked=True):
        assert (folder / ".lock").exists() and not list((folder / "checkpoints").iterdir())
    assert not (folder / ".lock").exists()


def test_a_folder_that_pytorch_cannot_map_files_in_is_refused_before_the_work(tmp_path):
    """Its name is not UTF-8; data of such names is no hindrance (test_names_of_bytes.py)."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xca\xfd")
    with pytest.raises(ValueError, match="its name must be UTF-8, or PyTorch cannot map the files in it"):
        run_folder.claim(stage2(name))
    assert run_folder.claim(stage2(tmp_path / "数据", data=name)) is None


def wait_for(path, launch):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert launch.poll() is None and time.monotonic() < deadline, launch.log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_run_whose_folder_has_gone_ends_and_writes_nothing_elsewhere(is_deleted, faces, flags, tmp_path, start_ranks):
    """Deleted, or unmounted: the empty folder beneath has another inode. The other one comes back in time."""
    run, away = tmp_path / "run", tmp_path / "away"
    more = ["--epochs", 400, "--checkpoint_every", 2, "--data", faces / "train", "--output_dir", run]
    launch = start_ranks(1, "-m", "scf_fast.train", *flags["stage1"], *more)
    wait_for(run / "checkpoints" / "latest", launch)
    run.rename(away)
    if not is_deleted:
        run.mkdir()
    assert launch.wait() == 1
    what = "has gone" if is_deleted else "is no longer the folder that this run began in"
    assert f"--output_dir {run}: {what}" in launch.log.read_text()
    assert is_deleted == (not run.exists()) and (is_deleted or not any(run.iterdir()))
    assert "Traceback" not in launch.log.read_text()


def test_a_run_waits_for_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr("scf_fast.run.same_folder.all_ranks_agree", lambda own: own)
    waits, gives_up = SameFolder(folder, 60), SameFolder(folder, 0.01)
    folder.rename(tmp_path / "away")
    with pytest.raises(Incomplete, match=r"has gone.*mount it again and --resume, from step00000004"):
        gives_up.require("step00000004")
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / "away").rename(folder))
    waits.require(None)
