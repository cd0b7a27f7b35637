import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from scf_fast.config import BackboneConfig
from scf_fast.distributed import Member, cores_per_rank, decoding_workers, free_port, ranks_on_this_machine
from scf_fast.distributed.meeting import exchange
from scf_fast.distributed.ranks import device_problem
from scf_fast.errors import InputError


@pytest.mark.parametrize(
    "environment, ranks",
    [
        ({}, 1),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, 8),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),  # torchrun's
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "8"}, 8),  # deepspeed's
    ],
)
def test_cores_are_divided_among_the_ranks_of_this_machine(monkeypatch, environment, ranks):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)))
    assert (ranks_on_this_machine(), cores_per_rank()) == (ranks, 96 // ranks)


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 1), (8, 7), (17, 16), (96, 16)])
def test_decoding_workers_follow_the_cores_unless_given(monkeypatch, cores, workers):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(2 * cores)))
    assert decoding_workers(None) == workers
    assert [decoding_workers(wanted) for wanted in (0, 2, 40)] == [0, 2, 40]


def test_configuration_leaves_the_workers_to_the_machine():
    assert BackboneConfig(data="-", output_dir="-").num_workers is None
    with pytest.raises(ValueError, match="--num_workers must be 0 or more"):
        BackboneConfig(data="-", output_dir="-", num_workers=-1)


def test_each_rank_has_a_gpu_of_its_own():
    members = [Member(rank, 1, f"node{rank // 2}", "ab"[rank // 2], "") for rank in range(4)]
    assert device_problem(members, ["G0", "G1", "G0", "G1"]) is None  # other nodes' may be called the same
    assert device_problem(members, [""] * 4) is None
    twice = device_problem(members, ["G0", "G1", "G0", "G0"])
    assert twice.startswith("rank 3 on b has the same GPU as rank 2 (G0); start one rank a GPU")
    for gpus in (["G0", "G1", "", ""], ["", "", "G0", "G1"]):
        assert "has no GPU, and rank " in device_problem(members, gpus)


def test_ranks_exchange_words_through_the_store(place, meet_all):
    port = free_port()
    met = meet_all([place(rank, 3, port) for rank in range(3)])
    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(lambda one: exchange(one, "word", f"of {one.own.rank}", 5.0), met))
    assert told == [["of 0", "of 1", "of 2"]] * 3
    with pytest.raises(InputError, match="ranks 0, 2 have joined, and not gone on within 0 s"):
        exchange(met[1], "other", "", 0.1)
