import os

import pytest

from scf_fast.config import BackboneConfig
from scf_fast.distributed import cores_per_rank, decoding_workers, ranks_on_this_machine


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
