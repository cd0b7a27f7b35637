"""Writes what commit 0428aba left on disk: two training runs that were cut off, feature caches and the data's index.

    python tests/legacy/write_run_0428aba.py OUT --rec FILE

    OUT/data      a copy of FILE, a small train.rec of up to 61 identities, with `property` and `train.rec.index`
    OUT/stage1    stage 1 on two ranks with ZeRO 2: checkpoints of steps 4 and 6, dead while it wrote that of step 7
    OUT/stage2    stage 2 on the backbone of stage1, likewise
    OUT/cache_*   the features that it trained on, as several types of the cache store them

The formats are written down here a second time, as they were at that commit: no code of the project takes part, and
what becomes of its formats later does not reach this file. The values are drawn from a seed. Where a test needs one it
takes it from `Content`, which knows nothing of any format.

A later version that changes a format, or adds a key to one, gets a `write_run_<commit>.py` of its own. It may import
this one, derive from `Content`, and replace the functions whose format has changed; test_legacy_runs.py then lists it.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

# What the two runs were launched with; expectations in tests follow from these.
CLASSES, Z_DIM, RANKS, BATCH_SIZE, EPOCHS, RUN_SEED = 61, 32, 2, 32, 2, 777
STEP, STEPS = 6, 8  # of the newest checkpoint; of a whole run over 128 images
SKIPPED = 1  # of the steps so far: the optimizer has made one update less
RADIUS, NORMALIZATION, SAMPLE_RATE = 32.0, "insightface", 0.5
STAGE1_LR, STAGE2_LR, REDUCED_LR, PATIENCE = 0.01, 0.01, 1e-3, 4
WEIGHT_DECAY = 5e-4
STAGE1_LOSSES = 100.0, 600.0  # the mean of epoch 1; the sum over the two steps of epoch 2, far worse
STAGE1_FLAGS = f"""--stage backbone --network ir_small --z_dim {Z_DIM} --normalization {NORMALIZATION} --lr {STAGE1_LR}
--sample_rate {SAMPLE_RATE}""".split()
STAGE2_FLAGS = f"""--stage confidence --confidence_net conv --precision fp32 --radius {RADIUS} --lr {STAGE2_LR}
--lr_scheduler ReduceLROnPlateau --plateau_patience {PATIENCE}""".split()
COMMON_FLAGS = f"--batch_size {BATCH_SIZE} --epochs {EPOCHS} --log_every 1 --num_workers 1 --record_samples".split()

CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
CACHE_DTYPES["fp8"] = torch.float8_e4m3fn
LARGEST = {"fp8": 448.0, "int8": 127.0}  # what the largest value of a record is scaled to
WRITTEN_CACHES = ("bf16", "int8")  # the default, and one of those with a scale
MAP = (128, 7, 7)  # channels, height and width of the last feature map of ir_small
_UNITS = ((16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128))  # channels in and out of each unit of ir_small
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BEGAN = 1_760_000_000.0  # when the runs were started, seconds since 1970


# ---- what the folders hold, whatever the format


class Content:
    """Draws the values of both runs, and says what the code of that commit would have done next with them.

    Attributes:
        records: of the RecordIO file.
        broken: number of the image that the index notes as broken, which was found after both runs; step 5 shows it.
        backbone, net: state_dicts of backbone and confidence net after step 6, names in their order.
        momentum: parameter of the backbone -> its SGD momentum.
        exp_avg, exp_avg_sq: parameter of the confidence net -> its moments in Adam.
        class_centers, centers_momentum: (61, 32) float32.
        earlier_backbone, earlier_net, earlier_class_centers: the weights after step 4.
        features: (N, 2, 32) float32 of each image, as it is and mirrored.
        maps: (N, 2, 128, 7, 7) float32, likewise, before a cache's type rounds them.

    Args:
        rec: path of a RecordIO file of 128 images.
        seed: of the values; the runs themselves had --seed 777.

    Raises:
        ValueError: the file is another one.
    """

    def __init__(self, rec: str | Path, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.records = read_records(rec)
        if len(self.records.labels) != STEPS // EPOCHS * BATCH_SIZE or self.records.labels.max() >= CLASSES:
            raise ValueError(f"{rec}: must hold 128 images of at most {CLASSES} identities; take another file")
        self.earlier_backbone, self.backbone = (_draw_backbone(generator, step) for step in (4, STEP))
        self.earlier_net, self.net = (_draw_confidence_net(generator, step) for step in (4, STEP))
        self.momentum = {name: 0.1 * _normal(generator, value.shape) for name, value in trained(self.backbone).items()}
        self.exp_avg = {name: 1e-3 * _normal(generator, value.shape) for name, value in trained(self.net).items()}
        self.exp_avg_sq = {name: 1e-7 + 1e-6 * _uniform(generator, value.shape) for name, value in self.exp_avg.items()}
        shape = (CLASSES, Z_DIM)
        self.earlier_class_centers, self.class_centers = (0.5 * _normal(generator, shape) for _ in range(2))
        self.centers_momentum = _normal(generator, shape)
        labels = torch.from_numpy(self.records.labels)
        directions = torch.nn.functional.normalize(self.class_centers)[labels]
        self.features = 4 * directions[:, None] + _normal(generator, (len(labels), 2, Z_DIM))
        self.maps = _normal(generator, (len(labels), 2, *MAP))
        self.broken = self.images(5)[0]

    def images(self, step: int) -> list[int]:
        """Returns the images of a step, counted from 1, in the order of the batch over all ranks."""
        epoch, batch = divmod(step - 1, len(self.records.labels) // BATCH_SIZE)
        order = np.argsort(_splitmix64(_stream_key(RUN_SEED, epoch, 0), np.arange(len(self.records.labels))))
        return order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE].tolist()

    def mirrored(self, step: int) -> list[int]:
        """Returns which of these are mirrored, 1 or 0 for each."""
        epoch = (step - 1) // (len(self.records.labels) // BATCH_SIZE)
        hashes = _splitmix64(_stream_key(RUN_SEED, epoch, 1), np.array(self.images(step)))
        return (hashes >> np.uint64(63)).astype(int).tolist()

    def drawn_classes(self, step: int) -> list[int]:
        """Returns the class centers that take part in a step of stage 1: a sample, and those of the images."""
        drawn = _mix(_mix(RUN_SEED) ^ (step - 1))
        sampled = (number for number in range(CLASSES) if _mix(_mix(number) ^ drawn) < int(SAMPLE_RATE * 2**31))
        return sorted({*sampled, *self.records.labels[self.images(step)].tolist()})


def trained(state: dict) -> dict:
    """Returns the parameters of a state_dict: what is left without the statistics of BatchNorm."""
    return {name: value for name, value in state.items() if not name.endswith(_STATISTICS)}


def _normal(generator, shape):
    return torch.randn(shape, generator=generator)


def _uniform(generator, shape):
    return torch.rand(shape, generator=generator)


def _draw_backbone(generator, steps):
    """The state_dict of an ir_small with a 32-wide embedding, named as in the published code."""
    state = {}
    _add_convolution(state, generator, "input_layer.0", 3, 16, 3)
    _add_norm(state, generator, "input_layer.1", 16, steps)
    state["input_layer.2.weight"] = 0.25 + 0.05 * _normal(generator, (16,))
    for number, (inputs, outputs) in enumerate(_UNITS):
        unit = f"body.{number}"
        if inputs != outputs:
            _add_convolution(state, generator, f"{unit}.shortcut_layer.0", inputs, outputs, 1)
            _add_norm(state, generator, f"{unit}.shortcut_layer.1", outputs, steps)
        _add_norm(state, generator, f"{unit}.res_layer.0", inputs, steps)
        _add_convolution(state, generator, f"{unit}.res_layer.1", inputs, outputs, 3)
        state[f"{unit}.res_layer.2.weight"] = 0.25 + 0.05 * _normal(generator, (outputs,))
        _add_convolution(state, generator, f"{unit}.res_layer.3", outputs, outputs, 3)
        _add_norm(state, generator, f"{unit}.res_layer.4", outputs, steps)
    _add_norm(state, generator, "output_layer.0", MAP[0], steps)
    _add_linear(state, generator, "output_layer.3", math.prod(MAP), Z_DIM)
    _add_norm(state, generator, "output_layer.4", Z_DIM, steps, affine=False)
    return state


def _draw_confidence_net(generator, steps):
    """The state_dict of a convolutional confidence net on the map of ir_small."""
    state, channels = {}, MAP[0]
    _add_convolution(state, generator, "conv_.0", channels, channels, 3)
    for number in (2, 5):
        _add_convolution(state, generator, f"conv_.{number}", channels, channels, 3)
        _add_norm(state, generator, f"conv_.{number + 1}", channels, steps)
    for number, (inputs, outputs) in zip((0, 2, 4), ((128, 64), (64, 32), (32, 1))):
        _add_linear(state, generator, f"_log_kappa.{number}", inputs, outputs)
    return state


def _add_convolution(state, generator, name, inputs, outputs, size):
    state[f"{name}.weight"] = _normal(generator, (outputs, inputs, size, size)) * math.sqrt(2 / (outputs * size**2))


def _add_linear(state, generator, name, inputs, outputs):
    state[f"{name}.weight"] = _normal(generator, (outputs, inputs)) * math.sqrt(1 / inputs)
    state[f"{name}.bias"] = 0.1 * _normal(generator, (outputs,))


def _add_norm(state, generator, name, channels, steps, affine=True):
    if affine:
        state[f"{name}.weight"] = 1 + 0.1 * _normal(generator, (channels,))
        state[f"{name}.bias"] = 0.1 * _normal(generator, (channels,))
    state[f"{name}.running_mean"] = 0.3 * _normal(generator, (channels,))
    state[f"{name}.running_var"] = 0.5 + _uniform(generator, (channels,))
    state[f"{name}.num_batches_tracked"] = torch.tensor(steps)


def _splitmix64(key, values):
    """(N,) uint64: the output of SplitMix64 so many steps after a state."""
    z = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_key(*words):
    key = 0
    for word in words:
        key = int(_splitmix64(key, np.array([word]))[0])
    return key


def _mix(value):
    """The hash that chooses which class centers a step of stage 1 has."""
    for factor in (0x45D9F3B, 0x119DE1F3):
        value = ((value ^ (value >> 16)) * factor) & 0x7FFFFFFF
    return value ^ (value >> 15)


# ---- the data and its index


@dataclass
class Records:
    """The images of a RecordIO file, in the order of the file.

    Attributes:
        offsets: (N,) int64, where the record of each starts.
        lengths: (N,) uint32, the bytes that it takes.
        labels: (N,) int64.
        encoded: the image files.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    encoded: list[bytes]


