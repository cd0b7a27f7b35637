"""What all ranks must have the same, found out together before any training: code, options, versions, clocks, data,
weights and folders; and that there is room for the run's checkpoints. (That each has a GPU of its own is known before,
see :func:`scf_fast.distributed.start`: ranks that share one could not even say so.)
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scf_fast import distributed
from scf_fast.command import split_paths
from scf_fast.config import Config
from scf_fast.distributed import Runtime, spans
from scf_fast.errors import InputError
from scf_fast.pipelines.sources.base import ImageSource, spread_evenly
from scf_fast.pipelines.sources.digest import sampled_digest
from scf_fast.run.folder import CHECKPOINTS, versions

CLOCK_SECONDS = 60.0  # that clocks may differ by
_SEEN_SECONDS = 10.0  # after which a file that one node has written is seen by the others, on NFS too
_POLL_SECONDS = 0.2
_IMAGES = 1024  # whose bytes count in the digest of the data, beside all labels
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of each weight file, beside its size
# Options that may differ between nodes: paths whose contents are compared, and what belongs to a machine.
_OF_A_NODE = frozenset(
    ("data", "dataroot", "dataset", "index_dir", "saved_bkb", "saved_fc", "deepspeed_config", "num_workers", "gpu_ids")
)
_NOT_COMPARED = frozenset(("git", "device"))  # the code's own digest counts, and GPUs may be of two kinds


@dataclass(frozen=True)
class Report:
    """What one rank has.

    Attributes:
        code: digest of the program's sources.
        clock: seconds since 1970, right after a moment that all ranks share.
        files: digest of what the options name, by option; of the data on one rank of each node.
    """

    rank: int
    host: str
    code: str
    options: dict[str, Any]
    versions: dict[str, str | None]
    clock: float
    images: int
    identities: int
    files: dict[str, str]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def check_nodes(config: Config, source: ImageSource, runtime: Runtime) -> list[str]:
    """Checks that all ranks have the same, and see the same folders; collective.

    Returns:
        What was found, in words, for a log.
    Raises:
        InputError: on all ranks: the first difference, with the node and what to do.
    """
    if runtime.world_size == 1:
        return [f"{len(source)} images, {source.num_classes} identities"]
    with distributed.shared_input_errors(runtime):
        own = _report(config, source, runtime)
    dist.barrier()
    own = dataclasses.replace(own, clock=time.time())
    reports: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(reports, own)
    with distributed.shared_input_errors(runtime):
        problems = differences(reports)
        if problems:
            raise InputError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    check_shared_folder("output_dir", Path(config.output_dir), runtime)
    cache = getattr(config, "feature_cache", None)
    if cache and not getattr(config, "feature_cache_local", False):
        check_shared_folder("feature_cache", Path(cache), runtime)
    return describe(reports)


def _report(config: Config, source: ImageSource, runtime: Runtime) -> Report:
    meeting = distributed.current_meeting()
    files: dict[str, str] = {}
    if meeting is None or meeting.is_first_on_node:
        files["data"] = sampled_digest(source, images=_IMAGES)
    for name in ("saved_bkb", "saved_fc", "deepspeed_config"):
        path = getattr(config, name, None)
        if path:
            files[name] = _digest_of_files(path)
    local = _OF_A_NODE | ({"feature_cache"} if getattr(config, "feature_cache_local", False) else set())
    return Report(
        rank=runtime.rank,
        host=socket.gethostname() if meeting is None else meeting.own.host,
        code=digest_of_code(),
        options={name: value for name, value in config.as_dict().items() if name not in local},
        versions=versions(),
        clock=0.0,
        images=len(source),
        identities=source.num_classes,
        files=files,
    )


def digest_of_code() -> str:
    """Returns the digest of this program's sources."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py")
    )
    for path in found:
        digest.update(os.path.relpath(path, root).encode() + b"\0" + Path(path).read_bytes())
    return digest.hexdigest()


