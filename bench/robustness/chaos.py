"""Train both stages while everything goes wrong, and compare with the same training left alone: ``make chaos`` or
``python -m bench.chaos``.

Two ranks train on synthetic faces of which 1 % are corrupt. One run of each stage is left alone. Another is killed at
random moments, also inside the writing of checkpoints and of the feature cache; its newest checkpoint and its cache are
corrupted; its disk is full for a while; a scheduler's signal stops it; it goes on under another ZeRO stage and, in
stage 2, with another number of ranks. After each fault it is launched again with ``--resume``. At the end both runs
must have seen the same images in every step and have the same losses.

The full disk is a limit on the size of any file (RLIMIT_FSIZE): writing fails in the middle, as there.
"""

import argparse
import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measuring.environment import environment
from scf_fast.distributed import STOPPED, launcher
from scf_fast.features.store import read_meta
from scf_fast.pipelines.index import open_source

IDENTITIES, IMAGES_EACH, BATCH, EPOCHS = 16, 32, 32, 3
CORRUPT_SHARE = 0.01
STEPS = IDENTITIES * IMAGES_EACH // BATCH * EPOCHS
CHECKPOINT_EVERY = 4
TOLERANCE = {"stage 1": 0.0, "stage 2": 1e-5}  # relative: another number of ranks sums in another order
_LAUNCH_SECONDS = 240  # a launch that is not over by then hangs
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
    """Synthetic faces, a few with their first bytes overwritten; positions of these."""
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


