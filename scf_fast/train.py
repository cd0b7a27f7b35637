"""Train a Sphere Confidence Face model: ``deepspeed train.py --stage backbone|confidence ...``; ``--help`` lists the options."""

import os
import sys
import time

from scf_fast import command_line, distributed


def main() -> int:
    settings = command_line.parse()
    if not settings.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif settings.gpu_ids and "RANK" not in os.environ:  # a launcher has chosen already
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.gpu_ids.replace(" ", "")
    from scf_fast import trainer  # after the flags are known to be good: DeepSpeed and DALI take seconds to import

    try:
        if trainer.train(settings):
            return distributed.STOPPED
    except KeyboardInterrupt:
        print("train.py: interrupted, without a checkpoint of this step", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    except trainer.Incomplete as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except trainer.InputError as error:
        if os.environ.get("SCF_FAST_TRACEBACK"):
            raise
        if distributed.environment()[0]:
            time.sleep(3)  # as a rule rank 0 has the same error, says it, and the launcher ends this rank meanwhile
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    distributed.leave(main())
