"""Two nodes, for real: both stages, and the ways in which several nodes break. ``make cluster`` runs this file.

The table of what happens when in docs/clusters.md is taken from these tests.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

COMMON = ["--batch_size", 32, "--epochs", 2, "--log_every", 1, "--num_workers", 1, "--no_tensorboard"]
STAGE_1 = ["--stage", "backbone", "--network", "ir_small", "--z_dim", 32, "--lr", 0.01, "--zero_stage", 1, *COMMON]
STAGE_2 = ["--stage", "confidence", "--confidence_net", "mlp", "--precision", "fp32", *COMMON]
ENDLESS = ["--epochs", 500]
TIMEOUT = 3.0
STEPS = 8


def losses(folder, key="loss"):
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(nodes, faces, tmp_path_factory):
    """A stage 1 that nothing has disturbed, on both nodes, started as Slurm starts two tasks."""
    out = tmp_path_factory.mktemp("whole") / "run"
    nodes.new_port()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "nodea,nodeb", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    launches = []
    for rank in (0, 1):
        task = {**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank)}
        task |= {name: None for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
        launches.append(nodes.start(rank, *STAGE_1, "--data", faces, "--output_dir", out, variables=task))
    for launch in launches:
        assert launch.wait(120) == 0, launch.log.read_text()
    assert "2 ranks on cpu" in launches[0].log.read_text()
    return out


def test_srun_trains_on_two_nodes_whose_names_resolve_to_their_loopback(whole):
    assert len(losses(whole)) == STEPS and not list(whole.glob(".lock*"))


def test_torchrun_both_stages_with_a_resume_on_one_node(nodes, faces, whole, tmp_path):
    """Stage 2 reads data, index and weights from each node's own disk, and keeps its features there."""
    flags = [*STAGE_1, "--data", faces, "--output_dir", tmp_path / "run"]
    started = nodes.torchrun(*flags, "--max_steps", 5, log=tmp_path / "first")
    assert [process.wait(120) for process in started] == [0, 0], (tmp_path / "first.nodea").read_text()
    assert losses(tmp_path / "run") == losses(whole)[:5]
    nodes.new_port()
    resumed = [nodes.start(rank, *flags, "--resume", node=nodes.a) for rank in (0, 1)]
    assert [launch.wait(120) for launch in resumed] == [0, 0], resumed[0].log.read_text()
    assert "resumed at step 5" in resumed[0].log.read_text()
    assert losses(tmp_path / "run") == losses(whole)
    for node in (nodes.a, nodes.b):
        shutil.copytree(faces, node.disk / "train", ignore=shutil.ignore_patterns("*.npy", "*.npz"))
        for name in ("backbone.pth", "fc.pth"):
            shutil.copy(whole / name, node.disk / name)
    weights = ["--saved_bkb", nodes.local / "backbone.pth", "--saved_fc", nodes.local / "fc.pth"]
    flags = [*STAGE_2, *weights, "--data", nodes.local / "train", "--output_dir", tmp_path / "stage2"]
    cache = ["--feature_cache", nodes.local / "cache", "--cache_dtype", "fp32"]
    ended = nodes.train(*flags, *cache, "--feature_cache_local")
    assert [status for status, _ in ended] == [0, 0], ended
    assert "on each node, has room for 128 of 128 images" in ended[0][1]
    assert all((node.disk / "cache" / "meta.json").exists() for node in (nodes.a, nodes.b))
    ended = nodes.train(*flags[:-1], tmp_path / "plain")
    assert [status for status, _ in ended] == [0, 0], ended
    assert losses(tmp_path / "stage2", "total_loss") == pytest.approx(
        losses(tmp_path / "plain", "total_loss"), rel=1e-4
    )
    # The copy of node b is another one by now.
    content = bytearray((nodes.b.disk / "train" / "train.rec").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    (nodes.b.disk / "train" / "train.rec").write_bytes(content)
    for status, output in nodes.train(*flags[:-1], tmp_path / "other", "--check"):
        assert status == 2 and "--data: the content of rank 1 on nodeb differs from that of rank 0 on nodea" in output


def test_deepspeed_with_a_hostfile(nodes, faces, whole, tmp_path):
    """As started on each node by hand; ssh and pdsh start the same command there."""
    started = nodes.deepspeed(*STAGE_1, "--data", faces, "--output_dir", tmp_path / "run", log=tmp_path / "log")
    assert [process.wait(120) for process in started] == [0, 0], (tmp_path / "log.nodea").read_text()
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize("flag", ["output_dir", "feature_cache"])
def test_folders_that_must_be_shared_are_found_out(nodes, faces, whole, tmp_path, flag):
    weights = ["--saved_bkb", whole / "backbone.pth", "--saved_fc", whole / "fc.pth", "--data", faces]
    folders = {"output_dir": tmp_path / "run", "feature_cache": tmp_path / "cache", flag: nodes.local / "own"}
    named = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    for status, output in nodes.train(*STAGE_2, *weights, *named, "--check"):
        lines = [line for line in output.splitlines() if "error" in line]
        assert status == 2 and len(lines) == 1, output
        assert f"--{flag} {nodes.local / 'own'}: it must be one folder on storage that all nodes share" in lines[0]
        assert "rank 1 on nodeb does not see what rank 0 on nodea has written there" in lines[0]
    assert not (nodes.a.disk / "own").exists() and not (tmp_path / "run").exists()


def endless(nodes, faces, out, *more):
    return nodes.start_both(
        *STAGE_1, *ENDLESS, "--checkpoint_every", 4, "--data", faces, "--output_dir", out, "--timeout", TIMEOUT, *more
    )


def test_a_link_that_goes_down_ends_both_nodes_by_name(nodes, faces, tmp_path, wait_for_step):
    launches = endless(nodes, faces, tmp_path / "run")
    wait_for_step(tmp_path / "run", 6)
    nodes.b.set_link("down")
    began = time.monotonic()
    try:
        statuses = [launch.wait(60) for launch in launches]
        seconds = time.monotonic() - began
    finally:
        nodes.b.set_link("up")
    texts = [launch.log.read_text() for launch in launches]
    assert statuses == [1, 1] and seconds < TIMEOUT + 5, (statuses, seconds, texts)
    assert re.search(
        r"no sign of life for \d s from rank 1 on nodeb \(pid \d+\): stopped or dead, or cut off", texts[0]
    )
    assert re.search(r"rank 0 on nodea \(pid \d+\)", texts[1]) and "network" in texts[1]
    assert not any("Traceback" in text for text in texts)
    again = nodes.train(*STAGE_1, "--data", faces, "--output_dir", tmp_path / "run", "--resume", "--max_steps", 9)
    assert [status for status, _ in again] == [0, 0] and "resumed at step" in again[0][1], again


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_other_by_name(nodes, faces, tmp_path, wait_for_step, stopped):
    launches = endless(nodes, faces, tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    rank = launches[stopped].ranks[0]
    os.kill(rank, signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert launches[1 - stopped].wait(60) == 1
        assert time.monotonic() - began < TIMEOUT + 5
        text = launches[1 - stopped].log.read_text()
        named = f"rank {stopped} on node{'ab'[stopped]} (pid {rank})"
        assert named in text and "Traceback" not in text, text
    finally:
        os.kill(rank, signal.SIGCONT)
    assert launches[stopped].wait(60) == 1  # it finds itself alone


def test_a_killed_rank_ends_the_other_node_by_name(nodes, faces, tmp_path, wait_for_step):
    launches = endless(nodes, faces, tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    rank = launches[1].ranks[0]
    os.kill(rank, signal.SIGKILL)
    began = time.monotonic()
    assert launches[0].wait(60) == 1 and time.monotonic() - began < 2 * TIMEOUT + 5
    text = launches[0].log.read_text()
    assert f"rank 1 on nodeb (pid {rank})" in text and "Traceback" not in text, text


def test_a_signal_to_one_node_stops_both_after_a_checkpoint(nodes, faces, tmp_path, wait_for_step):
    launches = endless(nodes, faces, tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    os.kill(launches[1].ranks[0], signal.SIGTERM)
    assert [launch.wait(60) for launch in launches] == [75, 75]
    assert "stopped by" in launches[0].log.read_text()


def test_one_node_alone_says_whom_it_waits_for(nodes, faces, tmp_path):
    nodes.new_port()
    launch = nodes.start(0, *STAGE_1, "--data", faces, "--output_dir", tmp_path / "run", "--timeout", 0.3)
    assert launch.wait(60) == 2
    assert "rank 1 of 2 have not joined at MASTER_ADDR=10.77.0.1" in launch.log.read_text()
    launch = nodes.start(1, *STAGE_1, "--data", faces, "--output_dir", tmp_path / "run", "--timeout", 0.3)
    assert launch.wait(60) == 2
    assert "rank 0 has not been reached from nodeb at MASTER_ADDR=10.77.0.1" in launch.log.read_text()


def test_an_interface_that_does_not_lead_to_the_other_node_is_one_line(nodes, faces, tmp_path):
    flags = [*STAGE_1, "--data", faces, "--output_dir", tmp_path / "run"]
    for status, output in nodes.train(*flags, variables={"GLOO_SOCKET_IFNAME": "eth7"}):
        assert status == 2 and "set GLOO_SOCKET_IFNAME" in output and "Traceback" not in output, output


def test_a_loopback_that_is_down_is_one_line(nodes, faces, tmp_path):
    flags = [*STAGE_1, "--data", faces, "--output_dir", tmp_path / "run"]
    command = ["ip", "-n", nodes.b.namespace, "link", "set", "lo"]
    subprocess.run([*command, "down"], check=True)
    try:
        nodes.new_port()
        launch = nodes.start(0, *flags, node=nodes.b, variables={"MASTER_ADDR": "127.0.0.1"})
        assert launch.wait(60) == 2
        assert "its loopback interface is down (ip link set lo up)" in launch.log.read_text()
    finally:
        subprocess.run([*command, "up"], check=True)


def rank_of(process):
    """The process id of the rank that a torchrun has started; its own children have its variables too."""
    network, found = os.readlink(f"/proc/{process.pid}/ns/net"), {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/net") == network:
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                if any(variable.startswith(b"RANK=") for variable in variables):
                    found[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    (rank,) = (child for child, parent in found.items() if parent not in found)
    return rank


def test_torchrun_starts_again_and_goes_on_with_fewer_nodes(nodes, faces, tmp_path, wait_for_step):
    """A rank that is killed, and then a node that is gone: each time from the newest checkpoint."""
    out, log = tmp_path / "run", tmp_path / "log"
    flags = [*STAGE_1, "--epochs", 8, "--checkpoint_every", 2, "--data", faces, "--output_dir", out, "--resume"]
    options = ["--nnodes", "1:2", "--max_restarts", 3]
    started = nodes.torchrun(*flags, "--timeout", TIMEOUT, options=options, static=False, log=log)
    try:
        wait_for_step(out, 5)
        os.kill(rank_of(started[1]), signal.SIGKILL)
        wait_for_step(out, 12)
        nodes.b.kill_all()
        assert started[0].wait(120) == 0, (tmp_path / "log.nodea").read_text()
    finally:
        nodes.a.kill_all()
        nodes.b.kill_all()
    text = (tmp_path / "log.nodea").read_text()
    resumed = [int(step) for step in re.findall(r"resumed at step (\d+)", text)]
    assert len(resumed) >= 2 and 4 <= resumed[0] < 10 <= resumed[-1], text
    assert "1 rank on cpu" in text and losses(out, "step") == list(range(1, 33))