class Job:
    """One stage's command, launched again and again."""

    def __init__(self, arguments: list, out: Path):
        self.arguments, self.out = list(map(str, arguments)), out
        self.seconds = 0.0

    def start(self, ranks: int = 2, zero_stage: int = 2, file_bytes: int | None = None) -> subprocess.Popen:
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        with open(f"{self.out}.log", "a") as log:
            return subprocess.Popen(
                [
                    *launcher(ranks),
                    *self.arguments,
                    "--zero_stage",
                    str(zero_stage),
                    "--output_dir",
                    str(self.out),
                    "--resume",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limit if file_bytes else None,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )

    def finish(self, process: subprocess.Popen) -> int:
        """Exit status of a launch, of which nothing is left running."""
        try:
            return process.wait(_LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"a launch hung; see {self.out}.log") from None
        finally:
            kill_all(process)

    @property
    def step(self) -> int:
        """The last one logged."""
        try:
            return json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError, KeyError):  # not there yet, or a line is being written
            return 0

    def ranks_of(self, process: subprocess.Popen) -> list[int]:
        """Process ids of a launch's ranks."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if (
                    os.getpgid(int(entry)) == process.pid
                    and b"\0RANK=" in Path("/proc", entry, "environ").read_bytes()
                    and b"train.py" in Path("/proc", entry, "cmdline").read_bytes()
                ):
                    found.append(int(entry))
            except OSError:
                pass
        return found


def kill_all(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_until(condition, process: subprocess.Popen, pause: float = 0.01) -> bool:
    """Whether it came true while the launch was running."""
    deadline = time.monotonic() + _LAUNCH_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause)
    return False


class Chaos:
    """The faults; each takes a job and says whether it struck, and leaves the job dead or stopped."""

    def __init__(self, rng: random.Random, cache: Path):
        self.rng, self.cache = rng, cache

    def _further(self, job: Job, process, steps: int) -> bool:
        """Let a launch make some steps, and a part of one."""
        target = job.step + self.rng.randint(1, steps)
        came = wait_until(lambda: job.step >= target, process)
        time.sleep(self.rng.uniform(0, 0.2))
        return came

    def kill_all_ranks(self, job, steps):
        process = job.start()
        struck = self._further(job, process, steps)
        kill_all(process)
        return struck

    def kill_one_rank(self, job, steps):
        process = job.start()
        struck = self._further(job, process, steps) and len(ranks := job.ranks_of(process)) == 2
        if struck:
            began = time.monotonic()
            os.kill(self.rng.choice(ranks), signal.SIGKILL)
            status = job.finish(process)
            struck = status != 0 and time.monotonic() - began < 60
        kill_all(process)
        return struck

    def kill_at_start(self, job, steps):
        process = job.start()
        time.sleep(self.rng.uniform(2, 8))
        struck = process.poll() is None
        kill_all(process)
        return struck

    def kill_in_checkpoint(self, job, steps):
        """While a file of a checkpoint is being written: it has its name only when it is whole."""
        process = job.start()
        started = job.step
        struck = wait_until(
            lambda: job.step > started and any((job.out / "checkpoints").glob("step*/*.part")), process, pause=0
        )
        kill_all(process)
        return struck

    def kill_before_complete(self, job, steps):
        """When a checkpoint's files are there, and the list of them, written last, is not."""

        def half():
            return any(
                not (folder / "state.json").exists() and any(folder.glob("*.pt"))
                for folder in (job.out / "checkpoints").glob("step*")
            )

        process = job.start()
        started = job.step
        struck = wait_until(lambda: job.step > started and half(), process, pause=0)
        kill_all(process)
        return struck

    def kill_in_cache_write(self, job, steps):
        """While features are being stored: the cache is marked as being written to, and grows."""
        process = job.start()
        before = self._cached()
        struck = wait_until(lambda: self._cached() > before, process, pause=0)
        kill_all(process)
        return struck

    def _cached(self) -> int:
        return len(self._present())

    def _present(self) -> list[int]:
        sums = self.cache / "checksums.bin"
        views = memoryview(sums.read_bytes()).cast("I") if sums.exists() else []
        return [i for i in range(len(views) // 2) if views[2 * i] and views[2 * i + 1]]

    def corrupt_cache(self, job, steps):
        """A record that is there, while no run is: the mark of the last one, which was killed, makes the next launch
        check every record.
        """
        layout = read_meta(self.cache).layout
        shard, row = divmod(self.rng.choice(self._present()), layout.rows_per_shard)
        with open(self.cache / f"rows-{shard:05d}.bin", "r+b") as file:
            file.seek(row * layout.record_bytes + self.rng.randrange(layout.record_bytes - 64))
            file.write(b"\xa5" * 64)
        (self.cache / "writing-0").touch()
        found = "1 were damaged"
        before = Path(f"{job.out}.log").read_text().count(found)
        return self.kill_all_ranks(job, steps) and Path(f"{job.out}.log").read_text().count(found) == before + 1

    def corrupt_checkpoint(self, job, steps):
        def resumable():
            latest = job.out / "checkpoints" / "latest"
            newest = latest.read_text().strip() if latest.exists() else ""
            return sorted(
                folder
                for folder in latest.parent.glob("step*")
                if folder.name <= newest and (folder / "state.json").exists()
            )

        process = job.start()
        self._further(job, process, steps)
        wait_until(lambda: len(resumable()) > 1, process)
        kill_all(process)
        if len(resumable()) < 2:
            return False
        path = self.rng.choice([path for path in resumable()[-1].iterdir() if path.suffix == ".pt"])
        content = bytearray(path.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        return True

    def full_disk(self, job, steps):
        process = job.start(file_bytes=50_000)
        failed = len(self._events(job, "checkpoint_failed"))
        struck = wait_until(lambda: len(self._events(job, "checkpoint_failed")) > failed, process)
        kill_all(process)
        return struck

    def _events(self, job, name):
        path = job.out / "events.jsonl"
        return [line for line in path.read_text().splitlines() if f'"event": "{name}"' in line] if path.exists() else []

    def scheduler_signal(self, job, steps):
        process = job.start()
        struck = self._further(job, process, steps) and bool(ranks := job.ranks_of(process))
        if struck:
            os.kill(self.rng.choice(ranks), self.rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            struck = job.finish(process) == STOPPED
        kill_all(process)
        return struck

    def other_zero_stage(self, job, steps):
        return self._other_layout(job, steps, 2, self.rng.choice([0, 1, 3]))

    def other_world_size(self, job, steps):
        return self._other_layout(job, steps, 1, self.rng.choice([1, 2, 3]))

    def _other_layout(self, job, steps, ranks, zero_stage):
        while not any((job.out / "checkpoints").glob("step*/state.json")):  # there must be something to go on from
            process = job.start()
            wait_until(lambda: any((job.out / "checkpoints").glob("step*/state.json")), process)
            kill_all(process)
        process = job.start(ranks, zero_stage)
        struck = self._further(job, process, steps)
        kill_all(process)
        return struck


EVERYWHERE = [
    "kill_all_ranks",
    "kill_one_rank",
    "kill_at_start",
    "kill_in_checkpoint",
    "kill_before_complete",
    "corrupt_checkpoint",
    "full_disk",
    "scheduler_signal",
    "other_zero_stage",
]
STAGE_2 = ["kill_in_cache_write", "corrupt_cache", "other_world_size"]


def images_seen(out: Path) -> dict[int, list[int]]:
    """The images of each step, over all ranks."""
    steps: dict[int, list[int]] = collections.defaultdict(list)
    for path in out.glob("samples_rank*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps[record["step"]] += record["images"]
    return steps


def compare(out: Path, alone: Path, corrupt: set[int], loss: str) -> dict:
    """Images lost and repeated within epochs, and how far losses are apart."""
    seen, count = images_seen(out), IDENTITIES * IMAGES_EACH
    shown_for = {}
    for i in range(count):  # an image that is corrupt is replaced by the next that is not
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


def torment(job: Job, kinds: list[str], chaos: Chaos) -> collections.Counter:
    """Strike with each kind in turn, then let the job end; how often each has struck."""
    struck = collections.Counter()
    for number, kind in enumerate(kinds):
        left = len(kinds) - number
        steps = max(1, (STEPS - 4 - job.step) // (left + 1))
        began = time.monotonic()
        hit = getattr(chaos, kind)(job, steps)
        struck[kind] += hit
        what, seconds = "survived" if hit else "missed", time.monotonic() - began
        print(f"  {kind.replace('_', ' '):22s} {what:9s} step {job.step:3d} of {STEPS}  {seconds:3.0f} s", flush=True)
    status = job.finish(job.start())
    if status:
        raise SystemExit(f"the last launch failed with status {status}; see {job.out}.log")
    return struck


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the faults' order and moments [%(default)s]")
    parser.add_argument("--stages", type=int, choices=(1, 2), default=2, help="1 leaves stage 2 out [%(default)s]")
    parser.add_argument(
        "--kinds",
        help="faults of each stage in this order, with commas between; default: each once, at random: "
        f"{', '.join(EVERYWHERE)}, in stage 2 {', '.join(STAGE_2)} too",
    )
    parser.add_argument("--work", type=Path, help="folder for data and runs, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args()
    temporary = None if options.work else tempfile.TemporaryDirectory()
    work = options.work or Path(temporary.name)
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        parser.error(f"--work {work} must be empty or missing")
    began, rng = time.monotonic(), random.Random(options.seed)
    corrupt = make_data(work / "faces")
    data = ["--data", work / "faces" / "train"]
    print(
        f"{IDENTITIES * IMAGES_EACH} images, {len(corrupt)} corrupt; {STEPS} steps a stage, checkpoints every "
        f"{CHECKPOINT_EVERY}",
        flush=True,
    )
    stage1 = ["--stage", "backbone", "--network", "ir_small", "--z_dim", 32, "--lr", 0.01, *_COMMON, *data]
    weights = ["--saved_bkb", work / "alone1" / "backbone.pth", "--saved_fc", work / "alone1" / "fc.pth"]
    stage2 = [
        "--stage",
        "confidence",
        "--confidence_net",
        "mlp",
        "--precision",
        "fp32",
        "--lr",
        3e-5,
        "--cache_dtype",
        "fp32",
        *weights,
        *_COMMON,
        *data,
    ]
    results, faults, missed = {}, collections.Counter(), []
    plan = (("stage 1", stage1, EVERYWHERE, "loss"), ("stage 2", stage2, EVERYWHERE + STAGE_2, "total_loss"))
    for stage, arguments, kinds, loss in plan[: options.stages]:
        print(f"{stage}, left alone", flush=True)
        name, cache = stage.replace("stage ", ""), work / "cache"
        alone = Job(arguments, work / f"alone{name}")
        if alone.finish(alone.start()):
            raise SystemExit(f"the run that is left alone failed; see {alone.out}.log")
        print(f"{stage}, tormented", flush=True)
        order = rng.sample(kinds, len(kinds))
        if "kill_in_cache_write" in order:
            order.remove("kill_in_cache_write")
            order.insert(0, "kill_in_cache_write")  # later everything is in the cache
        order = options.kinds.split(",") if options.kinds else order
        job = Job([*arguments, *(["--feature_cache", cache] if name == "2" else [])], work / f"tormented{name}")
        struck = torment(job, order, Chaos(rng, cache))
        faults += struck
        missed += [kind for kind in order if not struck[kind]]
        results[stage] = {
            **compare(job.out, alone.out, corrupt, loss),
            "tolerance": TOLERANCE[stage],
            "faults": dict(struck),
        }
    lost, repeated = (sum(result[what] for result in results.values()) for what in ("lost", "repeated"))
    equal = all(result["largest_difference"] <= result["tolerance"] for result in results.values())
    seconds = time.monotonic() - began
    for stage, result in results.items():
        print(
            f"{stage}: final loss {result['final_loss']:.6f}, left alone {result['final_loss_alone']:.6f}; losses "
            "differ by "
            f"{result['largest_difference']:.1e} at most, allowed {result['tolerance']:.0e}"
        )
    print(
        f"faults survived {faults.total()}, samples lost {lost}, samples repeated within an epoch {repeated}, "
        f"losses {'equal' if equal else 'DIFFERENT'}, {seconds:.0f} s"
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        measured = {
            "environment": environment("cpu"),
            "command": "python -m bench.chaos",
            "seconds": seconds,
            "faults_survived": faults.total(),
            "samples_lost": lost,
            "samples_repeated": repeated,
            "stages": results,
        }
        path = options.out / f"chaos-{measured['environment']['date']}.json"
        path.write_text(json.dumps(measured, indent=1) + "\n")
        print(f"Written: {path}")
    if temporary:
        temporary.cleanup()
    if missed:
        print(f"did not strike: {', '.join(missed)}; another --seed may do")
    return 0 if equal and not lost and not repeated and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
