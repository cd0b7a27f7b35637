"""The store of embeddings: what is computed, by whom, how often, and what is refused."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from scf_fast.evaluation import embeddings as module
from scf_fast.evaluation.alignment import AlignedFaces
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.inference import Decoding, Embeddings
from scf_fast.objectives import Density
from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.sources.base import EncodedImages, ImageFiles


class Counting:
    """An embedder whose features are a picture's mean color, and that counts the images it has seen."""

    radius, embedding_dim, normalization, device, key = 64.0, 3, "insightface", torch.device("cpu"), "counting"

    is_settled, outputs, density = True, 1, Density.VMF

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        features = images.mean(dim=(2, 3)) + 2
        return Embeddings(features, features.sum(dim=1))


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(11)]
    for i, path in enumerate(paths):
        Image.new("RGB", (112, 112), (20 * i, 5, 250 - 20 * i)).save(path)
    return paths


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "_PART", 4)


def store(tmp_path, embedder, **share):
    return EmbeddingStore(
        embedder, tmp_path / "store", batch_size=3, decoding=Decoding("torch", num_workers=0), **share
    )


def expected_features():
    colors = np.array([[20 * i, 5, 250 - 20 * i] for i in range(11)], np.float32)
    return torch.from_numpy((colors - 127.5) / 127.5 + 2)


def test_a_backbone_alone_has_features_and_no_kappa(tmp_path, files):
    class Alone(Counting):
        outputs = 0

        def __call__(self, images):
            return Embeddings(super().__call__(images).features, None)

    for embedder in Alone(), Alone():
        embeddings = store(tmp_path, embedder).load(ImageFiles(files), "images")
        torch.testing.assert_close(embeddings.features, expected_features())
        assert embeddings.log_kappa is None and embeddings.kappa is None
    assert embedder.seen == 0  # the second reads what the first has left


def test_embeddings_are_computed_once_and_in_order(tmp_path, files):
    embedder = Counting()
    for _ in range(2):
        embeddings = store(tmp_path, embedder).load(ImageFiles(files), "images")
        torch.testing.assert_close(embeddings.features, expected_features())
        torch.testing.assert_close(embeddings.log_kappa, expected_features().sum(dim=1))
    assert embedder.seen == 11
    torch.testing.assert_close(embeddings.mu.norm(dim=1), torch.ones(11))
    np.testing.assert_allclose(embeddings.kappa, np.exp(expected_features().double().sum(dim=1)), rtol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3], ids=["scalar", "diagonal"])
def test_log_variances_are_stored_as_such(tmp_path, files, outputs):
    class Gaussian(Counting):
        density = Density.GAUSSIAN

        def __call__(self, images):
            features = super().__call__(images).features
            return Embeddings(features, -features if outputs == 3 else -features[:, 0], self.density)

    Gaussian.outputs, expected = outputs, -expected_features()
    for embedder in Gaussian(), Gaussian():
        embeddings = store(tmp_path, embedder).load(ImageFiles(files), "images")
        torch.testing.assert_close(embeddings.log_variance, expected if outputs == 3 else expected[:, 0])
        assert embeddings.log_kappa is None and embeddings.kappa is None
        precision = np.exp(-expected.double().numpy()[:, :outputs]).mean(axis=1)
        np.testing.assert_allclose(embeddings.confidence, precision, rtol=1e-5)
    assert embedder.seen == 0
    assert stored_keys(tmp_path) == {"features", "log_variance"}
    store(tmp_path, Counting()).load(AlignedFaces(ImageFiles(files), np.tile(TEMPLATE, (11, 1, 1))), "images")
    assert stored_keys(tmp_path) == {"features", "log_variance", "log_kappa"}


def stored_keys(tmp_path):
    """The names of all arrays in the store."""
    return {key for path in (tmp_path / "store").rglob("*.npz") for key in np.load(path)}


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path, files):
    class CutOff(Counting):
        def __call__(self, images):
            if self.seen >= 6:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, CutOff()).load(ImageFiles(files), "images")
    again = Counting()
    torch.testing.assert_close(store(tmp_path, again).load(ImageFiles(files), "images").features, expected_features())
    assert again.seen == 11 - 4  # the first part was whole