def _digest_of_files(spec: str) -> str:
    """Returns the digest of the sizes of files, and of blocks spread over each: class centers may take 100 GB."""
    digest = hashlib.sha256()
    for text in split_paths(spec):
        path = Path(text)
        files = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(path.name))
        for file in files:
            if not file.is_file():
                continue
            size = file.stat().st_size
            digest.update(f"{size} ".encode())
            with open(file, "rb") as opened:
                for block in spread_evenly(-(-size // _BLOCK_BYTES), _BLOCKS):
                    opened.seek(int(block) * _BLOCK_BYTES)
                    digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def differences(reports: Sequence[Report]) -> list[str]:
    """Returns a line for each thing that differs from what rank 0 has, with the ranks and the way out."""
    first, found = reports[0], []

    def compare(what: str, of: Callable[[Report], Any], way: str, show: bool = True) -> None:
        others = [report for report in reports if of(report) not in (of(first), _ABSENT)]
        if others:
            other = others[0]
            values = f" ({of(other)!r}, {of(first)!r} on {first.host})" if show else ""
            found.append(f"{what} of {_who(others)} differs from that of {first}{values}; {way}")

    names = sorted({name for report in reports for name in report.options})
    for name in names:
        compare(f"--{name}", _entry("options", name), "start all ranks with the same flags")
    for name in sorted({name for report in reports for name in report.versions} - _NOT_COMPARED):
        compare(f"the version of {name}", _entry("versions", name), "install the same on all nodes")
    compare("the program's code", lambda report: report.code, "install the same on all nodes", show=False)
    compare("--data: the number of images", lambda report: report.images, _COPY)
    compare("--data: the number of identities", lambda report: report.identities, _COPY)
    for name in sorted({name for report in reports for name in report.files}):
        compare(f"--{name}: the content", _entry("files", name), _COPY, show=False)
    return found + _check_clocks(reports)


def _entry(table: str, name: str) -> Callable[[Report], Any]:
    return lambda report: getattr(report, table).get(name, _ABSENT if table == "files" else None)


_ABSENT = object()
_ABSENT = object()
_COPY = "copy it again from one node to the others, or give a path that all share"


def _who(reports: Sequence[Report]) -> str:
    hosts: dict[str, list[int]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report.rank)
    return ", ".join(f"rank{'s' * (len(ranks) > 1)} {spans(ranks)} on {host}" for host, ranks in hosts.items())


def _check_clocks(reports: Sequence[Report]) -> list[str]:
    first, last = (pick(reports, key=lambda report: report.clock) for pick in (min, max))
    if last.clock - first.clock <= CLOCK_SECONDS:
        return []
    return [
        f"the clock of {last} is {last.clock - first.clock:.0f} s ahead of that of {first}; set them by NTP: dates of "
        "files and logs would contradict each other"
    ]


def describe(reports: Sequence[Report]) -> list[str]:
    """Returns lines about the ranks of a launch that may start."""
    first = reports[0]
    spread = max(report.clock for report in reports) - min(report.clock for report in reports)
    devices = sorted({str(report.versions.get("device")) for report in reports})
    return [
        f"{len(reports)} ranks: {_who(reports)}",
        f"the same code, options and versions on all; devices: {', '.join(devices)}; clocks within {spread:.1f} s",
        f"the same data on all: {first.images} images, {first.identities} identities, digest "
        f"{first.files['data'][:16]}",
    ]


def check_shared_folder(flag: str, folder: Path, runtime: Runtime) -> None:
    """Checks that a folder, which may not be there yet, is the same for all ranks, and that all can write to it;
    collective. Leaves nothing behind.

    Raises:
        InputError: on all ranks.
    """
    meeting = distributed.current_meeting()
    host = socket.gethostname() if meeting is None else meeting.own.host
    main = "rank 0" if meeting is None else str(meeting.members[0])
    token = distributed.broadcast_from_main(secrets.token_hex(8))
    files = [folder / f".lock-seen-{token}-{rank}" for rank in range(runtime.world_size)]
    must = f"--{flag} {folder}: it must be one folder on storage that all nodes share"
    with contextlib.ExitStack() as made:
        with distributed.shared_input_errors(runtime):
            if runtime.is_main:
                made.enter_context(_present(folder))
                made.callback(_delete, files)
                files[0].write_text(token)
        with distributed.shared_input_errors(runtime):
            if not runtime.is_main:
                if not _appears(files[0], token):
                    raise InputError(
                        f"{must}; rank {runtime.rank} on {host} does not see what {main} has written there"
                    )
                files[runtime.rank].write_text(token)
        with distributed.shared_input_errors(runtime):
            missing = [rank for rank, file in enumerate(files) if runtime.is_main and not _appears(file, token)]
            if missing:
                raise InputError(f"{must}; {main} does not see what ranks {spans(missing)} have written there")
        dist.barrier()


@contextlib.contextmanager
def _present(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents where they are missing, and deletes those that it has made if they are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for path in missing:
                path.rmdir()


def _delete(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _appears(file: Path, token: str) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)


def checkpoint_bytes(optimizer: torch.optim.Optimizer, centers: Any = None) -> int:
    """Returns the bytes of a checkpoint: trained weights and their optimizer states in float32, and class centers.

    Args:
        centers: ClassCenters of stage 1.
    """
    group = optimizer.param_groups[0]
    values = 3 if "betas" in group else 2 if group.get("momentum") else 1
    total = 4 * values * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    if centers is not None:
        total += centers.num_classes * centers.weight.shape[1] * (4 + centers.momentum.element_size())
    return total


def check_space(config: Config, needed: int) -> str:
    """Checks on the main rank that the output folder's disk has room for the checkpoints that a run keeps, one more
    while it is written, and the exported weights; returns that in words.

    Args:
        needed: bytes of a checkpoint.
    Raises:
        InputError: it has not.
    """
    folder = Path(config.output_dir)
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    old = sum(file.stat().st_size for file in (folder / CHECKPOINTS).glob("step*/*") if file.is_file())
    free = shutil.disk_usage(existing).free + old  # this run deletes those as it writes its own
    count = config.keep_checkpoints + 1 + config.keep_best
    total = (count + 1) * needed  # the exported weights take less than a checkpoint
    words = f"{count} checkpoints of {needed / 1e9:.3g} GB and the exported weights, {free / 1e9:.3g} GB are free"
    if total > free:
        raise InputError(
            f"--output_dir {folder}: has no room for {words} on {socket.gethostname()}; free some space, give another "
            f"disk, or a lower --keep_checkpoints than {config.keep_checkpoints}"
        )
    return words
