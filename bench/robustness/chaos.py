"""Trains both stages under all kinds of faults and compares the result with the same training left alone.

    python -m bench.chaos [--seed 1] [--stages 2] [--kinds KIND,...] [--work DIR] [--out DIR]      (or: make chaos)

Two ranks train on synthetic faces of which 1 % are corrupt. One run of each stage is left alone. Another is killed at
random moments, also while checkpoints and the feature cache are being written; its newest checkpoint and its cache are
corrupted; a scheduler's signal stops it; it continues under another ZeRO stage and, in stage 2, with another number of
ranks. In stage 1 a process that decodes is killed, a rank stands still for good, two runs begin at once, the disk has
no room or no files left and then has, becomes read-only, or is unmounted, and the data disappear. After each fault it
is launched again with ``--resume``. At the end both runs must have seen the same images in every epoch and have the
same losses.

Then single bits are flipped in every kind of file that these runs have written (:mod:`bench.robustness.flips`).

One full disk is a limit on the size of any file (RLIMIT_FSIZE): writing fails in the middle. The others are mounted,
for which root is needed; without it they are left out, and the output says so.
"""

import argparse
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measuring.environment import environment
from bench.measuring.results import write_json
from bench.robustness.faults import EVERYWHERE, STAGE_2, Job
from bench.robustness.flips import USED, flip_all, index_file, other_files, run_files, weight_files
from bench.robustness.machine_faults import DISKS, PROCESSES, MachineFaults, can_mount
from scf_fast.command import Parser, run
from scf_fast.errors import InputError
from scf_fast.pipelines.index import open_source

FLIPS = 100  # in each kind of file
IDENTITIES, IMAGES_EACH, BATCH, EPOCHS = 16, 32, 32, 3
CORRUPT_SHARE = 0.01
STEPS = IDENTITIES * IMAGES_EACH // BATCH * EPOCHS
CHECKPOINT_EVERY = 4
_COMMON = [
    "--batch_size",
    BATCH,
    "--epochs",
    EPOCHS,
    "--log_every",
    1,
    "--num_workers",
    1,
    "--checkpoint_every",
    CHECKPOINT_EVERY,
    "--record_samples",
    "--background_checkpoints",
    "--no_tensorboard",
]


def make_data(folder: Path) -> set[int]:
    """Makes synthetic faces, overwrites the first bytes of a few, and returns the positions of these."""
    sizes = ["--identities", IDENTITIES, "--images-per-identity", IMAGES_EACH, "--eval-identities", 0]
    subprocess.run([sys.executable, "-m", "scf_fast.pipelines.synthetic", folder, *map(str, sizes)], check=True)
    source = open_source(folder / "train")
    corrupt = sorted(random.Random(5).sample(range(len(source)), round(CORRUPT_SHARE * len(source))))
    content = bytearray((folder / "train" / "train.rec").read_bytes())
    for i in corrupt:
        start = content.index(source.encoded(i).tobytes())
        content[start : start + 64] = bytes(64)
    (folder / "train" / "train.rec").write_bytes(content)
    return set(corrupt)