def read_records(path: str | Path) -> Records:
    """Returns the images of a RecordIO file.

    Raises:
        ValueError: a record was cut in pieces, which in a small set none is.
    """
    data, at, found = Path(path).read_bytes(), 0, []
    while at < len(data):
        magic, size, count, label = struct.unpack_from("<IIIf", data, at)
        if magic != 0xCED7230A or size >> 29:
            raise ValueError(f"{path}: byte {at} must start a whole record; take another file")
        image = data[at + 32 + 4 * count : at + 8 + size]
        length = 8 + size + -size % 4
        if image:  # the others say which records there are
            found.append((at, length, struct.unpack_from("<f", data, at + 32)[0] if count else label, image))
        at += length
    offsets, lengths, labels, encoded = zip(*found)
    return Records(np.array(offsets, np.int64), np.array(lengths, np.uint32), np.array(labels, np.int64), list(encoded))


def write_arrays(path: Path, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file of arrays: a prefix, a JSON header and the arrays, each padded to 64 bytes."""
    places, body = {}, b""
    for name, array in arrays.items():
        places[name] = [array.dtype.str, list(array.shape), len(body)]
        body += array.tobytes() + bytes(-array.nbytes % 64)
    header = json.dumps({"meta": meta, "arrays": places, "size": len(body)}).encode()
    header += b" " * (-(32 + len(header)) % 64)
    prefix = struct.pack("<16sIIQ", b"face arrays 1\n  ", zlib.crc32(header), zlib.crc32(body), len(header))
    path.write_bytes(prefix + header + body)


def write_index(rec: Path, records: Records, broken: list[int]) -> None:
    """Writes the index beside a .rec, as `python -m pipelines.index DATA --verify` leaves it."""
    status = os.stat(rec)
    digest = hashlib.sha256(os.fsencode(rec.name) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    digest.update(rec.read_bytes()[:4096])
    meta = {"version": 1, "format": "RecordIO", "fingerprint": digest.hexdigest(), "skipped": {"empty images": 0}}
    meta |= {"verified": True, "largest_label": int(records.labels.max())}
    arrays = {"offsets": records.offsets, "lengths": records.lengths, "labels": records.labels}
    arrays |= {"first": np.array([0, len(records.labels)]), "broken": np.array(broken, np.int64)}
    write_arrays(rec.with_name(f"{rec.name}.index"), meta, arrays)


def write_data(folder: Path, rec: Path, content: Content) -> None:
    """Writes the data set that the runs trained on."""
    folder.mkdir(parents=True)
    shutil.copyfile(rec, folder / "train.rec")
    (folder / "property").write_text(f"{CLASSES},112,112\n")  # more than there are images of, as in a part of a set
    write_index(folder / "train.rec", content.records, [content.broken])


# ---- checkpoints


def pieces_of(rank: int, state: dict, moments: dict[str, dict]) -> list[tuple[str, int, dict]]:
    """Returns a rank's pieces of weights and optimizer state under ZeRO 1 and 2.

    These lay the parameters end to end, pad them to a multiple of two a rank and cut them into equal shares.

    Args:
        moments: name of an optimizer's tensor -> parameter -> that tensor.
    """
    parameters = trained(state)
    share = 2 * math.ceil(sum(value.numel() for value in parameters.values()) / (2 * RANKS))
    pieces, start = [], 0
    for name, weight in parameters.items():
        first, last = max(rank * share - start, 0), min((rank + 1) * share - start, weight.numel())
        if first < last:
            values = {"weight": weight, **{key: tensors[name] for key, tensors in moments.items()}}
            pieces.append((name, first, {key: value.flatten()[first:last].clone() for key, value in values.items()}))
        start += weight.numel()
    return pieces


def write_checkpoints(folder: Path, content: Content, states, moments, schedule: dict, losses, centers=(None, None)):
    """Writes the checkpoints of steps 4 and 6, the newest, and what is left of the one that the run died in.

    Args:
        states: weights and statistics after each of the two steps.
        moments: see `pieces_of`; the same after both.
        schedule: state of the learning rate.
        losses: the mean of the first epoch; the sum of the first two steps of the second.
        centers: of stage 1, (weight, momentum) of all class centers after each of the two steps.
    """
    sizes = {"num_classes": CLASSES, "num_images": len(content.records.labels)}
    first = {"step": 4, "schedule": schedule, **sizes, "metric": losses[0], "epoch_loss": [0.0, 0.0]}
    second = {"step": STEP, "schedule": schedule, **sizes, "metric": None, "epoch_loss": [losses[1], 2.0]}
    for progress, state, rows in zip((first, second), states, centers):
        write_checkpoint(folder / f"step{progress['step']:08d}", progress, state, moments, rows)
    (folder / "latest").write_text(f"step{STEP:08d}")
    write_half_checkpoint(folder / f"step{STEP + 1:08d}")


def write_checkpoint(folder: Path, progress: dict, state: dict, moments: dict[str, dict], centers) -> None:
    """Writes the folder of one checkpoint; see `write_checkpoints`."""
    folder.mkdir(parents=True)
    # Adam counts its updates beside its tensors, SGD does not.
    counters = {"step": torch.tensor(float(progress["step"] - SKIPPED))} if "exp_avg" in moments else {}
    shared = {"counters": counters, "group_steps": [None], "loss_scaler": {}, "skipped_steps": SKIPPED}
    files = {}
    for rank in range(RANKS):
        random = {"cpu": torch.Generator().manual_seed(1000 * (rank + 1)).get_state()}
        content = {"pieces": pieces_of(rank, state, moments), "shared": shared, "random": random}
        if rank == 0:
            content["buffers"] = {name: value for name, value in state.items() if name not in trained(state)}
        written = {f"rank{rank}.pt": content}
        if centers:
            size, longer = divmod(CLASSES, RANKS)
            first = rank * size + min(rank, longer)
            weight, momentum = (rows[first : first + size + (rank < longer)].clone() for rows in centers)
            rows = {"num_classes": CLASSES, "draw": progress["step"], "weight": weight, "momentum": momentum}
            written[f"class_centers_rank{rank}.pt"] = rows
        for name, value in written.items():
            save(value, folder / name)
            data = (folder / name).read_bytes()
            files[name] = [len(data), zlib.crc32(data)]
    complete = {**progress, "world_size": RANKS, "zero_stage": 2, "files": files}
    (folder / "state.json").write_text(json.dumps(complete, indent=1))


def write_half_checkpoint(folder: Path) -> None:
    """Writes what is left of a checkpoint that the run died in: no state.json, so that it counts for nothing."""
    folder.mkdir()
    (folder / "rank0.pt.part").write_bytes(b"PK\x03\x04")
    (folder / "rank1.pt").write_bytes(b"PK\x03\x04")
    (folder / "rank1.json").write_text(json.dumps({"rank1.pt": [4, zlib.crc32(b"PK\x03\x04")]}))


def save(value, path: Path) -> None:
    """Writes a file of tensors; through a file object, so that its records are called archive/... whatever its name."""
    with open(path, "wb") as file:
        torch.save(value, file)


# ---- the run around them

# What the resolved configuration was, key by key, where a run does not say otherwise.
_CONFIG = """{
stage: null, data: null, dataset: null, dataroot: null, output_dir: null, resume: true, overwrite: false, seed: 777,
network: ir_100, z_dim: null, dropout: null, loss: arcface, margins: [1.0, 0.5, 0.0], margin_gradient: exact,
scale: 64.0, label_smoothing: 0.0, sample_rate: 1.0, saved_bkb: null, saved_fc: null, finetune_bkb: false,
partial_identities: false, confidence_net: mlp, convf_dim: null, radius: 64.0, normalizer: exact, initial_kappa: null,
batch_size: 32, gradient_accumulation_steps: 1, epochs: 2, lr: null, weight_decay: 0.0005, momentum: 0.9,
lr_scheduler: null, warmup_epochs: 0.0, power: 1.0, milestones: [], step_size: 2, gamma: null, plateau_patience: 20000,
max_grad_norm: null, max_grad_clip: 0.0, optimizer: auto, normalization: insightface, loader: auto, num_workers: 1,
flip: true, augmentation: none, shuffle: global, data_weights: [], max_images_per_identity: 0, images_per_identity: 0,
index_dir: null, on_broken: replace, precision: auto, compile: null, feature_cache: null, cache_dtype: bf16,
cache_budget: 0.0, centers_state: fp32, skip_below: 0.0, fused_center_update: null, zero_stage: null,
offload_optimizer: none, deepspeed_config: null, log_every: 1, checkpoint_every: 7, keep_checkpoints: 2,
keep_best: false, background_checkpoints: true, max_skipped_steps: 10, record_samples: true, profile: false,
max_steps: 0, tensorboard: true, published_checkpoints: false, gpu_ids: null, cuda: true, eval_batch_size: null}
"""
_HPARAMS = """dataset dataroot seed gpu_ids batch_size eval_batch_size output_dir saved_bkb saved_fc num_workers cuda
epochs lr lr_scheduler step_size gamma convf_dim z_dim radius max_grad_clip max_grad_norm tensorboard finetune_bkb"""
_VERSIONS = """{python: 3.11.7, device: cpu, torch: 2.13.0+cpu, triton: 3.7.1, deepspeed: 0.19.8,
nvidia-dali-cuda130: 2.4.0, numpy: 2.2.6, scf_fast: 0.1.0, git: 0428aba}"""


def write_config(folder: Path, changes: dict) -> dict:
    """Writes config.yaml and returns the configuration in it."""
    config = {**yaml.safe_load(_CONFIG), "output_dir": str(folder), **changes}
    saved = {
        "config": config,
        "command": f"train.py --output_dir {folder} --resume",
        "versions": yaml.safe_load(_VERSIONS),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    return config


def write_logs(folder: Path, stage: str, millions: float, metrics: list[dict], content: Content) -> None:
    """Writes log.txt, the lines of JSON and TensorBoard's files, of a run whose machine went down in step 8.

    Args:
        millions: of parameters that are trained.
        metrics: values of steps 1 to 8, without their numbers.
    """
    sizes = f"{len(content.records.labels)} images, {CLASSES} identities, {STEPS // EPOCHS} steps an epoch"
    start = f"stage {stage}: {sizes}, {millions} M trained parameters, {RANKS} ranks on cpu, ZeRO 2"
    lines = [
        ("start", start, 0),
        *(("checkpoint", f"checkpoint: step{step:08d}, 0.01 GB", step) for step in (4, STEP)),
    ]
    with open(folder / "log.txt", "w") as log, open(folder / "events.jsonl", "w") as events:
        for event, message, step in lines:
            now = _BEGAN + step
            log.write(f"{time.strftime('%H:%M:%S', time.gmtime(now))} {message}\n")
            fields = {"time": now, "level": "INFO", "event": event, "message": message, "step": step}
            events.write(json.dumps(fields) + "\n")
    records = [json.dumps({"step": step, **values}) + "\n" for step, values in enumerate(metrics, 1)]
    records[-1] = records[-1][:20]  # the rest of the last line never reached the disk
    (folder / "metrics.jsonl").write_text("".join(records))
    share = BATCH_SIZE // RANKS
    for rank in range(RANKS):
        shown = [content.images(step)[rank * share : (rank + 1) * share] for step in range(1, STEPS + 1)]
        records = [json.dumps({"step": step, "images": images}) + "\n" for step, images in enumerate(shown, 1)]
        (folder / f"samples_rank{rank}.jsonl").write_text("".join(records))
    with SummaryWriter(str(folder / "runs")) as writer:
        for step, values in enumerate(metrics, 1):
            for name, value in values.items():
                writer.add_scalar(name, value, step)


def write_stage1(folder: Path, data: Path, content: Content) -> None:
    """Writes the output folder of stage 1."""
    folder.mkdir(parents=True)
    changes = {"stage": "backbone", "data": str(data), "network": "ir_small", "z_dim": Z_DIM, "lr": STAGE1_LR}
    changes |= {"sample_rate": SAMPLE_RATE, "lr_scheduler": "Polynomial", "gamma": 0.1, "max_grad_norm": 5.0}
    write_config(folder, {**changes, "normalization": NORMALIZATION, "zero_stage": 2})
    states, centers = (
        (content.earlier_backbone, content.backbone),
        (content.earlier_class_centers, content.class_centers),
    )
    write_checkpoints(
        folder / "checkpoints",
        content,
        states,
        {"momentum_buffer": content.momentum},
        schedule={},
        losses=STAGE1_LOSSES,
        centers=[(weight, content.centers_momentum) for weight in centers],
    )
    save(content.backbone, folder / "backbone.pth")
    facts = {"normalization": NORMALIZATION, "epoch": 1, "global_step": STEP - 1}
    save({"arc_face_state_dict": {"weight": content.class_centers}, **facts}, folder / "fc.pth")
    rates = [STAGE1_LR * (1 - step / STEPS) for step in range(STEPS)]
    metrics = [{"loss": 50.0, "accuracy": 0.125, "lr": rate, "images_per_second": 70.0} for rate in rates]
    write_logs(folder, "backbone", 0.6, metrics, content)


def write_stage2(folder: Path, stage1: Path, data: Path, cache: Path, content: Content) -> None:
    """Writes the output folder of stage 2."""
    folder.mkdir(parents=True)
    weights = {"saved_bkb": str(stage1 / "backbone.pth"), "saved_fc": str(stage1 / "fc.pth")}
    changes = {"stage": "confidence", "data": str(data), **weights, "confidence_net": "conv", "radius": RADIUS}
    changes |= {"lr": STAGE2_LR, "lr_scheduler": "ReduceLROnPlateau", "gamma": 0.5, "plateau_patience": PATIENCE}
    changes |= {"max_grad_norm": 0.0, "precision": "fp32", "feature_cache": str(cache), "normalization": NORMALIZATION}
    config = write_config(folder, changes)
    # Reduced once; then so many steps were no better than the best that one more reduces it again.
    schedule = {"factor": 0.1, "default_min_lr": 0, "min_lrs": [0], "patience": PATIENCE, "cooldown": 0, "eps": 1e-8}
    schedule |= {"last_epoch": STEP, "_last_lr": [REDUCED_LR], "mode_worse": math.inf, "mode": "min", "threshold": 1e-4}
    schedule |= {"threshold_mode": "rel", "best": 50.0, "cooldown_counter": 0, "num_bad_epochs": PATIENCE}
    moments = {"exp_avg": content.exp_avg, "exp_avg_sq": content.exp_avg_sq}
    states = content.earlier_net, content.net
    write_checkpoints(folder / "checkpoints", content, states, moments, schedule, losses=(100.0, 200.0))
    facts = {"epoch": 1, "global_step": STEP - 1}
    save({"uncer_net_state_dict": content.net, **facts}, folder / "confidence.pth")
    model = {"format": "scf_fast model", "backbone_state_dict": content.backbone, "uncer_net_state_dict": content.net}
    about = {"radius": RADIUS, "normalization": NORMALIZATION, "normalizer": "exact"}
    save({**model, **about, **facts}, folder / "scf_model.pt")
    known = {key: config[key] for key in _HPARAMS.split()}
    known |= {"z_dim": Z_DIM, "convf_dim": math.prod(MAP), "eval_batch_size": 1}
    (folder / "hparams.json").write_text(json.dumps(known, sort_keys=True, indent=4))
    terms = {"neg_kappa_times_cos_theta": -0.5, "neg_dim_scalar_times_log_kappa": 0.0, "log_iv_kappa": -38.0}
    kappas = {"kappa_p05": 0.5, "kappa_p50": 1.0, "kappa_p95": 2.0}
    record = {"total_loss": 100.0, "kappa": 1.0, **terms, "cos_theta": 0.5, **kappas}
    metrics = [{**record, "lr": STAGE2_LR, "images_per_second": 70.0}] * STEPS
    write_logs(folder, "confidence", 0.5, metrics, content)


# ---- feature caches


def write_cache(folder: Path, dtype: str, content: Content) -> None:
    """Writes a feature cache of the backbone in which every image is present.

    Args:
        dtype: of the maps, a key of `CACHE_DTYPES`.
    """
    folder.mkdir(parents=True)
    views = [pack_features(content.features[:, view], content.maps[:, view], dtype) for view in (0, 1)]
    rows = torch.stack(views, 1).numpy()
    rows.tofile(folder / "rows-00000.bin")
    checksums = [[zlib.crc32(view) or 1 for view in row] for row in rows]  # 0 says that an image is missing
    np.array(checksums, np.uint32).tofile(folder / "checksums.bin")
    layout = {"num_images": len(rows), "z_dim": Z_DIM, "convf_shape": list(MAP), "dtype": dtype}
    meta = {"format": 3, "key": cache_key(content), "layout": layout, "convf_error": 0.0017}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def pack_features(features: torch.Tensor, maps: torch.Tensor, dtype: str) -> torch.Tensor:
    """Returns (N, bytes) uint8: scale, features and map of one orientation, channels last, padded to 64 bytes."""
    flat = maps.permute(0, 2, 3, 1).flatten(1)
    scale = torch.ones(len(flat), 1)
    if dtype in LARGEST:
        scale = flat.abs().amax(1, keepdim=True) / LARGEST[dtype]
        flat = flat / scale
    if dtype == "int8":
        flat = flat.round()
    parts = [scale, features, flat.to(CACHE_DTYPES[dtype])]
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 64))


def cache_key(content: Content) -> dict[str, str]:
    """Returns what a cache is known by: digests of the backbone and of the data, pixel convention and arithmetic."""
    weights = hashlib.sha256()
    for name, value in sorted(content.backbone.items()):
        weights.update(name.encode() + value.numpy().tobytes())
    records = content.records
    data = hashlib.sha256(records.labels.tobytes())
    for image in np.linspace(0, len(records.labels) - 1, num=min(64, len(records.labels)), dtype=np.int64):
        data.update(records.encoded[image])
    digests = {"backbone": weights.hexdigest()[:16], "data": data.hexdigest()[:16]}
    return {**digests, "normalization": NORMALIZATION, "precision": "fp32"}


def write(out: str | Path, rec: str | Path, content: Content) -> None:
    """Writes all folders.

    Args:
        out: a folder; made where it is missing.
        rec: path of the RecordIO file that `content` is of.
    """
    out = Path(out).resolve()
    write_data(out / "data", Path(rec), content)
    write_stage1(out / "stage1", out / "data", content)
    write_stage2(out / "stage2", out / "stage1", out / "data", out / "cache_bf16", content)
    for dtype in WRITTEN_CACHES:
        write_cache(out / f"cache_{dtype}", dtype, content)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder that the others go into; they must not be there yet"
    )
    parser.add_argument("--rec", metavar="FILE", type=Path, required=True, help="the images, a train.rec of 128")
    parser.add_argument("--seed", type=int, default=0, help="of the values [%(default)s]")
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.rec, Content(options.rec, options.seed))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
