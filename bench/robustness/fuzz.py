"""Coverage-guided fuzzing of everything that reads untrusted files.

    python -m bench.fuzz TARGET [--seconds 60] [--out runs/fuzz] [--seed 0]
    python -m bench.fuzz TARGET --replay FILE

A target is fed mutated files. It may return data or raise a ValueError; any other exception, more than 10 s or more
than 4 GB is a finding, which is written to OUT with its traceback. An input that reaches a new pair of successive lines
in pipelines/ or scf_fast/ joins the corpus, also in OUT, where the next run finds it. OUT/TARGET.running holds the
current input: after a crash of the interpreter it is the cause. The exit status is 1 if there are findings.
"""

import argparse
import contextlib
import hashlib
import io
import logging
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from PIL import Image

import scf_fast
from scf_fast import pipelines
from scf_fast.command import Parser
from scf_fast.command import run as run_command
from scf_fast.features.store import read_meta
from scf_fast.pipelines.evaluation_sets.verification_set import read_verification_set
from scf_fast.pipelines.formats.array_file import map_arrays
from scf_fast.pipelines.formats.recordio import pack_record, read_num_classes, whole_records
from scf_fast.pipelines.formats.tfrecord import frame
from scf_fast.pipelines.formats.tfrecord import pack_record as pack_tfrecord
from scf_fast.pipelines.index import describe, open_source
from scf_fast.pipelines.loading.decode import decode_face, read_header, read_headers
from scf_fast.pipelines.sources.indexed import IndexedImages

TIMEOUT = 10.0  # seconds an input may take; tracing slows Python down about tenfold
MEMORY = 4 << 30  # bytes that the process may grow by
_CODE = tuple(str(Path(module.__file__ or "").parent) for module in (pipelines, scf_fast))
Step = tuple[CodeType, int, int]  # code, a line of it, and the line executed next
_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    512,
    1 << 15,
    1 << 16,
    (1 << 29) - 1,
    1 << 29,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
)


class Slow(BaseException):
    """Raised while an input takes too long; not an Exception, so that no target can catch it by accident."""


def _encode(fmt: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 20)).convert("RGB").save(file, fmt, **options)
    return file.getvalue()


