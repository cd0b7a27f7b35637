"""Whose folder it is, and what --overwrite may delete."""

import dataclasses

import pytest
import yaml

from scf_fast import config as configuration
from scf_fast.config import ConfidenceConfig
from scf_fast.run import folder as run_folder


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
    del saved["config"]["confidence_net"]
    path.write_text(yaml.safe_dump(saved))
    assert run_folder.claim(stage2(folder, resume=True)) is None
    with pytest.raises(ValueError, match="confidence_net 'mlp' -> 'conv'"):
        run_folder.claim(stage2(folder, resume=True, confidence_net="conv"))
