"""The IJB-C protocol at full size on made-up embeddings: seconds and peak memory of every step, and of the way IJB
scripts go.

    python -m bench.ijb_scale [--out bench/results/<device>/ijb_scale-<device>-<date>.json] [--share 1.0]

469,375 images of 23,124 templates, 15.66 M template pairs (1:1), 19,593 probes in a gallery of 3,531 (1:N), d = 512.
Only the embedding of the images is left out. The scripts' templates and cosines must agree with ours; Eqn (13) and the
search they do not have.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from bench.baselines.scoring import cosine_in_chunks, pool_by_loop
from bench.measuring.environment import DEVICE, environment
from scf_fast.evaluation import metrics, protocols
from scf_fast.evaluation.embeddings import Embeddings
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, TemplateProtocol

IMAGES, TEMPLATES, SUBJECTS, PAIRS, GENUINE = 469_375, 23_124, 3_531, 15_658_489, 19_557
DIM, RADIUS = 512, 64.0


def make(share, rng):
    """Embeddings that lean to their subject by a random amount, kappa that says how much; a protocol over them, and its
    1:N part.
    """
    images, templates, subjects, pairs, genuine = (
        max(200, int(share * count)) for count in (IMAGES, TEMPLATES, SUBJECTS, PAIRS, GENUINE)
    )
    templates = max(templates, 2 * subjects)
    subject_of = np.arange(templates) % subjects
    template_ids = np.concatenate([np.arange(templates), rng.integers(0, templates, max(0, images - templates))])
    media_ids = template_ids * 8 + rng.integers(0, 8, len(template_ids))
    centers = torch.nn.functional.normalize(torch.randn(subjects, DIM))
    lean = torch.from_numpy(rng.uniform(0.02, 0.25, len(template_ids))).float()
    features = torch.randn(len(template_ids), DIM).div_(DIM**0.5)
    for start in range(0, len(features), 1 << 14):
        rows = slice(start, start + (1 << 14))
        features[rows] += lean[rows, None] * centers[subject_of[template_ids[rows]]]
    embeddings = Embeddings(features.mul_(20), 4 + 8 * lean)
    first = rng.integers(0, templates, pairs)
    second = rng.integers(0, templates, pairs)
    mates = rng.integers(0, templates - subjects, genuine)
    first[:genuine], second[:genuine] = mates, mates + subjects
    protocol = TemplateProtocol(
        range(len(template_ids)),
        template_ids,
        media_ids,
        None,
        rng.uniform(0.5, 1, len(template_ids)).astype(np.float32),
        np.stack([first, second], axis=1),
        subject_of[first] == subject_of[second],
        None,
    )
    half = subjects // 2
    probes = np.arange(subjects, templates)
    galleries = [
        Gallery(name, ids, subject_of[ids], probes, subject_of[probes])
        for name, ids in (("G1", np.arange(half)), ("G2", np.arange(half, subjects)))
    ]
    return embeddings, protocol, galleries


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.ijb_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--share", type=float, default=1.0, help="of the protocol's size [%(default)s]")
    options = parser.parse_args()
    torch.manual_seed(0)
    embeddings, protocol, galleries = make(options.share, np.random.default_rng(0))
    seconds = {}

    def timed(step, call):
        started = time.perf_counter()
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds[step] = time.perf_counter() - started
        print(
            f"{step:32} {seconds[step]:9.2f} s   peak "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:6.2f} GiB",
            flush=True,
        )
        return result

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    directions, kappas = timed(
        "pool by kappa", lambda: protocols.pool_protocol(embeddings, protocol, embeddings.kappa, DEVICE)
    )
    pooling = protocols.Pooling(directions, kappas)
    scores = timed("score pairs, cosine and Eqn (13)", lambda: protocols.score_templates(pooling, protocol, RADIUS))
    tars = timed(
        "TAR at FAR, both scores", lambda: [protocols.tar_table(values, protocol.pair_labels) for values in scores]
    )
    timed(
        "equal error rate, both scores",
        lambda: [metrics.equal_error_rate(values, protocol.pair_labels) for values in scores],
    )
    for score in ("cosine", "vmf"):
        timed(
            f"search both galleries, {score}",
            lambda score=score: [
                protocols.summarize_searches(protocols.search_templates(pooling, protocol, gallery, RADIUS, score))
                for gallery in galleries
            ],
        )
    ids, subjects = (
        np.concatenate([getattr(gallery, part) for gallery in galleries])
        for part in ("gallery_ids", "gallery_subjects")
    )
    enrolled, probes = protocols.template_rows(protocol, ids), protocols.template_rows(protocol, galleries[0].probe_ids)
    timed(
        "histogram of all searches",
        lambda: protocols.score_histogram(
            directions[enrolled],
            kappas[enrolled],
            subjects,
            directions[probes],
            kappas[probes],
            galleries[0].probe_subjects,
        ),
    )
    ours = sum(seconds.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    weighted = embeddings.mu.numpy() * embeddings.kappa.astype(np.float32)[:, None]
    looped = timed("scripts: pool in a loop", lambda: pool_by_loop(weighted, protocol.template_ids, protocol.media_ids))
    assert np.abs(looped - directions.cpu().numpy()).max() < 1e-5
    cosines = timed(
        "scripts: score pairs, cosine",
        lambda: cosine_in_chunks(looped.astype(np.float64), *protocol.pair_template_ids.T),
    )
    assert np.abs(cosines - scores.cosine).max() < 1e-5
    print(
        f"ours: {ours:.1f} s, peak {peak:.2f} GiB ({before:.2f} of them the embeddings); TAR {tars[0]} by cosine, "
        f"{tars[1]} by Eqn (13)"
    )
    if options.out is not None:
        options.out.write_text(
            json.dumps(
                {
                    "environment": environment(DEVICE),
                    "share": options.share,
                    "seconds": seconds,
                    "peak_gib": peak,
                    "embeddings_gib": before,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
