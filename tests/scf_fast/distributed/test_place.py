"""Which variables of which launcher make which rank, and what is refused in one line."""

import pytest

from scf_fast.distributed.place import Place, find_place, first_node, tasks_per_node
from scf_fast.errors import InputError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_NTASKS": "64",  # of the job, of which this step has a part
}


def test_variables_of_each_launcher():
    assert find_place({}) == Place("python", local_rank=0, local_size=1)
    assert find_place({"MASTER_ADDR": "x", "WORLD_SIZE": "1", "SLURM_JOB_ID": "3"}) == find_place({})
    assert find_place(TORCHRUN) == Place("torchrun", 5, 8, 1, 4, "node1", 29500)
    elastic = find_place({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (elastic.has_agent, elastic.restarts) == (True, 2)
    deepspeed = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a"}
    assert find_place({**deepspeed, "MASTER_PORT": "1"}) == Place("variables", 1, 2, 1, 2, "a", 1)
    plain = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert find_place(plain).local_rank is None  # the ranks find it out together
    assert find_place({"RANK": "0", "WORLD_SIZE": "1"}).local_rank == 0


def test_tasks_of_srun_are_ranks():
    place = find_place(SRUN)
    assert (place.launcher, place.rank, place.world_size) == ("srun", 5, 6)
    assert (place.local_rank, place.local_size, place.master_address) == (1, 2, "gpu007")
    others = [find_place({**SRUN, "SLURM_PROCID": str(rank)}) for rank in range(6)]
    assert {other.master_port for other in others} == {place.master_port} and 20000 <= place.master_port < 32768
    assert find_place({**SRUN, "SLURM_JOB_ID": "4712"}).master_port != place.master_port
    assert find_place({**SRUN, "SLURM_STEP_NUM_NODES": "1"}).master_address == "127.0.0.1"
    given = find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (given.master_address, given.master_port) == ("10.0.0.1", 4000)
    assert find_place({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}).world_size == 1  # srun torchrun, an interactive shell
    assert find_place({**SRUN, **TORCHRUN, "WORLD_SIZE": "6"}).launcher == "torchrun"
    job = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert find_place({**job, "SLURM_NTASKS": "6", "SLURM_NODELIST": "b1,b2"}).world_size == 6


def test_short_forms_of_slurm():
    for nodes, first in (
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-012,020],login1", "gpu007"),
        ("a[3,5]", "a3"),
        ("rack[1-2]-ib", "rack1-ib"),
    ):
        assert first_node(nodes) == first
    assert tasks_per_node("4(x2),1") == [4, 4, 1] and tasks_per_node("8") == [8]
    with pytest.raises(InputError, match="SLURM_TASKS_PER_NODE"):
        tasks_per_node("4x2")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": ""}, "RANK is empty"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not"),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK must be a whole number, 0 or more, got 'abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number, 1 or more"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT must be at most 65535"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below the number of ranks, 4 on this node"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 must be at most WORLD_SIZE=8"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "6"}, "RANK=0 contradicts SLURM_PROCID=5"),
        ({**SRUN, "SLURM_PROCID": "6"}, "SLURM_PROCID=6 must be below the number of tasks, 6"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"},
            "this job has 8 tasks, but the batch script has started the program once",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started several processes"),
    ],
)
def test_variables_that_are_no_place(variables, message):
    with pytest.raises(InputError, match=message) as caught:
        find_place(variables)
    assert "\n" not in str(caught.value)