def images_seen(out: Path) -> dict[int, list[int]]:
    """Returns the images of each step, over all ranks."""
    steps: dict[int, list[int]] = collections.defaultdict(list)
    for path in out.glob("samples_rank*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps[record["step"]] += record["images"]
    return steps


def compare(out: Path, alone: Path, corrupt: set[int], loss: str) -> dict[str, Any]:
    """Counts images lost and repeated within epochs, and measures how far the losses of the two runs are apart."""
    seen, count = images_seen(out), IDENTITIES * IMAGES_EACH
    shown_for = {}
    for i in range(count):  # a corrupt image is replaced by the next one that is not
        shown_for[i] = next(j % count for j in range(i, i + count) if j % count not in corrupt)
    lost = repeated = 0
    per_epoch = STEPS // EPOCHS
    for epoch in range(EPOCHS):
        images = collections.Counter(
            i for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1) for i in seen.get(step, [])
        )
        expected = collections.Counter(shown_for.values())
        lost += (expected - images).total()
        repeated += (images - expected).total()
    losses = [
        {r["step"]: r[loss] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
        for folder in (out, alone)
    ]
    steps = sorted(losses[1])
    if sorted(losses[0]) != steps or len(steps) != STEPS:
        raise SystemExit(
            f"{out}: has the losses of {len(losses[0])} steps, {alone} of {len(steps)}; there must be {STEPS}"
        )
    return {
        "lost": lost,
        "repeated": repeated,
        "largest_difference": max(abs(losses[0][s] / losses[1][s] - 1) for s in steps),
        "final_loss": losses[0][STEPS],
        "final_loss_alone": losses[1][STEPS],
    }


def torment(job: Job, kinds: list[str], chaos: MachineFaults) -> collections.Counter:
    """Strikes with each kind in turn, then lets the job finish; returns how often each has struck."""
    struck: collections.Counter[str] = collections.Counter()
    for number, kind in enumerate(kinds):
        left = len(kinds) - number
        steps = max(1, (STEPS - 4 - job.step) // (left + 1))
        began = time.monotonic()
        hit = getattr(chaos, kind)(job, steps)
        struck[kind] += hit
        outcome, seconds = "survived" if hit else "FAILED", time.monotonic() - began
        print(
            f"  {kind.replace('_', ' '):22s} {outcome:9s} step {job.step:3d} of {STEPS}  {seconds:3.0f} s", flush=True
        )
    status = job.finish(job.start())
    if status:
        raise SystemExit(f"the last launch failed with status {status}; see {job.log}")
    return struck


@dataclass(frozen=True)
class Stage:
    """One stage of the plan.

    Attributes:
        number: "1" or "2".
        arguments: the training command's flags.
        kinds: the faults that can strike it.
        loss: name of its loss in metrics.jsonl.
        tolerance: relative difference of losses that is allowed.
        cached: whether the run under faults uses a feature cache.
    """

    number: str
    arguments: list[object]
    kinds: list[str]
    loss: str
    tolerance: float
    cached: bool

    @property
    def name(self) -> str:
        return f"stage {self.number}"


def make_plan(work: Path) -> list[Stage]:
    """Returns both stages; the second trains on the weights that the first run left alone has written."""
    data = ["--data", work / "faces" / "train"]
    stage1 = ["--stage", "backbone", "--network", "ir_small", "--z_dim", 32, "--lr", 0.01, *_COMMON, *data]
    stage1 += ["--loader", "torch"]  # decodes in processes, which can be killed
    net = ["--stage", "confidence", "--confidence_net", "mlp", "--precision", "fp32", "--lr", 3e-5]
    weights = ["--saved_bkb", work / "alone1" / "backbone.pth", "--saved_fc", work / "alone1" / "fc.pth"]
    stage2 = [*net, "--cache_dtype", "fp32", *weights, *_COMMON, *data]
    return [
        Stage("1", stage1, EVERYWHERE + PROCESSES + (DISKS if can_mount() else []), "loss", 0.0, cached=False),
        # Another number of ranks sums in another order.
        Stage("2", stage2, EVERYWHERE + STAGE_2, "total_loss", 1e-5, cached=True),
    ]


def order_faults(kinds: list[str], rng: random.Random) -> list[str]:
    """Returns the faults in random order, but the write to the cache first: later everything is in the cache."""
    order = rng.sample(kinds, len(kinds))
    order.sort(key=lambda kind: kind != "kill_in_cache_write")
    return order


def run_stage(
    stage: Stage, work: Path, corrupt: set[int], kinds: list[str] | None, rng: random.Random
) -> dict[str, Any]:
    """Runs a stage alone and under faults, and returns the comparison with the number of times each fault struck."""
    print(f"{stage.name}, left alone", flush=True)
    alone = Job(stage.arguments, work / f"alone{stage.number}")
    if alone.finish(alone.start()):
        raise SystemExit(f"the run that is left alone failed; see {alone.log}")
    print(f"{stage.name}, tormented", flush=True)
    order = order_faults(stage.kinds, rng)
    cache = work / "cache"
    job = Job(
        [*stage.arguments, *(["--feature_cache", cache] if stage.cached else [])], work / f"tormented{stage.number}"
    )
    struck = torment(job, kinds or order, MachineFaults(rng, cache))
    return {
        **compare(job.out, alone.out, corrupt, stage.loss),
        "tolerance": stage.tolerance,
        "faults": dict(struck),
        "tried": kinds or order,
    }


def run_all(options: argparse.Namespace, work: Path) -> int:
    """Runs the chosen stages, prints and writes the outcome, and returns 0 if every fault was survived."""
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise InputError(f"--work {work} must be empty or missing")
    began, rng = time.monotonic(), random.Random(options.seed)
    corrupt = make_data(work / "faces")
    print(
        f"{IDENTITIES * IMAGES_EACH} images, {len(corrupt)} corrupt; {STEPS} steps a stage, checkpoints every "
        f"{CHECKPOINT_EVERY}",
        flush=True,
    )
    kinds = options.kinds.split(",") if options.kinds else None
    results = {stage.name: run_stage(stage, work, corrupt, kinds, rng) for stage in make_plan(work)[: options.stages]}
    flips = try_all_flips(work, options.stages, rng)
    used = sum(counts[USED] for counts in flips.values())
    tried = sum(len(result["tried"]) for result in results.values())
    survived = sum(sum(result["faults"].values()) for result in results.values())
    missed = [kind for result in results.values() for kind, struck in result["faults"].items() if not struck]
    lost, repeated = (sum(result[count] for result in results.values()) for count in ("lost", "repeated"))
    equal = all(result["largest_difference"] <= result["tolerance"] for result in results.values())
    seconds = time.monotonic() - began
    for stage, result in results.items():
        print(
            f"{stage}: final loss {result['final_loss']:.6f}, left alone {result['final_loss_alone']:.6f}; losses "
            f"differ by {result['largest_difference']:.1e} at most, allowed {result['tolerance']:.0e}"
        )
    print(
        f"faults tried {tried}, survived {survived}, samples lost {lost}, samples repeated within an epoch {repeated}, "
        f"losses {'equal' if equal else 'DIFFERENT'}, flips tried {sum(map(sum_of, flips.values()))}, silently used "
        f"{used}, {seconds:.0f} s"
    )
    if not can_mount():
        print(f"left out, since nothing can be mounted here: {', '.join(DISKS)}")
    if options.out:
        measured_on = environment("cpu")
        path = options.out / f"chaos-{measured_on['date']}.json"
        write_json(
            path,
            {
                "environment": measured_on,
                "command": "python -m bench.chaos",
                "seconds": seconds,
                "faults_tried": tried,
                "faults_survived": survived,
                "flips": flips,
                "flips_silently_used": used,
                "samples_lost": lost,
                "samples_repeated": repeated,
                "stages": results,
            },
        )
        print(f"Written: {path}")
    if missed:
        print(f"failed, or did not strike: {', '.join(missed)}; another --seed may tell")
    return 0 if equal and not lost and not repeated and not missed and not used else 1


def sum_of(counts: dict[str, int]) -> int:
    """Returns how many flips were tried in a kind of file."""
    return sum(counts.values())


def try_all_flips(work: Path, stages: int, rng: random.Random) -> dict[str, dict[str, int]]:
    """Flips bits in the files of the runs under faults; returns the counts by kind of file."""
    print("flipped bits", flush=True)
    (stage1, *others), run1, run2 = make_plan(work), work / "tormented1", work / "tormented2"
    files = run_files("1", run1, map(str, stage1.arguments)) + weight_files(run1)
    if stages > 1:
        files += run_files("2", run2, map(str, others[0].arguments)) + weight_files(run2)
        files += other_files(run2 / "scf_model.pt", work / "faces" / "train", work / "cache", work)
    else:
        files += index_file(work / "faces" / "train")
    return flip_all(files, FLIPS, rng)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the faults' order and moments (default: %(default)s)"
    )
    parser.add_argument(
        "--stages", type=int, choices=(1, 2), default=2, help="1 leaves stage 2 out (default: %(default)s)"
    )
    parser.add_argument(
        "--kinds",
        help="faults of each stage in this order, separated by commas; default: each once, in random order: "
        f"{', '.join(EVERYWHERE)}, in stage 1 also {', '.join(PROCESSES + DISKS)}, in stage 2 {', '.join(STAGE_2)}",
    )
    parser.add_argument("--work", type=Path, help="folder for data and runs, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args(arguments)

    def act() -> int:
        if options.work:
            return run_all(options, options.work)
        with tempfile.TemporaryDirectory() as folder:
            return run_all(options, Path(folder))

    return run(parser.prog, act)


if __name__ == "__main__":
    sys.exit(main())
