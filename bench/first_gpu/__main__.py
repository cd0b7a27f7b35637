"""The command ``python -m bench.first_gpu``; the plan is in ``bench.first_gpu.plan``."""

from bench.first_gpu.runner import main
from bench.measuring.process_group import end_process

if __name__ == "__main__":
    end_process(main())
