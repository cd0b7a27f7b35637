"""Rates from files to batches, in one run: index, source and decoders, ours beside DALI's own MXNet reader on one file.

    python -m bench.decode [--data DIR] [--images 40000] [--threads 2] [--rounds 9] [--out DIR]

Without ``--data``, a ``.rec`` of JPEGs the size of faces (112 x 112, about 7 KB) is made in a temporary folder. DALI's
reader stops at the header and identity records of a file as distributed, so it is given a ``.idx`` of the image records
alone; it shuffles in a buffer, ours over the whole set. Its pipeline is the leanest one: it mirrors and normalizes in
one operator, and nothing is copied out of it. All paths deliver float32 images in channels_last and int64 labels. Rates
are medians over rounds in which all paths take turns; so are the ratios to DALI's reader, each taken within one round.
Processor time covers all threads of the process; other work on the machine changes it less than the rates.
"""

import argparse
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from bench.measuring.environment import DEVICE, device_slug, environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import text_table
from bench.measuring.timing import synchronize
from scf_fast.command import Parser, run
from scf_fast.errors import InputError
from scf_fast.pipelines.convert import convert
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.formats.recordio import RecordWriter, write_property
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Loader
from scf_fast.pipelines.loading.decode import read_headers
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import SelectedImages
from scf_fast.pipelines.sources.recordio import RecordIndex

DISTINCT = 500  # different pictures; the records repeat them
BUFFER = 32_768  # records that DALI's reader shuffles, arcface_torch's setting
SHUFFLED = 5_822_653  # images of MS1MV2
OURS, THEIRS, WORKERS = "ours, DALI", "DALI's MXNet reader", "ours, PyTorch workers"

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images and labels
Result = TypeVar("Result")


