"""Speed of scoring at d = 512: Eqn (13) of all pairs and template pooling, against how they are usually written.

    python -m bench.suite --sections scoring
    python -m pytest bench/bench_scoring.py --benchmark-json=bench/results/<device>/scoring-<date>.json

The IJB-C protocol at full size is ``python -m bench.ijb_scale``.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.baselines.scoring import eager_similarity_matrix, pool_by_loop, published_similarity_matrix
from bench.measuring import roofline
from bench.measuring.case import Case, NotMeasured, benchmark_case
from bench.measuring.environment import DEVICE
from bench.measuring.roofline import Machine
from bench.measuring.timing import Buffers
from scf_fast.kernels import pool_templates, vmf_similarity_histogram, vmf_similarity_matrix, vmf_similarity_top_k

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

DIM = 512


def bf16_matrix(mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor) -> torch.Tensor:
    return vmf_similarity_matrix(mu1.bfloat16(), kappa1, mu2.bfloat16(), kappa2)


def histogram(mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor) -> torch.Tensor:
    ids1, ids2 = (torch.arange(len(mu), device=mu.device) // 4 for mu in (mu1, mu2))
    return vmf_similarity_histogram(mu1, kappa1, ids1, mu2, kappa2, ids2, -1500.0, -500.0)


MATRICES: dict[str, Callable[..., torch.Tensor]] = {
    "scf_fast": vmf_similarity_matrix,
    "scf_fast_bf16": bf16_matrix,
    "eager": eager_similarity_matrix,
    "compiled": torch.compile(eager_similarity_matrix, dynamic=False, fullgraph=True),
    "published": published_similarity_matrix,
}
REDUCED: dict[str, Callable] = {"scf_fast_top_10": partial(vmf_similarity_top_k, k=10), "scf_fast_histogram": histogram}
MOST_ROWS = {"eager": 16384, "compiled": 16384, "published": 4096}
# Errors of a score: float32 arithmetic on terms in the thousands, or bfloat16 directions.
TOLERANCE = {"scf_fast": 1e-3, "scf_fast_top_10": 1e-3, "scf_fast_bf16": 20.0, "eager": 5e-2, "compiled": 5e-2}


def fresh_faces(count: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random directions (count, DIM) and their kappa (count,)."""
    return F.normalize(torch.randn(count, DIM, device=device)), torch.empty(count, device=device).normal_(
        6.0, 0.7
    ).exp()


def check(name: str, faces: tuple[torch.Tensor, ...]) -> None:
    """Refuses to time a function that differs from float64 on the first 200 faces.

    Raises:
        AssertionError: it differs.
    """
    faces = tuple(tensor[:200] for tensor in faces)
    mu1, kappa1, mu2, kappa2 = (tensor.double() for tensor in faces)
    found = (MATRICES.get(name) or REDUCED[name])(*faces)
    if name == "scf_fast_histogram":
        moved = (found - histogram(mu1, kappa1, mu2, kappa2)).abs().sum() / 2
        assert moved <= 0.01 * len(faces[0]) * len(faces[2]), f"{moved} pairs are in other bins"
        return
    exact = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2)
    if name == "scf_fast_top_10":
        exact, found = exact.topk(10).values, found[0]
    worst = (found.double() - exact).abs().max()
    assert worst <= TOLERANCE[name], f"a score is off by {worst}"


def prepare(name: str, size: int, device: torch.device | str) -> tuple[Callable, Buffers]:
    if size > MOST_ROWS.get(name, size):
        raise NotMeasured("the whole matrix does not fit several times over, or takes minutes")
    buffers = [(*fresh_faces(size, device), *fresh_faces(size, device)) for _ in range(2)]
    if name != "published":  # its normalizer is inaccurate
        check(name, buffers[0])
    return MATRICES.get(name) or REDUCED[name], buffers


def pool(templates: int, mu: torch.Tensor, kappa: torch.Tensor, template_ids: torch.Tensor) -> torch.Tensor:
    return pool_templates(mu, kappa, template_ids, templates)[0]


def loop(templates: int, mu: torch.Tensor, kappa: torch.Tensor, template_ids: torch.Tensor) -> torch.Tensor:
    del templates  # it finds them by itself
    ids = template_ids.cpu().numpy()
    weighted = (mu * kappa[:, None]).cpu().numpy()
    return torch.from_numpy(pool_by_loop(weighted, ids, np.arange(len(ids)))).to(mu.device)


POOLING = {"scf_fast": pool, "loop": loop}


def prepare_pooling(name: str, images: int, templates: int, device: torch.device | str) -> tuple[Callable, Buffers]:
    mu, kappa = fresh_faces(images, device)
    ids = torch.cat(
        [torch.arange(templates, device=device), torch.randint(templates, (images - templates,), device=device)]
    )
    sums = torch.zeros(templates, DIM, dtype=torch.float64, device=device).index_add_(
        0, ids, (mu * kappa[:, None]).double()
    )
    call = partial(POOLING[name], templates)
    torch.testing.assert_close(call(mu, kappa, ids).double(), F.normalize(sums), rtol=0, atol=1e-5)
    return call, [(mu, kappa, ids)]


def cases(device: torch.device | str, tiny: bool = False) -> list[Case]:
    """Returns a case for every score and number of rows, and for pooling: IJB-C on a GPU, a tenth of it on a CPU."""
    found = []
    for size in (64,) if tiny else (4096, 16384, 65536) if device == "cuda" else (512, 2048):
        for name in (*MATRICES, *REDUCED):
            dtype = "bfloat16" if name.endswith("bf16") else "float32"
            found.append(
                Case(
                    f"Eqn (13) of all pairs, {size} x {size}",
                    name,
                    partial(prepare, name, size, device),
                    roofline.similarity_matrix(size, size, DIM, dtype, stored=name in MATRICES),
                    (size * size, "pairs"),
                    {"size": size, "dim": DIM, "dtype": dtype},
                )
            )
    images, templates = (400, 20) if tiny else (469_375, 23_124) if device == "cuda" else (40_000, 2_000)
    found += [
        Case(
            f"template pooling, {images} images in {templates} templates",
            name,
            partial(prepare_pooling, name, images, templates, device),
            roofline.pooling(images, DIM),
            (images, "images"),
            {"dim": DIM, "dtype": "float32"},
        )
        for name in POOLING
    ]
    return found


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_scoring(benchmark: "BenchmarkFixture", case: Case, device: str, machine: Machine) -> None:
    benchmark_case(benchmark, case, device, machine)
