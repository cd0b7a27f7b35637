"""The training command: ``deepspeed train.py --stage backbone|confidence ...``; ``--help`` lists the options.

The same as ``python -m scf_fast.train`` where the package is installed.
"""

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: where a rank is lost it prints stacks of its own
from scf_fast import command_line, distributed
from scf_fast.command import INTERRUPTED, print_lines, run
from scf_fast.errors import Incomplete

_PROG = "train.py"
_FAILED = 1  # exit status of a run that has no result


def main(arguments: list[str] | None = None) -> int:
    """Trains and returns the exit status: 0; 75 after a signal and its checkpoint, 1 where the run failed, 2 for bad
    input.
    """
    return run(_PROG, lambda: _train(arguments))


def _train(arguments: list[str] | None) -> int:
    config = command_line.parse(arguments)
    if not config.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif config.gpu_ids and distributed.find_place().launcher == "python":  # a launcher has chosen already
        os.environ["CUDA_VISIBLE_DEVICES"] = config.gpu_ids.replace(" ", "")
    from scf_fast import trainer  # after the flags are known to be good: DeepSpeed and DALI take seconds to import

    try:
        stopped_by = trainer.train(config)
    except KeyboardInterrupt:
        print_lines(f"{_PROG}: interrupted, without a checkpoint of this step", file=sys.stderr)
        return INTERRUPTED
    except FloatingPointError as error:
        print_lines(f"{_PROG}: stopped: {error}", file=sys.stderr)
        return _FAILED
    except Incomplete as error:
        print_lines(f"{_PROG}: {error}", file=sys.stderr)
        return _FAILED
    return distributed.STOPPED if stopped_by else 0


if __name__ == "__main__":
    distributed.leave(main())
