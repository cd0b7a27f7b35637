"""What must be the same on all ranks is, or is one line that names the node and the way out."""

import collections
import dataclasses

import pytest
import torch

from scf_fast.config import BackboneConfig
from scf_fast.errors import InputError
from scf_fast.run import cluster_checks
from scf_fast.run.cluster_checks import Report, check_space, checkpoint_bytes, describe, differences, digest_of_code


def make_reports():
    """Two nodes with two ranks each, that are alike."""
    return [
        Report(
            rank,
            "ab"[rank // 2],
            "c0de",
            {"lr": 0.1, "seed": 1},
            {"torch": "2.13", "git": "x", "device": "H200"},
            1000.0,
            100,
            10,
            {"data": "d" * 64, "saved_bkb": "w"},
        )
        for rank in range(4)
    ]


def test_ranks_that_are_alike_may_start():
    assert differences(make_reports()) == []
    lines = describe(make_reports())
    assert lines[0] == "4 ranks: ranks 0-1 on a, ranks 2-3 on b" and "clocks within 0.0 s" in lines[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"code": "other"}, "the program's code of ranks 2-3 on b differs from that of rank 0 on a; install the same"),
        (
            {"options": {"lr": 0.2, "seed": 1}},
            "--lr of ranks 2-3 on b differs from that of rank 0 on a (0.2, 0.1 on a); start all ranks with the same",
        ),
        ({"versions": {"torch": "2.12"}}, "the version of torch of ranks 2-3 on b differs"),
        ({"images": 99}, "--data: the number of images of ranks 2-3 on b differs from that of rank 0 on a (99, 100"),
        ({"files": {"data": "e" * 64, "saved_bkb": "w"}}, "--data: the content of ranks 2-3 on b differs from"),
        ({"files": {"data": "d" * 64, "saved_bkb": "v"}}, "--saved_bkb: the content of ranks 2-3 on b differs from"),
        ({"clock": 1061.0}, "the clock of rank 2 on b is 61 s ahead of that of rank 0 on a; set them by NTP"),
        ({"clock": 900.0}, "the clock of rank 0 on a is 100 s ahead of that of rank 2 on b"),
    ],
)
def test_each_difference_is_one_line(changes, line):
    reports = make_reports()
    reports[2:] = [dataclasses.replace(report, **changes) for report in reports[2:]]
    found = differences(reports)
    assert len(found) == 1 and found[0].startswith(line)


def test_the_clock_may_differ_by_a_minute_and_commits_and_gpus_too():
    reports = make_reports()
    other = {"torch": "2.13", "git": "y", "device": "A100"}
    reports[3] = dataclasses.replace(reports[3], clock=1059.0, versions=other)
    assert differences(reports) == [] and "devices: A100, H200" in describe(reports)[1]


def test_the_code_is_known_by_its_bytes(tmp_path, monkeypatch):
    assert len(digest_of_code()) == 64
    monkeypatch.setattr(cluster_checks, "__file__", str(tmp_path / "scf_fast" / "run" / "cluster_checks.py"))
    (tmp_path / "scf_fast").mkdir()
    (tmp_path / "scf_fast" / "a.py").write_text("a = 1")
    before = digest_of_code()
    (tmp_path / "scf_fast" / "a.py").write_text("a = 2")
    assert digest_of_code() != before


def test_files_are_known_by_blocks_spread_over_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_checks, "_BLOCK_BYTES", 4)
    (tmp_path / "w.pth").write_bytes(b"0" * 1000)
    before = cluster_checks._digest_of_files(str(tmp_path / "w.pth"))
    for changed in (b"1" + b"0" * 999, b"0" * 999 + b"1", b"0" * 1001):
        (tmp_path / "w.pth").write_bytes(changed)
        assert cluster_checks._digest_of_files(str(tmp_path / "w.pth")) != before
        assert cluster_checks._digest_of_files(str(tmp_path / "*.pth")) != before


def test_a_disk_without_room_for_the_checkpoints_is_one_line(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(cluster_checks.shutil, "disk_usage", lambda path: usage(0, 0, 4_000_000_000))
    config = BackboneConfig(data="d", output_dir=str(tmp_path / "new" / "run"), keep_checkpoints=2)
    assert "3 checkpoints of 1 GB and the exported weights, 4 GB are free" in check_space(config, 1_000_000_000)
    with pytest.raises(
        InputError, match=r"--output_dir .*: has no room for 3 checkpoints of 1 GB.*--keep_checkpoints than 2"
    ):
        check_space(config, 1_000_000_001)
    old = tmp_path / "new" / "run" / "checkpoints" / "step00000004"
    old.mkdir(parents=True)
    (old / "rank0.pt").write_bytes(b"0" * 8)
    check_space(config, 1_000_000_001)  # what it replaces counts as free


def test_bytes_of_a_checkpoint():
    weights = [torch.nn.Parameter(torch.zeros(10, 10))]
    assert checkpoint_bytes(torch.optim.Adam(weights)) == 1200
    assert checkpoint_bytes(torch.optim.SGD(weights, lr=0.1, momentum=0.9)) == 800


def test_check_only_checks(faces, flags, tmp_path, fork_ranks):
    command = [*flags["stage1"], "--data", faces / "train", "--output_dir", tmp_path / "deep" / "run", "--check"]
    status, output = fork_ranks(2, *command)
    assert status == 0, output
    for line in (
        "checked: 2 ranks: ranks 0-1 on",
        "checked: the same data on all: 128 images, 8 identities",
        "all is ready",
    ):
        assert line in output
    assert "checkpoints of" in output and not (tmp_path / "deep").exists()
