"""Training steps of stage 2: images a second of the published way and of ours, switch by switch, in one run.

    python -m bench.stage2 [--network ir_medium] [--confidence_net conv] [--batch 128] [--rounds 7] [--out bench/results]

A step is the frozen backbone's forward pass, the confidence net's forward and backward pass, and Adam. Decoding is left out: the images
are random and lie on the device. Ways:

    published             float32, NCHW, eager, unfolded; loss through scipy on the host, as the published code composes it
    published, autocast   the same under bf16 autocast
    folded                BatchNorm folded into the convolutions, channels_last, fused SCF loss, fused Adam; float32
    folded, compiled      and torch.compile
    folded, bf16          folded, in bf16
    folded, bf16, compiled
    cached                features read from a feature cache on disk (fp16) instead of the backbone
"""
import argparse
import json
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench._environment import DEVICE, environment
from bench._measure import interleaved_seconds
from bench.accuracy import tabulate
from bench.baselines.published_scf_loss import published_scf_loss
from kernels import scf_loss
from scf_fast import frozen
from scf_fast.backbones import BACKBONES, Backbone
from scf_fast.confidence import CONFIDENCE_NETS, build_confidence_net
from scf_fast.feature_cache import CacheLayout, FeatureCache
from scf_fast.frozen import FrozenBackbone

CLASSES, Z_DIM, CACHED_BATCHES = 10_000, 512, 8


def _head(options, architecture, fused):
    torch.manual_seed(1)
    net = build_confidence_net(options.confidence_net, architecture.widths[-1], architecture.map_size).to(DEVICE)
    return net, torch.optim.Adam(net.parameters(), lr=3e-5, weight_decay=5e-4, fused=fused, foreach=False if not fused else None)


def published_step(options, backbone, centers, autocast):
    """The published training step."""
    net, optimizer = _head(options, backbone.architecture, fused=False)

    def step(images, labels):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                features, convf = backbone(images)
            log_kappa = net(convf)
        published_scf_loss(features.float(), log_kappa, 64.0 * F.normalize(centers), labels).loss.mean().backward()
        optimizer.step()
    return step


def our_step(options, backbone, centers, features_of):
    """Our training step on the features that ``features_of(images)`` gives."""
    net, optimizer = _head(options, backbone.architecture, fused=True)

    def step(images, labels):
        features, convf = features_of(images)
        scf_loss(features, net(convf.float()), centers, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def cached_features(options, backbone, folder):
    """A reader of random features in the backbone's shapes, from a cache on disk, batch after batch."""
    a = backbone.architecture
    layout = CacheLayout(CACHED_BATCHES * options.batch, Z_DIM, (a.widths[-1], a.map_size, a.map_size), "fp16")
    FeatureCache.create_or_check(folder, {}, layout)
    cache = FeatureCache.open(folder, layout, 0)
    for start in range(0, layout.num_images, options.batch):
        rows = np.arange(start, start + options.batch)
        cache.write(rows, [(torch.randn(len(rows), Z_DIM), torch.randn(len(rows), *layout.convf_shape)) for _ in range(2)])
    rng = np.random.default_rng(0)

    def read(images):
        return cache.read(rng.permutation(layout.num_images)[:options.batch], rng.random(options.batch) < 0.5, torch.device(DEVICE))
    return read


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.stage2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ir_medium", choices=list(BACKBONES))
    parser.add_argument("--confidence_net", default="conv", choices=list(CONFIDENCE_NETS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    frozen.MIN_COSINE, frozen.MAX_CONVF_ERROR["bf16"] = 0.99, 0.1  # random weights lose more than trained ones; here only the speed matters

    torch.manual_seed(0)
    backbone = Backbone(options.network, Z_DIM).eval().requires_grad_(False).to(DEVICE)
    centers = torch.randn(CLASSES, Z_DIM, device=DEVICE)
    buffers = [(torch.randn(options.batch, 3, 112, 112, device=DEVICE), torch.randint(CLASSES, (options.batch,), device=DEVICE)) for _ in range(4)]

    def ours(precision, compiled):
        return our_step(options, backbone, centers, FrozenBackbone(backbone, DEVICE, (precision,), compile=compiled))

    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "published": published_step(options, backbone, centers, autocast=False),
            "published, autocast": published_step(options, backbone, centers, autocast=True),
            "folded": ours("fp32", False), "folded, compiled": ours("fp32", True),
            "folded, bf16": ours("bf16", False), "folded, bf16, compiled": ours("bf16", True),
            "cached": our_step(options, backbone, centers, cached_features(options, backbone, Path(folder) / "cache")),
        }
        seconds = interleaved_seconds(ways, buffers, DEVICE, options.rounds)
    rates = {name: options.batch / value for name, value in seconds.items()}
    print(f"{options.network}, {options.confidence_net} confidence net, batch {options.batch}, {environment(DEVICE)['device']}, images/s")
    print(tabulate(["way", "images/s", "against published"], [[n, f"{r:.0f}", f"{r / rates['published']:.2f}"] for n, r in rates.items()]))
    name = f"stage2-{options.network}-{options.confidence_net}-{DEVICE}-{date.today().isoformat()}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"network": options.network, "confidence_net": options.confidence_net, "batch": options.batch, "rounds": options.rounds}
    (options.out / name).write_text(json.dumps({"environment": environment(DEVICE), **settings, "images_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