RANKS = """
import sys
from pathlib import Path
import torch
from scf_fast.pipelines.sources.base import ImageFiles
from scf_fast import distributed
from scf_fast.networks import frozen
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.inference import Decoding, Embedder
from scf_fast.evaluation import embeddings
from scf_fast.model import SCF

torch.manual_seed(0)
backbone = Backbone("ir_tiny", 24)
net = build_confidence_net("conv", 16, 7, initial_kappa=300.0)
model = SCF(backbone, net, radius=64.0, normalization="insightface").eval()
rank = distributed.start().rank
source = ImageFiles(sorted(Path(sys.argv[1]).glob("*.png")))
embeddings._PART, seen = 3, []

def embedder(limits):
    frozen.MIN_COSINE, frozen.MAX_CONVF_ERROR = limits
    return Embedder(model, "cpu", "bf16")

def settled(limits):
    made = embedder(limits)
    try:
        made.settle(torch.randn(4, 3, 112, 112))
    except ValueError as error:
        return str(error)
    return str(made._backbone.dtype)

lenient, strict = (0.0, {"bf16": 1.0, "fp32": 1.0}), (0.0, {"bf16": 0.0, "fp32": 1.0})
never = (0.0, {"bf16": 0.0, "fp32": 0.0})
# One line a rank and question, so that the output can be told apart however the ranks interleave.
answers = [settled(lenient), settled(strict if rank else lenient), settled(never if rank else lenient)[:42]]

shared, decoding = embedder(lenient), Decoding("torch", num_workers=0)
store = embeddings.EmbeddingStore(shared, Path(sys.argv[2]), batch_size=2, decoding=decoding, rank=rank, world_size=2)
embed = shared._embed
shared._embed = lambda models, images: (seen.append(len(images)), embed(models, images))[1]
for _ in range(2):
    store.fill(source, "images")
torch.distributed.barrier()
loaded = store.load(source, "images")
with torch.no_grad():
    alone = embedder(lenient)
    (_, images), = embeddings.load_batches(alone, source, [torch.arange(11).numpy()], decoding)
    at_once = alone(images).features
cosine = torch.nn.functional.cosine_similarity(loaded.features, at_once).min().item()
print(f"\\nrank {rank}: {answers} embedded {sum(seen)} cosine {cosine > 0.999}", flush=True)
distributed.finish()
distributed.leave(0)
"""


def test_ranks_share_the_work_and_settle_on_one_precision(run_ranks, tmp_path, files):
    """bf16 that both ranks find accurate; that one of them refuses; float32 refused by one of them too. Then 11 images
    in parts of three.
    """
    (tmp_path / "ranks.py").write_text(RANKS)
    output = run_ranks(2, tmp_path / "ranks.py", tmp_path, tmp_path / "store")
    lines = dict(line.split(": ", 1) for line in output.splitlines() if line.startswith("rank "))
    verdicts = "['torch.bfloat16', 'torch.float32', {!r}]"
    assert (
        lines["rank 0"]
        == verdicts.format("the backbone is not accurate in fp32 on another rank"[:42]) + " embedded 6 cosine True"
    )
    assert (
        lines["rank 1"]
        == verdicts.format("the frozen backbone differs from the float32 model"[:42]) + " embedded 5 cosine True"
    )


def test_no_flipped_bit_and_no_lost_end_of_a_part_is_used(tmp_path, files):
    files[1].write_bytes(b"broken")  # so that all arrays are there
    store(tmp_path, Counting()).load(ImageFiles(files), "images")
    path = min((tmp_path / "store").rglob("*.npz"))
    content, rng = path.read_bytes(), np.random.default_rng(0)

    def read():
        return module._read(path, Embeddings.allocate(4, 3, 1))

    whole, refused = read(), 0
    damaged = [content[:length] for length in range(0, len(content), 150)]
    for place in range(0, len(content), 3):
        flipped = content[place] ^ 1 << int(rng.integers(8))
        damaged.append(content[:place] + bytes([flipped]) + content[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read()
        except ValueError:
            refused += 1
            continue
        assert found.left_out == whole.left_out
        torch.testing.assert_close(found.features, whole.features, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(found.log_kappa, whole.log_kappa, equal_nan=True, rtol=0, atol=0)
    assert refused > len(damaged) / 2  # the others are dates and the like


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:300], lambda content: b"x" + content])
def test_a_damaged_part_is_computed_again(tmp_path, files, caplog, damage):
    whole = store(tmp_path, Counting()).load(ImageFiles(files), "images")
    path = min((tmp_path / "store").rglob("*.npz"))
    content = path.read_bytes()
    path.write_bytes(damage(content)[: len(content)])
    again = Counting()
    torch.testing.assert_close(store(tmp_path, again).load(ImageFiles(files), "images").features, whole.features)
    assert again.seen == 4 and "000000000.npz: is damaged" in caplog.text and path.stat().st_size == len(content)


