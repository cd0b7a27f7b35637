"""From files to batches, in one run: index, source and decoders, ours beside DALI's own MXNet reader on the same file.

    python -m bench.decode [--data DIR] [--images 40000] [--threads 2] [--rounds 5] [--out bench/results]

Without --data, a `.rec` of JPEGs the size of faces (112 x 112, about 8 KB) is made in a temporary folder. DALI's reader stops at the header
and identity records of a file as it is distributed, so it is given a `.idx` of the image records alone; it shuffles in a buffer, ours
over the whole set. Both end in normalised float32 batches, by the same code. Rates are medians over rounds in which all take turns.
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

from bench._environment import DEVICE, device_slug, environment
from bench._measure import synchronize
from bench.accuracy import tabulate
from pipelines.convert import convert
from pipelines.images import load_encoded
from pipelines.index import open_source
from pipelines.loader import Preprocessing, make_loader
from pipelines.recordio import RecordWriter, write_property
from pipelines.sampler import EpochSampler
from pipelines.sources import SelectedImages

DISTINCT = 500  # pictures; the records repeat them
BUFFER = 32_768  # records that DALI's reader shuffles, arcface_torch's setting
SHUFFLED = 5_822_653  # images of MS1MV2


def make_records(folder, count):
    """A `.rec` of `count` images of count / 50 identities."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(DISTINCT):
        smooth = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((112, 112), Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(smooth) + rng.normal(0, 8, (112, 112, 3)), 0, 255).astype(np.uint8)
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
            seconds, opened = seconds_of(lambda path=path, number=number: open_source(path, cache_dir=scratch / f"cache-{number}-{path.name}"))
            found.append(len(opened) / seconds)
        rates[name] = statistics.median(found[1:])
    return rates


def source_rates(source, rounds):
    """{what: images/s} of one thread that reads images in random order from page cache."""
    order = np.random.default_rng(0).permutation(len(source))[:20_000].tolist()
    calls = {"stored bytes": source.encoded, "checked for DALI": lambda i: load_encoded(source, i)}
    rates = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(len(order) / seconds_of(lambda call=call: [call(i) for i in order])[0])
    return {name: statistics.median(values) for name, values in rates.items()}


class MXNetReader:
    """DALI's own reader: decode, flip by a coin, normalise as our loader does."""

    def __init__(self, rec_path, idx_path, batch, threads, prefetch):
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(enable_conditionals=False)
        def pipeline():
            encoded, labels = fn.readers.mxnet(path=[str(rec_path)], index_path=[str(idx_path)], random_shuffle=True, initial_fill=BUFFER,
                                               name="reader")
            faces = fn.decoders.image(encoded, device="mixed" if DEVICE == "cuda" else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)
            return fn.flip(faces, horizontal=fn.random.coin_flip()), labels

        self._pipeline = pipeline(batch_size=batch, num_threads=threads, device_id=0 if DEVICE == "cuda" else None, prefetch_queue_depth=prefetch,
                                  exec_dynamic=True)

    def batches(self):
        while True:
            faces, labels = self._pipeline.run()
            images = Preprocessing().normalize(torch.from_dlpack(faces.as_tensor()).to(DEVICE))
            yield images, torch.from_dlpack(labels.as_tensor()).to(DEVICE).long().flatten()


def endless(loader):
    epoch = 0
    while True:
        for batch in loader.batches(epoch):
            yield batch.images, batch.labels
        epoch += 1


def decoding_rates(source, scratch, batch, batches, threads, rounds):
    """{path: images/s}."""
    idx = scratch / "images.idx"
    idx.write_text("".join(f"{number}\t{offset}\n" for number, offset in enumerate(source.offsets_in(source.rec_paths[0]).tolist())))
    sampler = EpochSampler(len(source), batch)
    block = EpochSampler(len(source), batch, block_size=256)
    options = {"device": DEVICE, "num_workers": threads, "prefetch": 2}
    loaders = {"ours, DALI": make_loader(source, sampler, backend="dali", on_broken="replace", **options),
               "ours, DALI, block shuffle": make_loader(source, block, backend="dali", on_broken="replace", **options),
               "ours, PyTorch workers": make_loader(source, sampler, backend="torch", on_broken="replace", **options)}
    runs = {name: endless(loader) for name, loader in loaders.items()}
    runs["DALI's MXNet reader"] = MXNetReader(source.rec_paths[0], idx, batch, threads, 2).batches()
    rates = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first fills buffers
        for name, run in runs.items():
            synchronize(DEVICE)
            start = time.perf_counter()
            for _ in range(batches):
                images, labels = next(run)
            synchronize(DEVICE)
            rates[name].append(batches * batch / (time.perf_counter() - start))
            assert images.shape == (batch, 3, 112, 112) and labels.shape == (batch,) and images.abs().max() <= 1
    for loader in loaders.values():
        loader.close()
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with one train.rec (default: one is made)")
    parser.add_argument("--images", type=int, default=40_000, help="records of the file that is made (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="batches a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads or processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # normalisation, beside the decoders

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = options.data or scratch / "data"
        if options.data is None:
            data.mkdir()
            make_records(data, options.images)
        source = open_source(data, cache_dir=scratch)
        shuffle_seconds = seconds_of(lambda: EpochSampler(SHUFFLED, 1024).indices(0, 0))[0]
        rates = {"index": index_rates(data, scratch, options.rounds), "source": source_rates(source, options.rounds),
                 "decoding": decoding_rates(source, scratch, options.batch, options.batches, options.threads, options.rounds)}
        sizes = [len(source.encoded(i)) for i in range(0, len(source), max(1, len(source) // 1000))]
    for title, group in rates.items():
        print(tabulate([title, "images/s"], [[name, f"{rate:,.0f}"] for name, rate in group.items()]))
        print()
    print(f"global shuffle of {SHUFFLED:,} images, once an epoch: {shuffle_seconds:.2f} s")
    measured = {"environment": environment(DEVICE), "images": len(source), "bytes_an_image": statistics.mean(sizes), "batch": options.batch,
                "decoding_threads": options.threads, "images_per_second": rates, "shuffle_seconds": shuffle_seconds, "shuffled_images": SHUFFLED}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decode-{device_slug(DEVICE)}-{measured['environment']['date']}.json"
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
