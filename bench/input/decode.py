"""From files to batches, in one run: index, source and decoders, ours beside DALI's own MXNet reader on the same file.

    python -m bench.decode [--data DIR] [--images 40000] [--threads 2] [--rounds 9] [--out DIR]

Without --data, a `.rec` of JPEGs the size of faces (112 x 112, about 7 KB) is made in a temporary folder. DALI's reader
stops at the header and identity records of a file as it is distributed, so it is given a `.idx` of the image records
alone; it shuffles in a buffer, ours over the whole set. Its pipeline is the leanest one: it mirrors and normalizes in
one operator, and nothing is copied out of it. All deliver float32 images in channels_last and int64 labels. Rates are
medians over rounds in which all take turns; so are the ratios to DALI's reader, each of one round. Processor time
counts all threads of the process, which a machine with other work changes less than the rates.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measuring.accuracy import tabulate
from bench.measuring.environment import DEVICE, RESULTS, device_slug, environment
from bench.measuring.timing import synchronize
from scf_fast.pipelines.convert import convert
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.formats.recordio import RecordWriter, write_property
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.decode import read_headers
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import SelectedImages

DISTINCT = 500  # pictures; the records repeat them
BUFFER = 32_768  # records that DALI's reader shuffles, arcface_torch's setting
SHUFFLED = 5_822_653  # images of MS1MV2
OURS, THEIRS = "ours, DALI", "DALI's MXNet reader"


def make_records(folder, count):
    """A `.rec` of `count` images of count / 50 identities."""
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


def seconds_of(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def index_rates(data, scratch, rounds):
    """{format: images/s} of making the index, from page cache; the other formats hold the first tenth of the images."""
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
        for number in range(rounds + 1):  # the first brings the file into the page cache
            seconds, opened = seconds_of(
                lambda path=path, number=number: open_source(path, cache_dir=scratch / f"cache-{number}-{path.name}")
            )
            found.append(len(opened) / seconds)
        rates[name] = statistics.median(found[1:])
    return rates


def source_rates(source, batch, rounds):
    """{what: images/s} of one thread that reads images in random order from page cache."""
    order = np.random.default_rng(0).permutation(len(source))[:20_000]
    batches = np.array_split(order, max(1, len(order) // batch))
    calls = {
        "one by one": lambda: [source.encoded(i) for i in order.tolist()],
        "batches": lambda: [source.read(indices) for indices in batches],
        "batches, headers checked": lambda: [read_headers(*source.read(indices)) for indices in batches],
    }
    rates = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(len(order) / seconds_of(call)[0])
    return {name: statistics.median(values) for name, values in rates.items()}


def mxnet_batches(rec_path, idx_path, batch, threads, prefetch):
    """DALI's own reader: decode, mirror by a coin, normalize."""
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


def endless(loader):
    epoch = 0
    while True:
        for batch in loader.batches(epoch):
            yield batch.images, batch.labels
        epoch += 1


def decoding_rates(source, scratch, batch, batches, threads, rounds):
    """{path: images/s}, {path: microseconds of processor time an image}, {path: its rate over that of DALI's reader in
    the same round}.
    """
    idx = scratch / "images.idx"
    idx.write_text(
        "".join(
            f"{number}\t{offset}\n" for number, offset in enumerate(source.offsets_in(source.rec_paths[0]).tolist())
        )
    )
    sampler = EpochSampler(len(source), batch)
    block = EpochSampler(len(source), batch, block_size=256)
    options = {"device": DEVICE, "num_workers": threads, "prefetch": 2}
    loaders = {
        OURS: make_loader(source, sampler, backend="dali", on_broken="replace", **options),
        "ours, DALI, block shuffle": make_loader(source, block, backend="dali", on_broken="replace", **options),
        "ours, PyTorch workers": make_loader(source, sampler, backend="torch", on_broken="replace", **options),
    }
    runs = {
        THEIRS: mxnet_batches(source.rec_paths[0], idx, batch, threads, 2),
        **{name: endless(loader) for name, loader in loaders.items()},
    }
    rates, busy = {name: [] for name in runs}, {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            next(run)  # what was decoded ahead in the last turn, and in the first round what fills the buffers
            synchronize(DEVICE)
            start, start_busy = time.perf_counter(), time.process_time()
            for _ in range(batches):
                images, labels = next(run)
            synchronize(DEVICE)
            if number:
                rates[name].append(batches * batch / (time.perf_counter() - start))
                busy[name].append((time.process_time() - start_busy) / (batches * batch) * 1e6)
            assert images.shape == (batch, 3, FACE_SIZE, FACE_SIZE)
            assert labels.shape == (batch,) and labels.dtype == torch.int64
            assert (
                images.dtype == torch.float32
                and images.is_contiguous(memory_format=torch.channels_last)
                and images.abs().max() <= 1
            )
    for loader in loaders.values():
        loader.close()
    ratios = {name: [ours / theirs for ours, theirs in zip(values, rates[THEIRS])] for name, values in rates.items()}
    del busy["ours, PyTorch workers"]  # its work is in other processes
    return tuple({name: statistics.median(values) for name, values in table.items()} for table in (rates, busy, ratios))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with one train.rec (default: one is made)")
    parser.add_argument(
        "--images", type=int, default=40_000, help="records of the file that is made (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="batches a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads or processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / device_slug(DEVICE),
        help="folder for the JSON file (default: bench/results/<device>)",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # normalization, beside the decoders

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = options.data or scratch / "data"
        if options.data is None:
            data.mkdir()
            make_records(data, options.images)
        source = open_source(data, cache_dir=scratch)
        shuffle_seconds = seconds_of(lambda: EpochSampler(SHUFFLED, 1024).indices(0, 0))[0]
        rates = {
            "index": index_rates(data, scratch, options.rounds),
            "source": source_rates(source, options.batch, options.rounds),
        }
        rates["decoding"], busy, ratios = decoding_rates(
            source, scratch, options.batch, options.batches, options.threads, options.rounds
        )
        sizes = [len(source.encoded(i)) for i in range(0, len(source), max(1, len(source) // 1000))]
    for title, group in rates.items():
        print(tabulate([title, "images/s"], [[name, f"{rate:,.0f}"] for name, rate in group.items()]))
        print()
    print(
        tabulate(
            ["decoding", "processor us an image", "rate over DALI's reader"],
            [[name, f"{busy[name]:.1f}" if name in busy else "", f"{ratio:.2f}"] for name, ratio in ratios.items()],
        )
    )
    print()
    print(f"global shuffle of {SHUFFLED:,} images, once an epoch: {shuffle_seconds:.2f} s")
    measured = {
        "environment": environment(DEVICE),
        "images": len(source),
        "bytes_an_image": statistics.mean(sizes),
        "batch": options.batch,
        "decoding_threads": options.threads,
        "images_per_second": rates,
        "processor_us_an_image": busy,
        "rate_over_dali_reader": ratios,
        "shuffle_seconds": shuffle_seconds,
        "shuffled_images": SHUFFLED,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decode-{device_slug(DEVICE)}-{measured['environment']['date']}.json"
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
