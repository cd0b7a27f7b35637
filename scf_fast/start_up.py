"""What happens on the ranks before training: whose folder it is, the inputs, and whether all nodes see the same."""

import contextlib
from pathlib import Path

from scf_fast import distributed
from scf_fast.config import ConfidenceConfig, Config
from scf_fast.data import epoch_sampler
from scf_fast.distributed import Runtime
from scf_fast.engine.deepspeed_config import load_deepspeed_config
from scf_fast.run import folder as run_folder
from scf_fast.run import folder_lock, same_inputs
from scf_fast.run.checkpoints import ResumePoint
from scf_fast.stages.inputs import Inputs, check_world, open_inputs


def claim_and_open(
    config: Config, runtime: Runtime, held: contextlib.ExitStack
) -> tuple[bool, ResumePoint | None, Inputs | None]:
    """Locks the run's folder if it is there, and opens the inputs on the main rank; collective.

    Args:
        held: gets the lock.
    Returns:
        On the main rank whether the folder is locked and the inputs; on every rank where to resume, if anywhere.
    Raises:
        InputError: the run cannot start; nothing has been written or deleted, except an index.
    """
    folder = Path(config.output_dir)
    locked, point, inputs = runtime.is_main and folder.is_dir(), None, None
    with distributed.shared_input_errors(runtime):
        if locked:
            held.enter_context(folder_lock.locked(folder))
        if runtime.is_main:
            point, inputs = _check_on_main(config, runtime.world_size)
    return locked, distributed.broadcast_from_main(point), inputs


def _check_on_main(config: Config, world_size: int) -> tuple[ResumePoint | None, Inputs]:
    """Checks what one rank can; the others come after it, and find the index that it may have made.

    Raises:
        InputError: the run cannot start; nothing has been written or deleted.
    """
    if config.deepspeed_config:
        load_deepspeed_config(config.deepspeed_config)
    point = run_folder.claim(config)
    check_world(config, world_size)
    inputs = open_inputs(config if point is None else run_folder.continued(config, point))
    if point is not None:
        point.check_data(config.data, inputs.source.num_classes, len(inputs.source))
        if isinstance(config, ConfidenceConfig):
            point.check_objective(config.objective)
    if config.resume:
        same_inputs.check(config, inputs.source)
    epoch_sampler(config, inputs.source, 0, world_size)
    return point, inputs


def open_in_turn(config: Config, runtime: Runtime, point: ResumePoint | None, inputs: Inputs | None) -> Inputs:
    """Opens the inputs on the ranks that have not: first on one of each node, which makes the index where the data are
    on the node's own disk, then on the others; collective.
    """
    meeting = distributed.current_meeting()
    for turn in (True, False):
        with distributed.shared_input_errors(runtime):
            if inputs is None and (meeting is None or meeting.is_first_on_node == turn):
                inputs = open_inputs(config if point is None else run_folder.continued(config, point))
    assert inputs is not None, "every rank has had its turn"
    return inputs