def test_a_part_that_is_damaged_after_the_check_ends_in_one_line(tmp_path, files):
    shared = store(tmp_path, Counting(), world_size=2)  # its rank 0, after all have filled it
    store(tmp_path, Counting()).fill(ImageFiles(files), "images")
    sorted((tmp_path / "store").rglob("*.npz"))[1].write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"004\.npz: is damaged \(.*\); start again, and it is computed anew"):
        shared.load(ImageFiles(files), "images")


@pytest.mark.parametrize("change", ["model", "content", "time", "landmarks"])
def test_another_model_or_other_data_is_computed_anew(tmp_path, files, change):
    landmarks = np.tile(TEMPLATE, (11, 1, 1))
    store(tmp_path, Counting()).load(AlignedFaces(ImageFiles(files), landmarks), "images")
    embedder = Counting()
    if change == "model":
        embedder.key = "another"
    elif change == "content":
        files[3].write_bytes(files[4].read_bytes() + b" ")
    elif change == "time":
        os.utime(files[3], (1, 1))
    else:
        landmarks[2, 0, 0] += 1e-3
    store(tmp_path, embedder).load(AlignedFaces(ImageFiles(files), landmarks), "images")
    assert embedder.seen == 11


def test_images_in_memory_are_known_by_their_bytes(tmp_path, files):
    images = [path.read_bytes() for path in files]
    store(tmp_path, Counting()).load(EncodedImages(images), "images")
    same, other = Counting(), Counting()
    store(tmp_path, same).load(EncodedImages(images), "images")
    store(tmp_path, other).load(EncodedImages(images[::-1]), "images")
    assert (same.seen, other.seen) == (0, 11)


def test_variances_without_a_finite_inverse_are_refused(files):
    for prediction in (torch.tensor([-1.0, -90.0]), torch.tensor([[-1.0, 2.0], [90.0, 1.0]])):
        embeddings = Embeddings(torch.ones(2, 3), prediction, Density.GAUSSIAN)
        with pytest.raises(ValueError, match=r"and variances finite and positive; those of 1 of 2 .* first .*5\.png"):
            embeddings.check_usable(ImageFiles(files), first=4)
        Embeddings(torch.ones(2, 3), prediction.clamp(-80, 80), Density.GAUSSIAN).check_usable(ImageFiles(files))


@pytest.mark.parametrize(
    "damage",
    [
        lambda features, log_kappa: (features.log() * torch.nan, log_kappa),
        lambda features, log_kappa: (features * 0, log_kappa),
        lambda features, log_kappa: (features, log_kappa + 90),  # kappa overflows float32
        lambda features, log_kappa: (features, log_kappa - 200),  # kappa is 0
    ],
)
def test_unusable_output_names_the_image_and_is_not_kept(tmp_path, files, damage):
    class Broken(Counting):
        def __call__(self, images):
            first = self.seen
            found = super().__call__(images)
            bad = torch.arange(first, self.seen) >= 6
            features, log_kappa = damage(found.features, found.log_kappa)
            return Embeddings(
                torch.where(bad[:, None], features, found.features), torch.where(bad, log_kappa, found.log_kappa)
            )

    with pytest.raises(ValueError, match=r"those of 2 of 4 images are not, the first .*6\.png"):
        store(tmp_path, Broken()).load(ImageFiles(files), "images")
    again = Counting()
    store(tmp_path, again).load(ImageFiles(files), "images")
    assert again.seen == 11 - 4
