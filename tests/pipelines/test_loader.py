"""Both backends against Pillow called here, and against each other."""

import builtins
import gc
import io
import itertools
import logging
import multiprocessing
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.augmentation import Augmentation
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.loading.decode import decode_face
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import EncodedImages
from scf_fast.pipelines.sources.tar import write_shard

try:
    import nvidia.dali  # noqa: F401
except ImportError:
    HAS_DALI = False
else:
    HAS_DALI = True
BACKENDS = [
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")),
    "torch",
]
NUM_IMAGES = 22
FEWEST_WORKERS = {"dali": 1, "torch": 0}  # for tests of what does not depend on processes, which take long to start


def encode(pixels, fmt, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt, **options)
    return file.getvalue()


def picture(rng, height=112, width=112, channels=3):
    """Smooth colors with some noise, so that decoders agree as they do on photographs."""
    smooth = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.clip(np.asarray(smooth) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    return pixels if channels == 3 else pixels[..., 0]


@pytest.fixture(scope="module")
def source():
    """JPEGs as face data sets hold them, and one of each other kind that must come out as RGB 112 x 112 too."""
    rng = np.random.default_rng(0)
    images = [encode(picture(rng), "JPEG", quality=quality) for quality in rng.integers(60, 98, NUM_IMAGES).tolist()]
    images[3] = encode(picture(rng, channels=1), "JPEG")
    images[5] = encode(np.dstack([picture(rng), picture(rng, channels=1)]), "PNG")
    images[7] = encode(picture(rng, 150, 130), "JPEG")
    images[9] = encode(picture(rng, 64, 80), "PNG")
    file = io.BytesIO()
    Image.fromarray(picture(rng)).convert("CMYK").save(file, "JPEG")
    images[11] = file.getvalue()
    images[13] = encode(picture(rng), "WEBP", quality=90)
    images[15] = encode(picture(rng, channels=1), "PPM")
    images[17] = encode(picture(rng, 90, 112), "GIF")
    turned = Image.Exif()
    turned[0x0112] = 6
    images[19] = encode(picture(rng, 150, 130), "JPEG", exif=turned)
    return EncodedImages(images, labels=np.arange(NUM_IMAGES) % 5)


def pillow_face(encoded):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    return np.asarray(
        image if image.size == (112, 112) else image.resize((112, 112), Image.Resampling.BILINEAR)
    ).astype(np.float64)


def same_batches(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for left, right in zip(a, b) for x, y in zip(left, right))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", ["insightface", "published"])
def test_batches_are_the_samplers_images_decoded_flipped_and_normalized(source, backend, normalization):
    sampler = EpochSampler(NUM_IMAGES, 8, seed=3, last_batch="partial")
    with make_loader(source, sampler, Preprocessing(normalization), backend=backend) as loader:
        assert loader.backend == backend and loader.batches_per_epoch == 3
        batches = list(loader.batches(epoch=2))
    assert [len(batch.labels) for batch in batches] == [8, 8, 6]
    for number, batch in enumerate(batches):
        indices = sampler.indices(2, number)
        flips = sampler.flips(2, indices)
        assert batch.indices.tolist() == indices.tolist() and batch.labels.tolist() == (indices % 5).tolist()
        assert batch.images.shape == (len(indices), 3, 112, 112) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        pixels = (
            batch.images.permute(0, 2, 3, 1).double().numpy()
            * {"insightface": 127.5, "published": 128.0}[normalization]
            + 127.5
        )
        for face, i, flip in zip(pixels, indices, flips):
            error = np.abs(face - pillow_face(source.encoded(i))[:, :: -1 if flip else 1])
            assert (
                error.max() < 3.01 and error.mean() < 0.5
            )  # decoders may round differently; a wrong flip or channel is 10 and more
    assert flips.any() and not flips.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_unequal_size(source, backend):
    """The groups of a person: 22 images of 5 people, dealt by threes."""
    sampler = PairSampler(np.arange(NUM_IMAGES) % 5, 2, 3, seed=1)
    with make_loader(source, sampler, backend=backend, num_workers=FEWEST_WORKERS[backend]) as loader:
        for epoch in range(3):
            expected = [sampler.indices(epoch, batch).tolist() for batch in range(sampler.batches_per_epoch)]
            assert len(expected) == 3 and len({*map(len, expected)}) > 1
            assert [batch.indices.tolist() for batch in loader.batches(epoch)] == expected


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
def test_backends_give_the_same_batches(source):
    sampler = EpochSampler(NUM_IMAGES, 4, seed=1)
    epochs = []
    for backend in ("dali", "torch"):
        with make_loader(source, sampler, backend=backend) as loader:
            epochs.append([*loader.batches(0), *loader.batches(1)])
    assert len(epochs[0]) == len(epochs[1]) == 10
    for dali, pillow in zip(*epochs):
        assert torch.equal(dali.indices, pillow.indices) and torch.equal(dali.labels, pillow.labels)
        error = (dali.images - pillow.images).abs() * 127.5
        assert error.max() < 3.01 and error.mean() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_restart_and_half_read_epochs(source, backend):
    sampler = EpochSampler(NUM_IMAGES, 4, seed=5)
    with make_loader(source, sampler, backend=backend) as loader:
        whole = list(loader.batches(0))
        for start in range(6):
            assert same_batches(list(loader.batches(0, start)), whole[start:])
        abandoned = loader.batches(1)
        first = next(abandoned)
        kept = first.images.clone()
        assert same_batches(list(loader.batches(0)), whole)  # the abandoned iteration leaves nothing behind
        assert list(abandoned) == []  # and has ended
        assert torch.equal(first.images, kept)  # a batch that is kept stays what it was
        for _ in loader.batches(0):
            break
        assert same_batches(list(loader.batches(0, 2)), whole[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_on_another_number_of_ranks(source, backend):
    def run(rank, world_size, start_batch):
        sampler = EpochSampler(NUM_IMAGES, 6, rank=rank, world_size=world_size, seed=2)
        with make_loader(source, sampler, backend=backend, num_workers=FEWEST_WORKERS[backend], prefetch=1) as loader:
            return list(loader.batches(4, start_batch))

    one = run(0, 1, 0)
    shares = [run(rank, 2, 1) for rank in range(2)]
    assert same_batches([[torch.cat(parts) for parts in zip(*batches)] for batches in zip(*shares)], one[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_share_of_a_partial_batch_can_be_empty(source, backend):
    sizes = []
    for rank in range(4):
        sampler = EpochSampler(NUM_IMAGES, 20, rank=rank, world_size=4, last_batch="partial")
        with make_loader(source, sampler, backend=backend, num_workers=FEWEST_WORKERS[backend]) as loader:
            batches = list(loader.batches(0))
        assert all(batch.images.shape == (len(batch.indices), 3, 112, 112) for batch in batches)
        sizes.append([len(batch.labels) for batch in batches])
    assert sizes == [[5, 0], [5, 1], [5, 0], [5, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("broken", [b"no image", None, b""], ids=["garbage", "truncated", "empty"])
def test_broken_image_is_named_and_the_loader_goes_on(source, backend, broken):
    images = [source.encoded(i).tobytes() for i in range(8)]
    images[6] = images[6][:-500] if broken is None else broken
    sampler = EpochSampler(8, 2, shuffle=False)
    with make_loader(EncodedImages(images), sampler, backend=backend, num_workers=1) as loader:
        batches = loader.batches(0)
        assert [next(batches).indices.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        with pytest.raises(ValueError, match=r"^image 6 cannot be decoded: .*; replace the image or leave it out$"):
            next(batches)
        next(loader.batches(0, 1))  # prefetches the broken image ...
        assert len(list(itertools.islice(loader.batches(0), 3))) == 3  # ... which must not reach the next iteration


def broken_images(source):
    """24 images, and {position: replacement} of those that are broken: on the outside, deep inside, and last."""
    images = [source.encoded(i % 3).tobytes() for i in range(24)]
    png = encode(picture(np.random.default_rng(3)), "PNG")
    data = png.index(b"IDAT") + 300
    bad_table = images[0].replace(
        b"\xff\xdb", b"\xff\xfe"
    )  # no quantization table: libjpeg gives up in the middle of a whole file
    bad = {
        3: b"",
        4: b"no image",
        9: images[9][:-300],
        12: png[:data] + bytes([png[data] ^ 255]) + png[data + 1 :],
        17: bad_table,
        23: png[:90],
    }
    for i, image in bad.items():
        images[i] = image
    end = len(png) - 13  # a wrong checksum: Pillow does not mind, DALI does
    images[14] = png[:end] + bytes([png[end] ^ 255]) + png[end + 1 :]
    replaced = {3: 5, 4: 5, 9: 10, 12: 13, 17: 18, 23: 0}
    return EncodedImages(images, labels=np.arange(24)), replaced


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_broken_images_are_replaced_counted_and_named(source, backend, prefetch, caplog):
    images, replaced = broken_images(source)
    sampler = EpochSampler(24, 4, seed=1)
    with make_loader(images, sampler, backend=backend, num_workers=2, prefetch=prefetch, on_broken="replace") as loader:
        epochs = [list(loader.batches(epoch)) for epoch in range(3)]
        assert (
            sorted(loader.broken.found) == sorted(replaced) and len(loader.broken) == 6 and loader.broken.replaced == 18
        )
        assert backend == "torch" or loader._converted == {14}
        assert all(message.startswith(f"image {i} cannot be decoded") for i, message in loader.broken.found.items())
    named = sorted(
        int(record.args[0].split()[1]) for record in caplog.records if record.message.startswith("broken image")
    )
    assert named == sorted(replaced)  # once each
    for epoch, batches in enumerate(epochs):
        asked = np.concatenate([sampler.indices(epoch, batch) for batch in range(6)])
        shown = [replaced.get(i, i) for i in asked.tolist()]
        assert (
            torch.cat([batch.indices for batch in batches]).tolist()
            == shown
            == torch.cat([batch.labels for batch in batches]).tolist()
        )
        flips = sampler.flips(epoch, asked)
        pixels = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).double().numpy() * 127.5 + 127.5
        for face, i, flip in zip(pixels, shown, flips):
            assert np.abs(face - decode_face(images.encoded(i))[:, :: -1 if flip else 1]).max() < 3.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_images_that_are_left_out_are_black_and_have_no_number(source, backend):
    """A whole batch of them, some that only the decoder finds, and one that is known."""
    images, replaced = broken_images(source)
    images._images[19:22], images.broken = [b"none"] * 3, np.array([7])
    expected = sorted({*replaced, 7, 19, 20, 21})
    sampler = EpochSampler(24, 3, shuffle=False)
    workers = FEWEST_WORKERS[backend]
    with make_loader(images, sampler, backend=backend, num_workers=workers, on_broken="leave_out") as loader:
        batches = list(loader.batches(0))
        assert sorted(loader.broken.found) == expected
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == [-1 if i in expected else i for i in range(24)]
    assert torch.equal(indices, torch.cat([batch.labels for batch in batches]))
    pixels = torch.cat([batch.images for batch in batches])
    assert (pixels[indices < 0] == -1).all() and (pixels[indices >= 0].amax(dim=(1, 2, 3)) > -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_known_to_be_broken_is_not_tried(source, backend, caplog):
    images, replaced = broken_images(source)
    images.broken = np.array(sorted(replaced))
    with make_loader(images, EpochSampler(24, 8, shuffle=False), backend=backend, on_broken="replace") as loader:
        batches = list(loader.batches(0))
        assert len(loader.broken) == 6 and not loader.broken.found
    assert (
        torch.cat([batch.indices for batch in batches]).tolist() == [replaced.get(i, i) for i in range(24)]
        and "broken" not in caplog.text
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_that_disappears_is_one_error(source, backend):
    class Gone(EncodedImages):
        def encoded(self, i):
            raise InputError(f"cannot read image {i}: the mount is gone")

    images = Gone([b"x"] * 8, labels=np.zeros(8))
    with make_loader(images, EpochSampler(8, 4), backend=backend, on_broken="replace") as loader:
        for _ in range(2):
            with pytest.raises(ValueError, match="and the 7 images after it cannot be read or decoded"):
                next(loader.batches(0))


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
def test_backends_augment_in_the_same_way(source):
    preprocessing = Preprocessing(
        augmentation=Augmentation(crop=0.5, resample=0.5, blur=0.5, hue_saturation=0.5, gray=0.3, occlusion=0.5)
    )
    sampler = EpochSampler(NUM_IMAGES, 6, seed=1)
    epochs = []
    for backend, chosen in (("dali", preprocessing), ("torch", preprocessing), ("torch", Preprocessing())):
        with make_loader(source, sampler, chosen, backend=backend, num_workers=FEWEST_WORKERS[backend]) as loader:
            epochs.append(torch.cat([batch.images for batch in loader.batches(1)]) * 127.5)
    assert (epochs[0] - epochs[1]).abs().mean() < 0.6 and (epochs[1] - epochs[2]).abs().mean() > 5


def test_disk_is_asked_in_order_and_ahead(source):
    class Asked(EncodedImages):
        asked, read = [], []

        def will_need(self, indices):
            self.asked.append(indices.tolist())

        def encoded(self, i):
            self.read.append(i)
            return super().encoded(i)

    images = Asked([source.encoded(0).tobytes()] * 40)
    sampler = EpochSampler(40, 4, seed=2)
    loader = make_loader(images, sampler, backend="torch", num_workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scf_fast.pipelines.loading.base._READ_AHEAD", 12)
        with loader:
            list(loader.batches(0, 1))
    groups = [
        np.sort(np.concatenate([sampler.indices(0, batch) for batch in batches])).tolist()
        for batches in ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    ]
    assert (
        images.asked == groups
        and images.read == np.concatenate([sampler.indices(0, batch) for batch in range(1, 10)]).tolist()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreadable_image_is_named(backend, source):
    class Unreadable(EncodedImages):
        def encoded(self, i):
            if i == 2:
                raise InputError("cannot read image 2: the disk is gone")
            return super().encoded(i)

    images = Unreadable([source.encoded(i).tobytes() for i in range(4)])
    with (
        make_loader(images, EpochSampler(4, 2), backend=backend) as loader,
        pytest.raises(ValueError, match=r"^cannot read image 2: the disk"),
    ):
        list(loader.batches(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("normalization", "scale"), [("insightface", 127.5), ("published", 128.0)])
def test_normalization_is_rounded_once(dtype, normalization, scale):
    values = torch.arange(256, dtype=torch.uint8)
    result = Preprocessing(normalization).normalize(values.reshape(1, 16, 16, 1).repeat(2, 1, 1, 3), dtype)
    expected = ((values.double() - 127.5) / scale).to(dtype)
    assert torch.equal(result, expected.reshape(1, 1, 16, 16).expand(2, 3, 16, 16))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["insightface", "published"])
def test_dali_normalizes_exactly(dtype, normalization):
    """PNG decodes exactly, so the backends agree bit for bit."""
    rng = np.random.default_rng(1)
    images = EncodedImages(
        [encode(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8), "PNG") for _ in range(6)], labels=np.arange(6)
    )
    epochs = []
    for backend in ("dali", "torch"):
        with make_loader(
            images,
            EpochSampler(6, 3, seed=1),
            Preprocessing(normalization),
            backend=backend,
            dtype=dtype,
            num_workers=FEWEST_WORKERS[backend],
        ) as loader:
            epochs.append(list(loader.batches(0)))
    assert same_batches(*epochs) and len(epochs[0]) == 2 and epochs[0][0].images.dtype == dtype
    assert epochs[0][0].images.is_contiguous(memory_format=torch.channels_last)


def test_without_flips(source):
    sampler = EpochSampler(NUM_IMAGES, NUM_IMAGES, shuffle=False)
    with make_loader(
        source, sampler, Preprocessing(horizontal_flip=False), backend="torch", num_workers=0, dtype=torch.bfloat16
    ) as loader:
        (batch,) = loader.batches(0)
    assert batch.images.dtype == torch.bfloat16
    expected = torch.from_numpy(np.stack([(pillow_face(source.encoded(i)) - 127.5) / 127.5 for i in range(NUM_IMAGES)]))
    assert torch.equal(batch.images, expected.permute(0, 3, 1, 2).to(torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_ends_workers(source, backend):
    loader = make_loader(source, EpochSampler(NUM_IMAGES, 4), backend=backend)
    batches = loader.batches(0)
    next(batches)
    loader.close()
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("face-reader")]
    assert list(batches) == []


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
def test_dali_that_leaves_faces_lying_on_their_side_is_refused(source, monkeypatch):
    monkeypatch.delitem(sys.modules, "scf_fast.pipelines.loading.dali", raising=False)
    monkeypatch.setattr("nvidia.dali.__version__", "2.1.1")
    with pytest.raises(ValueError, match=r"2\.2 or newer is needed, this is 2\.1\.1"):
        make_loader(source, EpochSampler(NUM_IMAGES, 4), backend="dali")


def test_torch_takes_over_where_dali_is_missing(source, monkeypatch, caplog):
    def no_dali(name, *rest, import_module=builtins.__import__):
        if name.startswith("nvidia.dali"):
            raise ImportError("libcuda.so.1 is missing")
        return import_module(name, *rest)

    monkeypatch.delitem(sys.modules, "scf_fast.pipelines.loading.dali", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_dali)
    sampler = EpochSampler(NUM_IMAGES, 4)
    with caplog.at_level(logging.INFO, logger="scf_fast.pipelines.loader"):
        assert [make_loader(source, sampler).backend for _ in range(2)] == ["torch", "torch"]
    assert [record.message for record in caplog.records] == [
        "images are decoded by Pillow in worker processes: NVIDIA DALI cannot be imported: libcuda.so.1 is missing"
    ]
    with pytest.raises(ValueError, match="backend='dali' needs NVIDIA DALI: libcuda"):
        make_loader(source, sampler, backend="dali")


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
def test_auto_prefers_dali(source):
    with make_loader(source, EpochSampler(NUM_IMAGES, 4)) as loader:
        assert loader.backend == "dali"


def test_bad_arguments(source):
    sampler = EpochSampler(NUM_IMAGES, 4)
    for arguments, message in (
        ({"backend": "mxnet"}, "backend must be 'auto', 'dali' or 'torch', got 'mxnet'"),
        ({"dtype": torch.uint8}, "floating-point type, got torch.uint8"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"prefetch": 0}, "prefetch at least 1"),
        ({"on_broken": "skip"}, "on_broken must be one of 'raise', 'replace', 'leave_out', got 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loader(source, sampler, **arguments)
    with pytest.raises(ValueError, match="the sampler must cover the source: 9 samples for 22 images"):
        make_loader(source, EpochSampler(9, 3))
    with pytest.raises(ValueError, match="normalization must be one of insightface, published, got 'imagenet'"):
        Preprocessing("imagenet")
    with (
        make_loader(source, sampler, backend="torch") as loader,
        pytest.raises(ValueError, match=r"start_batch must lie in 0\.\.5, got 6"),
    ):
        loader.batches(0, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_batches_match_pillow_and_stay_valid(source, backend):
    sampler = EpochSampler(NUM_IMAGES, 4, seed=1)
    with make_loader(source, sampler, backend="torch", num_workers=0) as loader:
        expected = list(loader.batches(0))
    with make_loader(source, sampler, backend=backend, device="cuda") as loader:
        batches = [*loader.batches(0), *loader.batches(1)][: len(expected)]
    for batch, reference in zip(batches, expected):
        assert batch.images.is_cuda and batch.labels.is_cuda and torch.equal(batch.labels.cpu(), reference.labels)
        error = (batch.images.cpu() - reference.images).abs() * 127.5
        assert error.max() < 8 and error.mean() < 1  # nvJPEG rounds its transform and colors differently from libjpeg


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
def test_workers_forked_after_dali_gave_up_do_not_wait_for_its_threads(source):
    """What is left of a pipeline must not be collected in a worker; there its threads do not exist."""
    images, _ = broken_images(source)
    kept = []
    loader = make_loader(images, EpochSampler(24, 4, shuffle=False), backend="dali", num_workers=1)
    with pytest.raises(ValueError, match="image 3 cannot be decoded") as error:
        list(loader.batches(0))
    kept.append(error)
    loader.close()
    loader = make_loader(images, EpochSampler(24, 4), backend="dali", num_workers=1, on_broken="replace")
    list(loader.batches(0))
    del loader, error
    kept.clear()
    with make_loader(source, EpochSampler(NUM_IMAGES, 4), backend="torch", num_workers=1) as loader:
        decode = loader._decode_batch
        loader._decode_batch = lambda *batch: (gc.collect(), decode(*batch))[1]
        assert len(list(loader.batches(0))) == 5


def test_fewer_shards_than_processes_and_ranks(source, tmp_path):
    """One tar for two ranks with three processes each: images are dealt by their index, so nobody goes without."""
    write_shard(tmp_path / "a.tar", [(f"{i}", ".jpg", source.encoded(i).tobytes(), i % 5) for i in range(12)])
    images, shown = open_source(tmp_path / "a.tar"), []
    for rank in range(2):
        sampler = EpochSampler(12, 4, rank=rank, world_size=2, seed=1)
        with make_loader(images, sampler, backend="torch", num_workers=3) as loader:
            batches = list(loader.batches(0))
        assert [len(batch.labels) for batch in batches] == [2, 2, 2]
        shown += torch.cat([batch.indices for batch in batches]).tolist()
    assert sorted(shown) == list(range(12))
