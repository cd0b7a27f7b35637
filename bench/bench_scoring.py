"""Scoring at d = 512: Eqn (13) of all pairs, and template pooling, against the ways they are usually written.

    python -m pytest bench/bench_scoring.py --benchmark-json=bench/results/<device>/scoring-<device>-<date>.json

`least_mib` is the scores written once (all pairs) or the images read once (pooling); `tflops` counts the matrix product alone.
The IJB-C protocol at full size is `python -m bench.ijb_scale`.
"""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench._environment import DEVICE, environment
from bench._measure import footprint, time_case
from bench.baselines.scoring import eager_similarity_matrix, pool_by_loop, published_similarity_matrix
from kernels import pool_templates, vmf_similarity_histogram, vmf_similarity_matrix, vmf_similarity_top_k

DIM = 512
ON_GPU = DEVICE == "cuda"
SIZES = (4096, 16384, 65536) if ON_GPU else (512, 2048)


def bf16_matrix(mu1, kappa1, mu2, kappa2):
    return vmf_similarity_matrix(mu1.bfloat16(), kappa1, mu2.bfloat16(), kappa2)


def histogram(mu1, kappa1, mu2, kappa2):
    ids1, ids2 = (torch.arange(len(mu), device=mu.device) // 4 for mu in (mu1, mu2))
    return vmf_similarity_histogram(mu1, kappa1, ids1, mu2, kappa2, ids2, -1500.0, -500.0)


MATRICES = {
    "scf_fast": vmf_similarity_matrix,
    "scf_fast_bf16": bf16_matrix,
    "eager": eager_similarity_matrix,
    "compiled": torch.compile(eager_similarity_matrix, dynamic=False, fullgraph=True),
    "published": published_similarity_matrix,
}
REDUCED = {"scf_fast_top_10": partial(vmf_similarity_top_k, k=10), "scf_fast_histogram": histogram}
# What float32 arithmetic on terms of thousands leaves of a score; bfloat16 directions; the published normaliser is not checked: it is off.
TOLERANCE = {"scf_fast": 1e-3, "scf_fast_bf16": 20.0, "eager": 5e-2, "compiled": 5e-2}


def fresh_faces(count, device):
    return F.normalize(torch.randn(count, DIM, device=device)), torch.empty(count, device=device).normal_(6.0, 0.7).exp()


def check(name, faces):
    mu1, kappa1, mu2, kappa2 = (tensor[:200] for tensor in faces)
    exact = vmf_similarity_matrix(*(tensor.double() for tensor in (mu1, kappa1, mu2, kappa2)))
    assert (MATRICES[name](mu1, kappa1, mu2, kappa2).double() - exact).abs().max() <= TOLERANCE[name]


@pytest.mark.parametrize("name", [*MATRICES, *REDUCED])
@pytest.mark.parametrize("size", SIZES)
def test_all_pairs(benchmark, device, size, name):
    benchmark.group = f"Eqn (13) of all pairs, {size} x {size}"
    if name in ("eager", "compiled") and size > 16384:
        pytest.skip("whole matrices of this size do not fit several times over")
    if name == "published" and size > 4096:
        pytest.skip("minutes a call")
    buffers = [(*fresh_faces(size, device), *fresh_faces(size, device)) for _ in range(2)]
    if name in TOLERANCE:
        check(name, buffers[0])
    call = MATRICES.get(name) or REDUCED[name]
    seconds = time_case(benchmark, call, buffers, device)
    benchmark.extra_info.update(
        environment(device), shape=[size, size, DIM], dtype="bfloat16" if name.endswith("bf16") else "float32", **footprint(call, buffers[0], device),
        least_mib=4 * size * size / 2**20, gb_per_s=4 * size * size / seconds / 1e9, tflops=2 * DIM * size * size / seconds / 1e12)


IMAGES, TEMPLATES = (469_375, 23_124) if ON_GPU else (40_000, 2_000)  # IJB-C; a tenth of it


def pool(mu, kappa, template_ids):
    return pool_templates(mu, kappa, template_ids, TEMPLATES)[0]


def loop(mu, kappa, template_ids):
    ids = template_ids.cpu().numpy()
    weighted = (mu * kappa[:, None]).cpu().numpy()
    return torch.from_numpy(pool_by_loop(weighted, ids, np.arange(len(ids)))).to(mu.device)


@pytest.mark.parametrize("call", [pool, loop], ids=["scf_fast", "loop"])
def test_pooling(benchmark, device, call):
    benchmark.group = f"template pooling, {IMAGES} images in {TEMPLATES} templates"
    mu, kappa = fresh_faces(IMAGES, device)
    ids = torch.cat([torch.arange(TEMPLATES, device=device), torch.randint(TEMPLATES, (IMAGES - TEMPLATES,), device=device)])
    expected = F.normalize(torch.zeros(TEMPLATES, DIM, dtype=torch.float64, device=device).index_add_(0, ids, (mu * kappa[:, None]).double()))
    torch.testing.assert_close(call(mu, kappa, ids).double(), expected, rtol=0, atol=1e-5)
    seconds = time_case(benchmark, call, [(mu, kappa, ids)], device)
    benchmark.extra_info.update(environment(device), shape=[IMAGES, DIM], templates=TEMPLATES, dtype="float32", least_mib=mu.nbytes / 2**20,
                                gb_per_s=mu.nbytes / seconds / 1e9)