def make_records(folder: Path, count: int) -> None:
    """Writes a ``.rec`` of ``count`` images of count / 50 identities."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(DISTINCT):
        smooth = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize(
            (FACE_SIZE, FACE_SIZE), Image.Resampling.BICUBIC
        )
        noisy = np.clip(np.asarray(smooth) + rng.normal(0, 8, (FACE_SIZE, FACE_SIZE, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=92)
        pictures.append(file.getvalue())
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        identities = -(-count // 50)
        writer.write_header_record(count, identities)
        for i in range(count):
            writer.write_image(i + 1, i // 50, pictures[i % DISTINCT])
        for identity in range(identities):
            writer.write_identity_record(count + 1 + identity, identity * 50 + 1, min(identity * 50 + 50, count))
    write_property(folder, identities)


def seconds_of(call: Callable[[], Result]) -> tuple[float, Result]:
    """Calls once and returns (seconds, result)."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def index_rates(data: Path, scratch: Path, rounds: int) -> dict[str, float]:
    """Measures how fast each format is indexed from page cache, {format: images/s}.

    The formats besides RecordIO hold the first tenth of the images.
    """
    source = open_source(data)
    paths = {"recordio": data}
    some = SelectedImages(source, np.arange(max(1, len(source) // 10)))
    for to in ("tar", "folder"):
        convert(some, scratch / to, to)
        paths[to] = scratch / to
    files = sorted((scratch / "folder").glob("*/*"))
    paths["list"] = scratch / "list.txt"
    paths["list"].write_text("".join(f"{path.relative_to(scratch)} {int(path.parent.name)}\n" for path in files))
    rates = {}
    for name, path in paths.items():
        found = []
        for number in range(rounds + 1):  # the first one reads the file into the page cache
            seconds, opened = seconds_of(
                functools.partial(open_source, path, cache_dir=scratch / f"cache-{number}-{path.name}")
            )
            found.append(len(opened) / seconds)
        rates[name] = statistics.median(found[1:])
    return rates


def source_rates(source: RecordIndex, batch: int, rounds: int) -> dict[str, float]:
    """Measures one thread that reads images in random order from page cache, {way: images/s}."""
    order = np.random.default_rng(0).permutation(len(source))[:20_000]
    batches = np.array_split(order, max(1, len(order) // batch))
    calls: dict[str, Callable[[], list]] = {
        "one by one": lambda: [source.encoded(i) for i in order.tolist()],
        "batches": lambda: [source.read(indices) for indices in batches],
        "batches, headers checked": lambda: [read_headers(*source.read(indices)) for indices in batches],
    }
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(len(order) / seconds_of(call)[0])
    return {name: statistics.median(values) for name, values in rates.items()}


def mxnet_batches(rec_path: Path, idx_path: Path, batch: int, threads: int, prefetch: int) -> Batches:
    """Yields batches of DALI's own reader: decoded, mirrored with probability 1/2, normalized."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(enable_conditionals=False)
    def pipeline():
        encoded, labels = fn.readers.mxnet(
            path=[str(rec_path)], index_path=[str(idx_path)], random_shuffle=True, initial_fill=BUFFER, name="reader"
        )
        faces = fn.decoders.image(
            encoded, device="mixed" if DEVICE == "cuda" else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
        return fn.crop_mirror_normalize(
            faces,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[127.5] * 3,
            std=[127.5] * 3,
        ), labels

    built = pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=0 if DEVICE == "cuda" else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    while True:
        faces, labels = built.run()
        yield (
            torch.from_dlpack(faces.as_tensor()).permute(0, 3, 1, 2),
            torch.from_dlpack(labels.as_tensor()).to(DEVICE).long().flatten(),
        )


def endless(loader: Loader) -> Batches:
    """Yields the batches of one epoch after another."""
    epoch = 0
    while True:
        for batch in loader.batches(epoch):
            yield batch.images, batch.labels
        epoch += 1


@dataclass(frozen=True)
class DecodingRates:
    """Medians over rounds, by path.

    Attributes:
        images_per_second: rate of delivered images.
        processor_us: microseconds of processor time an image takes, where all the work is in this process.
        over_dali_reader: the rate over that of DALI's reader in the same round.
    """

    images_per_second: dict[str, float]
    processor_us: dict[str, float]
    over_dali_reader: dict[str, float]


def check_batch(images: torch.Tensor, labels: torch.Tensor, batch: int) -> None:
    """Refuses to time a path that delivers anything but normalized float32 images in channels_last and int64 labels."""
    assert images.shape == (batch, 3, 112, 112) and labels.shape == (batch,) and labels.dtype == torch.int64
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    assert images.abs().max() <= 1


def write_image_index(source: RecordIndex, path: Path) -> None:
    """Writes the ``.idx`` of the image records alone."""
    offsets = source.offsets_in(source.rec_paths[0]).tolist()
    path.write_text("".join(f"{number}\t{offset}\n" for number, offset in enumerate(offsets)))


def decoding_rates(
    source: RecordIndex, scratch: Path, batch: int, batches: int, threads: int, rounds: int
) -> DecodingRates:
    """Measures all paths to decoded batches, which take turns of ``batches`` batches."""
    idx = scratch / "images.idx"
    write_image_index(source, idx)
    sampler = EpochSampler(len(source), batch)
    block = EpochSampler(len(source), batch, block_size=256)
    ours = functools.partial(make_loader, source, device=DEVICE, num_workers=threads, prefetch=2, on_broken="replace")
    loaders = {
        OURS: ours(sampler, backend="dali"),
        "ours, DALI, block shuffle": ours(block, backend="dali"),
        WORKERS: ours(sampler, backend="torch"),
    }
    runs = {
        THEIRS: mxnet_batches(source.rec_paths[0], idx, batch, threads, 2),
        **{name: endless(loader) for name, loader in loaders.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, batches_of_run in runs.items() if number % 2 else reversed(runs.items()):
            # Not timed: what was decoded ahead in the last turn, and in the first round what fills the buffers.
            next(batches_of_run)
            synchronize(DEVICE)
            start, start_busy = time.perf_counter(), time.process_time()
            for _ in range(batches):
                images, labels = next(batches_of_run)
            synchronize(DEVICE)
            if number:
                rates[name].append(batches * batch / (time.perf_counter() - start))
                busy[name].append((time.process_time() - start_busy) / (batches * batch) * 1e6)
            check_batch(images, labels, batch)
    for loader in loaders.values():
        loader.close()
    ratios = {name: [rate / theirs for rate, theirs in zip(values, rates[THEIRS])] for name, values in rates.items()}
    del busy[WORKERS]  # its work is in other processes
    return DecodingRates(*({name: statistics.median(v) for name, v in t.items()} for t in (rates, busy, ratios)))


def measure(options: argparse.Namespace) -> None:
    """Measures index, source and decoders, prints the rates and writes the JSON file."""
    torch.set_num_threads(1)  # normalization, beside the decoders
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = options.data or scratch / "data"
        if options.data is None:
            data.mkdir()
            make_records(data, options.images)
        source = open_source(data, cache_dir=scratch)
        if not isinstance(source, RecordIndex):
            raise InputError(f"--data must be a folder with one train.rec, got {data}")
        shuffle_seconds, _ = seconds_of(lambda: EpochSampler(SHUFFLED, 1024).indices(0, 0))
        rates = {
            "index": index_rates(data, scratch, options.rounds),
            "source": source_rates(source, options.batch, options.rounds),
        }
        decoding = decoding_rates(source, scratch, options.batch, options.batches, options.threads, options.rounds)
        rates["decoding"] = decoding.images_per_second
        sizes = [len(source.encoded(i)) for i in range(0, len(source), max(1, len(source) // 1000))]
    for title, group in rates.items():
        print(text_table([title, "images/s"], [[name, f"{rate:,.0f}"] for name, rate in group.items()]) + "\n")
    busy = decoding.processor_us
    rows = [
        [name, f"{busy[name]:.1f}" if name in busy else "", f"{ratio:.2f}"]
        for name, ratio in decoding.over_dali_reader.items()
    ]
    print(text_table(["decoding", "processor us an image", "rate over DALI's reader"], rows) + "\n")
    print(f"global shuffle of {SHUFFLED:,} images, once an epoch: {shuffle_seconds:.2f} s")
    measured_on = environment(DEVICE)
    path = options.out / f"decode-{device_slug(DEVICE)}-{measured_on['date']}.json"
    write_json(
        path,
        {
            "environment": measured_on,
            "images": len(source),
            "bytes_an_image": statistics.mean(sizes),
            "batch": options.batch,
            "decoding_threads": options.threads,
            "images_per_second": rates,
            "processor_us_an_image": busy,
            "rate_over_dali_reader": decoding.over_dali_reader,
            "shuffle_seconds": shuffle_seconds,
            "shuffled_images": SHUFFLED,
        },
    )
    print(f"Written: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with one train.rec (default: one is made)")
    parser.add_argument(
        "--images", type=int, default=40_000, help="records of the file that is made (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="batches in each turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads or processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each path (default: %(default)s)")
    add_out_argument(parser)
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
