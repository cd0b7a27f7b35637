"""Commands that write files, killed in the middle; and files with hostile names, through the commands.

A command that is killed and started again must give what it gives when it is left alone, and leave nothing else behind.
A name of a file must not look like a line of its own, change the terminal, or become a part of a page: newlines, escape
codes, pipes and tags.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.robustness.faults import kill_all

_KILLS = 2  # of each command
_FORGED = "forged: all is well"
HOSTILE = (
    f"a\n{_FORGED}.jpg",
    "b\x1b[2J\x1b]0;title\x07.jpg",
    "c|d|.jpg",
    "<script>alert(1).jpg",
    "\u202egpj.exe.jpg",
)
_IN_HOSTILE = (f"\n{_FORGED}", "\x1b", "\x07", "\u202e")


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        arguments: of Python, without the output.
        output: name of its file or folder, the last argument.
    """

    name: str
    arguments: list[object]
    output: str

    def start(self, folder: Path) -> subprocess.Popen:
        """Starts it in a folder of its own."""
        return subprocess.Popen(
            [sys.executable, *map(str, self.arguments), str(folder / self.output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    def finish(self, folder: Path) -> float:
        """Runs it to its end, and returns the seconds.

        Raises:
            SystemExit: it has failed.
        """
        began, process = time.monotonic(), self.start(folder)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{self.name}: failed\n{output.decode(errors='replace')[-2000:]}")
        return time.monotonic() - began


def writers(model: Path, data: Path, images: Path, cache: Path) -> list[Writer]:
    """Returns the commands; the folder of embeddings is shared by the killed evaluation and the next."""
    module = ["-m"]
    return [
        Writer("convert", [*module, "scf_fast.pipelines.convert", data, "--to", "tar", "--shard-images", 50], "tar"),
        Writer("export", [*module, "scf_fast.export", model], "model.safetensors"),
        Writer("embed", [*module, "scf_fast.embed", images, "--model", model, "--loader", "torch", "--out"], "e.npz"),
        Writer(
            "evaluation",
            [*module, "scf_fast.evaluation", "risk", "--model", model, "--data", data, "--cache", cache, "--out"],
            "report",
        ),
    ]


def contents(folder: Path) -> dict[str, object]:
    """Returns what a command has written, by name: of arrays their values, since archives hold dates; of reports, which
    hold dates too, the names.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.is_file():
            found[name] = None if "report" in path.parts else path.read_bytes()
    return found


def kill_and_repeat(writer: Writer, work: Path, rng: random.Random) -> bool:
    """Runs a command alone, and kills it and starts it again; returns whether it has come to the same."""
    alone, folder = work / f"{writer.name}-alone", work / f"{writer.name}-killed"
    alone.mkdir()
    seconds = writer.finish(alone)
    for _ in range(_KILLS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        process = writer.start(folder)
        time.sleep(rng.uniform(0.5, 1) * seconds)
        kill_all(process)
        if process.stdout:
            process.stdout.close()
        if process.returncode != -signal.SIGKILL and contents(folder):
            continue  # it was done
        writer.finish(folder)
        if contents(folder) != contents(alone):
            return False
    return True


def hostile_images(data: Path, folder: Path) -> Path:
    """Makes a folder of two people whose images have hostile names; one image in two cannot be decoded."""
    from scf_fast.pipelines.index import open_source

    source = open_source(data)
    for person in ("0", f"1\n{_FORGED}"):
        (folder / person).mkdir(parents=True)
        for number, name in enumerate(HOSTILE):
            content = source.encoded(number).tobytes()
            (folder / person / name).write_bytes(content)
            (folder / person / f"broken {name}").write_bytes(content[:200])
    return folder


def forged(output: bytes) -> list[str]:
    """Returns what of the hostile names has come through."""
    text = output.decode(errors="replace")
    return [repr(part) for part in _IN_HOSTILE if part in text]


def name_hostile(model: Path, data: Path, work: Path) -> dict[str, bool]:
    """Gives files with hostile names to the commands; returns for each whether its output shows them as text."""
    images, found = hostile_images(data, work / "hostile"), {}
    commands: dict[str, tuple[list[object], Callable[[], list[Path]]]] = {
        "index": (["-m", "scf_fast.pipelines.index", images, "--verify"], list),
        "convert": (["-m", "scf_fast.pipelines.convert", images, work / "named", "--to", "recordio"], list),
        "embed": (
            ["-m", "scf_fast.embed", images, "--model", model, "--loader", "torch", "--out", work / "named.npz"],
            lambda: [work / "named.npz.left_out.txt"],
        ),
        "evaluation": (
            ["-m", "scf_fast.evaluation", "risk", "--model", f"<script>|x={model}", "--data", images]
            + ["--cache", work / "named_cache", "--out", work / "named_report"],
            lambda: [*(work / "named_report").glob("*.md"), *(work / "named_report").glob("*.html")],
        ),
        "training": (
            ["-m", "scf_fast.train", "--stage", "backbone", "--network", "ir_tiny", "--z_dim", 16, "--batch_size", 4]
            + ["--epochs", 1, "--num_workers", 0, "--no_tensorboard", "--data", images]
            + ["--output_dir", work / "named_run"],
            lambda: [work / "named_run" / name for name in ("log.txt", "events.jsonl")],
        ),
    }
    for name, (arguments, written) in commands.items():
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
        )
        output = done.stdout + done.stderr
        texts = {path: path.read_bytes() for path in written() if path.exists()}
        wrong = forged(output + b"".join(texts.values()))
        wrong += [
            "<script>alert" for path, text in texts.items() if path.suffix == ".html" and b"<script>alert" in text
        ]
        wrong += ["a traceback"] if b"Traceback" in output else []
        found[name] = not wrong
        print(f"  {name:22s} {'as text' if not wrong else 'FORGED: ' + ', '.join(wrong)}", flush=True)
    return found


def try_commands(model: Path, data: Path, work: Path, rng: random.Random) -> dict[str, bool]:
    """Kills all commands, and gives them hostile names; returns and prints which have stood it."""
    work.mkdir()
    print("commands killed and started again", flush=True)
    images = work / "images"
    hostile_images(data, images / "all")
    found = {}
    for writer in writers(model, data, images, work / "embeddings"):
        found[f"kill {writer.name}"] = kill_and_repeat(writer, work, rng)
        print(f"  {writer.name:22s} {'the same' if found[f'kill {writer.name}'] else 'OTHER FILES'}", flush=True)
    print("hostile names", flush=True)
    return {**found, **{f"names in {name}": held for name, held in name_hostile(model, data, work).items()}}