def _tar(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as shard:
        for name, content in (
            ("a.jpg", b"image"),
            ("a.cls", b"3"),
            ("d/" * 60 + "größe.png", b"x" * 600),
            ("d/" * 60 + "größe.json", b'{"label": 1}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _records() -> bytes:
    return b"".join(
        [
            pack_record(0, [3, 4], b""),
            pack_record(1, 0, b"first"),
            pack_record(2, [1, 0.5], b"12" + struct.pack("<I", 0xCED7230A) * 2),
            pack_record(3, [1, 3], b""),
        ]
    )


def _use(source: IndexedImages) -> None:
    """Does everything that training does with a source."""
    assert isinstance(source, IndexedImages)
    describe(source)
    source.will_need(np.arange(len(source)))
    read_headers(*source.read(np.arange(len(source))))
    for i in range(len(source)):
        source.name(i)
        with contextlib.suppress(ValueError):
            source.encoded(i)


def _open(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        path.with_name("a.jpg").write_bytes(b"image")
        _use(open_source(path))


def _recordio(content: bytes) -> None:
    starts, end = whole_records(np.frombuffer(content, dtype=np.uint8))
    assert len(starts) <= end <= len(content)
    _open("train.rec", content)


def _tfrecord(content: bytes) -> None:
    """Reads it as a shard, else as the message of a record, since no mutation would get a checksum right."""
    try:
        _open("a.tfrecord", content)
    except ValueError:
        _open("a.tfrecord", pack_tfrecord(b"face", 1) + frame(content))


def _tfrecord_list(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "a" / "a-00000.tfrecord"
        shard.parent.mkdir()
        shard.write_bytes(pack_tfrecord(b"first", 0) + frame(b"no message") + pack_tfrecord(b"x" * 600, 300))
        path = Path(folder) / "list.txt"
        path.write_bytes(content)
        _use(open_source(path))


def _image(content: bytes) -> None:
    data = np.frombuffer(content, dtype=np.uint8)
    size = read_headers(data, np.zeros(1, dtype=np.int64), np.array([len(data)]))[0]
    header = read_header(data)
    assert size[0] == 0 or (header.is_common and (header.height, header.width) == tuple(size))
    decode_face(data)


def _verification(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lfw.bin"
        path.write_bytes(content)
        pairs = read_verification_set(path)
        for i in range(len(pairs.source)):
            pairs.source.encoded(i)


def _cache(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "meta.json").write_bytes(content)
        layout = read_meta(Path(folder)).layout
        assert layout.total_bytes > 0 and layout.rows_per_shard > 0


def _property(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "property"
        path.write_bytes(content)
        read_num_classes(path)


_INDEX = struct.Struct("<16sIIQ")  # magic, checksums of header and arrays, bytes of the header


def _index(content: bytes) -> None:
    """Reads header, zero byte and arrays as an index with right checksums, since wrong ones reject every mutation."""
    header, _, body = content.partition(b"\0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.rec"
        index, fingerprint = _indexed(path)
        header = header.replace(_FINGERPRINT, fingerprint)
        index.write_bytes(
            _INDEX.pack(b"face arrays 1\n  ", zlib.crc32(header), zlib.crc32(body), len(header)) + header + body
        )
        _use(open_source(path))


def _indexed(path: Path) -> tuple[Path, bytes]:
    """Writes records and their index, and returns the path of the index and the fingerprint in it."""
    path.write_bytes(_records())
    open_source(path)
    index = path.with_name("train.rec.index")
    return index, map_arrays(index)[0]["fingerprint"].encode()


def _index_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        index, fingerprint = _indexed(Path(folder) / "train.rec")
        content = index.read_bytes()
    *_, size = _INDEX.unpack_from(content)
    header, body = content[_INDEX.size : _INDEX.size + size], content[_INDEX.size + size :]
    return header.replace(fingerprint, _FINGERPRINT) + b"\0" + body


_FINGERPRINT = b"FINGERPRINT"  # stands for the true one, which no mutation would hit
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {  # {name: (reader, files to start from)}
    "recordio": (_recordio, [_records()]),
    "tar": (
        lambda content: _open("a.tar", content),
        [_tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)],
    ),
    "list": (lambda content: _open("list.txt", content), [b"a.jpg 0\n\n b c.jpg\t12\r\n/d/e.png 3"]),
    "tfrecord": (
        _tfrecord,
        [pack_tfrecord(b"first", 0) + pack_tfrecord(b"x" * 600, 300), pack_tfrecord(b"image", 3)[12:-4]],
    ),
    "tfrecord_list": (_tfrecord_list, [b"a\t0\t0\t2\na\t0\t54\t1\na\t0\t80\t0\n"]),
    "index": (_index, [_index_seed()]),
    "cache": (
        _cache,
        [
            b'{"format": 3, "key": {"backbone": "b", "data": "d", "normalization": "n", "precision": "p"}, '
            b'"convf_error": 0.0, "layout": '
            b'{"num_images": 5, "z_dim": 8, "convf_shape": [4, 7, 7], "dtype": "bf16"}}'
        ],
    ),
    "property": (_property, [b"85742,112,112\n"]),
    "image": (
        _image,
        [
            _encode("JPEG"),
            _encode("JPEG", progressive=True),
            _encode("PNG"),
            _encode("WEBP"),
            _encode("GIF"),
            _encode("TIFF"),
            _encode("BMP"),
            _encode("PPM"),
        ],
    ),
    "bin": (
        _verification,
        [
            pickle.dumps(content, protocol)
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
            for content in (
                ([b"one", b"two"], [True]),
                ([np.frombuffer(b"one", np.uint8)] * 2, np.array([True])),
                ([bytearray(b"one")] * 2, [np.True_]),
            )
        ],
    ),
}


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Makes a few random changes to a file; ``others`` are files to take pieces from."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 2, 4, 8, 16, 64, 512)), len(data) - at)
        kind = rng.randrange(7)
        if kind == 0 and length:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and length:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 1, 200))
        elif kind == 4:
            number = rng.choice(_NUMBERS)
            digits = rng.choice(
                (
                    str(number).encode(),
                    b"%o" % number,
                    number.to_bytes(8, "little")[:4],
                    number.to_bytes(8, "little"),
                    number.to_bytes(8, "big")[4:],
                    number.to_bytes(8, "big"),
                )
            )
            data[at : at + rng.choice((0, len(digits)))] = digits
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at : at + rng.choice((0, length))] = other[start : start + rng.choice((1, 4, 16, 64, 512))]
        else:
            del data[at:]
    return bytes(data[: 1 << 16])


def run(function: Callable[[bytes], None], content: bytes) -> tuple[set[Step], BaseException | None]:
    """Gives one file to a target.

    Returns:
        The steps in pipelines/ and scf_fast/ that were executed, and the exception that is a finding, or None.
    """
    lines: set[Step] = set()

    def enter(frame: FrameType, event: str, argument: object) -> Callable | None:
        code = frame.f_code
        if not code.co_filename.startswith(_CODE):
            return None
        last = 0

        def step(frame: FrameType, event: str, argument: object) -> Callable:
            nonlocal last
            lines.add((code, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step

    def too_slow(*_: object) -> None:
        raise Slow(f"it takes more than {TIMEOUT:g} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    error: BaseException | None = None
    sys.settrace(enter)
    try:
        function(content)
    except ValueError:
        pass
    except (Exception, Slow) as found:
        error = found
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return lines, error


def fuzz(target: str, seconds: float, folder: Path, seed: int) -> int:
    """Mutates and runs until the time is up, and returns the number of findings."""
    function, seeds = TARGETS[target]
    corpus_folder = folder / target
    corpus_folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    waiting = [*seeds, *(path.read_bytes() for path in sorted(corpus_folder.iterdir()))]
    corpus: list[bytes] = []
    covered: set[Step] = set()
    findings: set[tuple] = set()
    count, end = 0, time.monotonic() + seconds
    running = folder / f"{target}.running"
    while waiting or time.monotonic() < end:
        content = waiting.pop() if waiting else mutate(rng.choice(corpus), corpus, rng)
        running.write_bytes(content)
        lines, error = run(function, content)
        count += 1
        if error is not None:
            place = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_CODE)]
            key = type(error).__name__, *((place[-1].filename, place[-1].lineno) if place else ())
            if key not in findings:
                findings.add(key)
                path = folder / f"{target}-{hashlib.sha256(content).hexdigest()[:12]}"
                path.write_bytes(content)
                path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
                print(f"finding: {type(error).__name__}: {error}: {path}", flush=True)
        if not lines <= covered or not corpus:
            covered |= lines
            corpus.append(content)
            (corpus_folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
            print(
                f"{count:>8} inputs, {len(covered)} steps, corpus {len(corpus)}, {len(findings)} findings", flush=True
            )
    running.unlink()
    print(f"{target}: {count} inputs, {len(covered)} steps, corpus {len(corpus)}, {len(findings)} findings")
    return len(findings)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="TARGET", choices=TARGETS, help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="time to fuzz for (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fuzz"), help="folder of corpus and findings (default: %(default)s)"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input and show what it raises")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # of broken images and of indices that are built again
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if options.replay is not None:
        TARGETS[options.target][0](options.replay.read_bytes())  # outside the runner, which would hide some tracebacks
        return 0
    return run_command(
        parser.prog, lambda: 1 if fuzz(options.target, options.seconds, options.out, options.seed) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
