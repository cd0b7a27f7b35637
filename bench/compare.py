"""Has it become slower? Two result files of the same device, with the noise taken into account.

    python -m bench.compare OLD.json NEW.json [--tolerance 0.05]

A case counts as slower where the intervals that hold the two medians with 95 % probability (bench/measuring/results.py)
lie apart by more than the tolerance, which stands for what differs from one process to the next. What the baselines did
in the meantime is the control: where they changed as much, it was the machine. Exit status 1 where a way of ours has
become slower, 0 otherwise, 2 where files do not compare.
"""

import argparse
import statistics
import sys

from bench.measuring.results import read, table


def verdict(old, new, tolerance):
    """ "slower", "faster", "same", or "unknown" where a file has fewer than 5 samples of it."""
    if None in (old.low, new.low):
        return "unknown"
    if new.low > old.high * (1 + tolerance):
        return "slower"
    return "faster" if new.high < old.low / (1 + tolerance) else "same"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="change that is put down to the process (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        files = read(options.old), read(options.new)
    except ValueError as error:
        parser.error(str(error))
    for name in ("device", "cpu", "threads"):
        found = [file.environment.get(name) for file in files]
        if found[0] != found[1]:
            parser.error(
                f"both files must come from one {name}, got {found[0]!r} and {found[1]!r}; measure the old revision "
                "on this machine"
            )
    before, after = ({(timing.work, timing.way): timing for timing in file.timings} for file in files)
    both = [key for key in before if key in after]
    if not both:
        parser.error("the files must have cases in common, and have none; give two results of the same benchmark")
    verdicts = {key: verdict(before[key], after[key], options.tolerance) for key in both}
    print(
        table(
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


if __name__ == "__main__":
    sys.exit(main())
