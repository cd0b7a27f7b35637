"""Compares two result files of one device and says what has become slower, beyond the noise.

    python -m bench.compare OLD.json NEW.json [--tolerance 0.05]

A case counts as slower where the intervals that hold the two medians with 95 % probability
(bench/measuring/samples.py) lie apart by more than the tolerance, which allows for differences from one process to the
next. The baselines are the control: where they changed by as much, the cause is the machine. The exit status is 1 where
one of our cases has become slower, 2 where the files cannot be compared, and 0 otherwise.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

from bench.measuring.results import Timing, read
from bench.measuring.tables import markdown_table
from scf_fast.command import Parser, run
from scf_fast.errors import InputError


def verdict(old: Timing, new: Timing, tolerance: float) -> str:
    """Returns "slower", "faster", "same", or "unknown" where a file has fewer than 5 samples of the case."""
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return "unknown"
    if new.low > old.high * (1 + tolerance):
        return "slower"
    return "faster" if new.high < old.low / (1 + tolerance) else "same"


def compare(old_path: str, new_path: str, tolerance: float) -> int:
    """Prints the comparison and returns the exit status."""
    files = read(old_path), read(new_path)
    for name in ("device", "cpu", "threads"):
        found = [file.environment.get(name) for file in files]
        if found[0] != found[1]:
            raise InputError(
                f"both files must come from one {name}, got {found[0]!r} and {found[1]!r}; measure the old revision "
                "on this machine"
            )
    before, after = ({(timing.work, timing.way): timing for timing in file.timings} for file in files)
    both = [key for key in before if key in after]
    if not both:
        raise InputError("the files must have cases in common, and have none; give two results of the same benchmark")
    verdicts = {key: verdict(before[key], after[key], tolerance) for key in both}
    print(
        markdown_table(
            ["work", "way", "old, ms", "new, ms", "new / old", ""],
            [
                [
                    *key,
                    f"{1e3 * before[key].median:.4g}",
                    f"{1e3 * after[key].median:.4g}",
                    f"{after[key].median / before[key].median:.3f}",
                    verdicts[key],
                ]
                for key in both
            ],
        )
    )
    controls = [after[key].median / before[key].median for key in both if not before[key].ours]
    if controls:
        print(
            f"\nControl: the baselines take {statistics.median(controls):.3f} times as long as before (median of "
            f"{len(controls)})."
        )
    missing = before.keys() - after.keys()
    if missing:
        print(f"\nNot in the new file: {len(missing)} of {len(before)} cases.")
    slower = [key for key in both if verdicts[key] == "slower" and before[key].ours]
    print(f"\n{len(slower)} of our {sum(before[key].ours for key in both)} cases are slower.")
    return 1 if slower else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD", help="result file of the revision before")
    parser.add_argument("new", metavar="NEW", help="result file of the revision after")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="change attributed to the process (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: compare(options.old, options.new, options.tolerance))


if __name__ == "__main__":
    sys.exit(main())
