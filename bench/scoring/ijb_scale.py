"""The IJB-C protocol at full size on synthetic embeddings: seconds and peak memory of ours and of the usual scripts.

    python -m bench.ijb_scale [--out bench/results/<device>/ijb_scale-<device>-<date>.json] [--share 1.0]

469,375 images of 23,124 templates, 15.66 M template pairs (1:1), 19,593 probes in a gallery of 3,531 (1:N), d = 512.
Only the embedding of the images is left out. Templates and cosines of the usual IJB scripts must agree with ours; they
have neither Eqn (13) nor the search.
"""

import argparse
import functools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from bench.baselines.scoring import cosine_in_chunks, pool_by_loop
from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import write_json
from bench.measuring.timing import synchronize
from scf_fast.command import Parser, run
from scf_fast.evaluation import metrics, protocols
from scf_fast.evaluation.embeddings import Embeddings
from scf_fast.evaluation.likelihoods import COSINE, Faces, Likelihood, Similarity, likelihood_of
from scf_fast.evaluation.results import Score
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, TemplateProtocol

IMAGES, TEMPLATES, SUBJECTS, PAIRS, GENUINE = 469_375, 23_124, 3_531, 15_658_489, 19_557
DIM, RADIUS = 512, 64.0

Result = TypeVar("Result")


def make(share: float, rng: np.random.Generator) -> tuple[Embeddings, TemplateProtocol, list[Gallery]]:
    """Makes embeddings that lean to their subject by a random amount, which kappa follows; a 1:1 protocol over them,
    and the galleries of its 1:N part.
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
        [str(i) for i in range(len(template_ids))],
        template_ids,
        media_ids,
        None,  # type: ignore[arg-type]  # landmarks: nothing is embedded
        rng.uniform(0.5, 1, len(template_ids)).astype(np.float32),
        np.stack([first, second], axis=1),
        subject_of[first] == subject_of[second],
        None,  # type: ignore[arg-type]  # images: nothing is embedded
    )
    half = subjects // 2
    probes = np.arange(subjects, templates)
    galleries = [
        Gallery(name, ids, subject_of[ids], probes, subject_of[probes])
        for name, ids in (("G1", np.arange(half)), ("G2", np.arange(half, subjects)))
    ]
    return embeddings, protocol, galleries


def peak_gib() -> float:
    """Returns the most memory that this process has ever held resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stopwatch:
    """Times named steps and prints each with the peak memory so far."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, step: str, call: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = call()
        synchronize(DEVICE)
        self.seconds[step] = time.perf_counter() - started
        print(f"{step:32} {self.seconds[step]:9.2f} s   peak {peak_gib():6.2f} GiB", flush=True)
        return result


def time_searches(
    watch: Stopwatch, pooled: Faces, protocol: TemplateProtocol, galleries: list[Gallery], likelihood: Likelihood
) -> None:
    """Times the 1:N part: both galleries by either score, and the histogram over both."""

    def search(similarity: Similarity) -> list:
        return [
            protocols.summarize_searches(protocols.search_templates(pooled, protocol, gallery, similarity))
            for gallery in galleries
        ]

    for similarity in COSINE, likelihood:
        watch.time(f"search both galleries, {similarity.score.value}", functools.partial(search, similarity))
    ids, subjects = (
        np.concatenate([getattr(gallery, part) for gallery in galleries])
        for part in ("gallery_ids", "gallery_subjects")
    )
    enrolled, probes = protocols.template_rows(protocol, ids), protocols.template_rows(protocol, galleries[0].probe_ids)
    watch.time(
        "histogram of all searches",
        lambda: likelihood.count_comparisons(
            pooled.select(enrolled), subjects, pooled.select(probes), galleries[0].probe_subjects
        ),
    )


def measure(share: float, out: Path | None) -> None:
    """Times every step of the protocol, ours first, and writes the numbers."""
    torch.manual_seed(0)
    embeddings, protocol, galleries = make(share, np.random.default_rng(0))
    kappa, likelihood = embeddings.kappa, likelihood_of(embeddings, RADIUS)
    assert kappa is not None and likelihood is not None  # ``make`` gives them
    before, watch = peak_gib(), Stopwatch()
    pooled = watch.time("pool by kappa", lambda: protocols.pool_by_confidence(embeddings, protocol, likelihood, DEVICE))
    scores = watch.time(
        "score pairs, cosine and Eqn (13)", lambda: protocols.score_templates(pooled, protocol, likelihood)
    )
    both = scores.values()
    tars = watch.time(
        "TAR at FAR, both scores", lambda: [protocols.tar_table(values, protocol.pair_labels) for values in both]
    )
    watch.time(
        "equal error rate, both scores",
        lambda: [metrics.equal_error_rate(values, protocol.pair_labels) for values in both],
    )
    time_searches(watch, pooled, protocol, galleries, likelihood)
    ours, peak = sum(watch.seconds.values()), peak_gib()
    weighted = embeddings.mu.numpy() * kappa.astype(np.float32)[:, None]
    looped = watch.time(
        "scripts: pool in a loop", lambda: pool_by_loop(weighted, protocol.template_ids, protocol.media_ids)
    )
    assert np.abs(looped - pooled.mu.cpu().numpy()).max() < 1e-5
    cosines = watch.time(
        "scripts: score pairs, cosine",
        lambda: cosine_in_chunks(looped.astype(np.float64), *protocol.pair_template_ids.T),
    )
    assert np.abs(cosines - scores[Score.COSINE]).max() < 1e-5
    print(
        f"ours: {ours:.1f} s, peak {peak:.2f} GiB ({before:.2f} of them the embeddings); TAR {tars[0]} by cosine, "
        f"{tars[1]} by Eqn (13)"
    )
    if out is not None:
        write_json(
            out,
            {
                "environment": environment(DEVICE),
                "share": share,
                "seconds": watch.seconds,
                "peak_gib": peak,
                "embeddings_gib": before,
            },
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.ijb_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--share", type=float, default=1.0, help="share of the protocol's size (default: %(default)s)")
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: measure(options.share, options.out))


if __name__ == "__main__":
    sys.exit(main())
