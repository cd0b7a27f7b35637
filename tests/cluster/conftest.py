"""Two nodes on one machine: network namespaces with a cable between them, host names and folders of their own.

As on many systems, the name of each host resolves to its own loopback.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scf_fast.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "10.77.0.1"  # of node a, where rank 0 runs


def command(*words):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)


class Node:
    """One of the nodes.

    Attributes:
        disk: folder of its own that appears as ``Nodes.local`` there.
    """

    def __init__(self, name, namespace, address, disk, local):
        self.name, self.namespace, self.address, self.disk, self.local = name, namespace, address, disk, local

    @property
    def request(self):
        """What the rank server needs to enter it."""
        return {
            "namespace": self.namespace,
            "host": self.name,
            "mounts": [[str(self.disk), str(self.local)], [f"/etc/netns/{self.namespace}/hosts", "/etc/hosts"]],
        }

    def set_link(self, state):
        command("ip", "-n", self.namespace, "link", "set", "eth0", state)

    def kill_all(self):
        """Kills every process there, as a power failure does."""
        for pid in command("ip", "netns", "pids", self.namespace).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def popen(self, words, log, **variables):
        """Starts a command there, in a session of its own."""
        inside = f'hostname {self.name} && mount --bind {self.disk} {self.local} && exec "$@"'
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER", "SLURM"))}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "-u", "-m", "sh", "-c", inside, "sh", *map(str, words)],
            stdout=open(log, "a"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        )


class Nodes:
    """Both nodes, and what starts ranks on them."""

    def __init__(self, a, b, start_ranks, tmp):
        self.a, self.b, self._start_ranks, self._tmp = a, b, start_ranks, tmp
        self.local = a.local
        self._port = 0

    def new_port(self):
        self._port = free_port()

    def start(self, rank, *flags, world_size=2, variables=None, node=None, module="scf_fast.train"):
        """Starts one rank, rank 0 on node a and the others on node b, without a launcher."""
        node = node or (self.b if rank else self.a)
        place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": ADDRESS, "MASTER_PORT": str(self._port)}
        place |= variables or {}
        return self._start_ranks(1, "-m", module, *flags, variables=place, node=node.request)

    def start_both(self, *flags, variables=None):
        self.new_port()
        return [self.start(rank, *flags, variables=variables) for rank in (0, 1)]

    def train(self, *flags, variables=None):
        """Trains on both nodes to the end: [(exit status, output) of each]."""
        launches = self.start_both(*flags, variables=variables)
        return [(launch.wait(120), launch.log.read_text()) for launch in launches]

    def deepspeed(self, *flags, log):
        """Starts DeepSpeed's launcher on both nodes, as it would itself by ssh; output as for :meth:`torchrun`."""
        self.new_port()
        hosts = self._tmp / "hosts"
        hosts.write_text("".join(f"{node.name} slots=1\n" for node in (self.a, self.b)))
        started = []
        for number, node in enumerate((self.a, self.b)):
            where = ["--hostfile", hosts, "--no_ssh", "--node_rank", number]
            where += ["--master_addr", ADDRESS, "--master_port", self._port]
            words = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", *where, "train.py", *flags]
            started.append(node.popen(words, f"{log}.{node.name}", DS_ACCELERATOR="cpu"))
        return started

    def torchrun(self, *flags, options=("--max_restarts", 0), static=True, log):
        """Starts torchrun on both nodes, one rank each; its output goes to ``log`` with the node's name at the end."""
        self.new_port()
        started = []
        for number, node in enumerate((self.a, self.b)):
            if static:
                where = ["--node_rank", number, "--master_addr", ADDRESS, "--master_port", self._port]
            else:
                where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESS}:{self._port}", "--rdzv_id", "job"]
                settings = f"is_host={str(number == 0).lower()},last_call_timeout=3,keep_alive_interval=1"
                where += ["--local_addr", node.address, "--rdzv_conf", settings]
            nodes = [] if "--nnodes" in options else ["--nnodes", 2]
            words = [sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc_per_node", 1, *where, *options]
            started.append(node.popen([*words, "train.py", *flags], f"{log}.{node.name}"))
        return started


@pytest.fixture(scope="session")
def nodes(start_ranks, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("nodes")
    names = [f"scf{os.getpid()}{letter}" for letter in "ab"]
    local = tmp / "local"
    local.mkdir()
    made = []
    try:
        for name in names:
            command("ip", "netns", "add", name)
            made.append(name)
        command(
            "ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]
        )
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name])
        pytest.skip(f"no right to make network namespaces: {getattr(error, 'stderr', error)}")
    found = []
    for number, name in enumerate(names, 1):
        host, disk = f"node{'ab'[number - 1]}", tmp / f"disk{number}"
        disk.mkdir()
        hosts = Path("/etc/netns", name)
        hosts.mkdir(parents=True)
        others = f"{ADDRESS} nodea\n" if number == 2 else ""
        (hosts / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n{others}")
        command("ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            command("ip", "-n", name, "link", "set", device, "up")
        found.append(Node(host, name, f"10.77.0.{number}", disk, local))
    yield Nodes(*found, start_ranks, tmp)
    for name in names:
        subprocess.run(["ip", "netns", "del", name])
        (Path("/etc/netns", name) / "hosts").unlink()
        Path("/etc/netns", name).rmdir()


@pytest.fixture
def wait_for_step():
    """``wait_for_step(folder, step, launches)``: waits until a run has logged this step."""

    def wait(folder, step, seconds=90):
        deadline = time.monotonic() + seconds
        path = Path(folder) / "metrics.jsonl"
        while time.monotonic() < deadline:
            if path.exists() and f'"step": {step},' in path.read_text():
                return
            time.sleep(0.1)
        raise AssertionError(f"{folder} has not come to step {step}")

    return wait


@pytest.fixture(scope="session")
def faces(tmp_path_factory, fork_ranks):
    """A small synthetic data set on storage that both nodes share."""
    root = tmp_path_factory.mktemp("faces") / "set"
    sizes = ["--identities", 8, "--images-per-identity", 16, "--eval-identities", 0]
    status, output = fork_ranks(0, root, *sizes, "--seed", 3, module="scf_fast.pipelines.synthetic")
    assert status == 0, output
    return root / "train"
