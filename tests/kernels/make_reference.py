"""Writes reference.json: psi_v, A_d and A_d' to 40 digits, each psi found in two ways that share no formula.

    psi_v(kappa) = log I_v(kappa) - v log kappa,   v = d/2 - 1
    A_d(kappa)   = I_(v+1)(kappa) / I_v(kappa),    A_d' = 1 - A_d^2 - (d-1) A_d / kappa

First way:  A by the continued fraction of the ratio (DLMF 10.33.1), K_v and K_(v+1) by their upward recurrence, which
            is stable, and I_v from the Wronskian I_v K_(v+1) + I_(v+1) K_v = 1/kappa (DLMF 10.28.2).
Second way: the power series (DLMF 10.25.2), all of whose terms are positive, or from LARGE_KAPPA on the expansion for
            large argument (DLMF 10.40.1) with enough digits for its cancellation; A as the quotient of two of them.

The uniform expansion that the kernels use takes no part. Run from anywhere: ``python tests/kernels/make_reference.py``;
about a minute.
"""

import json
from pathlib import Path

import numpy as np
from mpmath import mp, mpf

DIMS = (2, 3, 4, 8, 32, 128, 512, 1024, 4096, 8192)
# Rounded to float32, so that a float32 and a float64 kernel are asked for the value at the very same point.
KAPPAS = tuple(float(kappa) for kappa in np.geomspace(1e-6, 1e7, 40).astype(np.float32))
WORKING_DIGITS = 100  # A' loses 15 digits at kappa = 1e7
AGREED_DIGITS = 60
STORED_DIGITS = 40
LARGE_KAPPA = 2e4  # the power series needs about 1.5 kappa terms


def ratio_by_continued_fraction(order, kappa):
    """I_(order+1) / I_order at kappa > 0, the fraction cut off at twice the depth until it no longer changes."""
    depth, previous = 64, None
    while True:
        ratio = mpf(0)
        for m in range(depth, 0, -1):
            ratio = kappa / (2 * (order + m) + kappa * ratio)
        if previous is not None and abs(ratio - previous) <= ratio * mpf(10) ** -(WORKING_DIGITS - 10):
            return ratio
        depth, previous = 2 * depth, ratio


def psi_by_wronskian(order, kappa, ratio):
    """psi from the ratio and K; order is a half or a whole number."""
    start = order - int(order)
    lower, upper = mp.besselk(start, kappa), mp.besselk(start + 1, kappa)
    for m in range(int(order)):
        lower, upper = upper, lower + 2 * (start + m + 1) / kappa * upper
    return -mp.log(kappa) - mp.log(upper + ratio * lower) - order * mp.log(kappa)


def psi_by_series(order, kappa):
    """psi from the power series or, at large kappa, from the large-argument expansion."""
    if kappa < LARGE_KAPPA:
        term = total = mpf(1)
        k = 0
        while term > total * mpf(10) ** -WORKING_DIGITS:
            k += 1
            term *= kappa * kappa / (4 * k * (k + order))
            total += term
        return mp.log(total) - order * mp.log(2) - mp.loggamma(order + 1)
    # Terms of size up to exp(order^2 / (2 kappa)) cancel down to exp(-order^2 / (2 kappa)).
    lost_digits = int(order * order / (2 * kappa)) + 10
    with mp.workdps(WORKING_DIGITS + lost_digits):
        term = total = mpf(1)
        k = 0
        while abs(term) > mpf(10) ** -mp.dps:
            k += 1
            term *= -(4 * order * order - (2 * k - 1) ** 2) / (8 * k * kappa)
            total += term
        return kappa - mp.log(2 * mp.pi * kappa) / 2 + mp.log(total) - order * mp.log(kappa)


def reference(dim, kappa):
    """(psi, A, A') at one point; raises ArithmeticError where the two ways differ."""
    order, kappa = mpf(dim) / 2 - 1, mpf(kappa)
    ratio = ratio_by_continued_fraction(order, kappa)
    psi = psi_by_wronskian(order, kappa, ratio)
    psi_again = psi_by_series(order, kappa)
    ratio_again = kappa * mp.exp(psi_by_series(order + 1, kappa) - psi_again)
    for name, first, second in (("psi", psi, psi_again), ("A", ratio, ratio_again)):
        if abs(first - second) > abs(first) * mpf(10) ** -AGREED_DIGITS:
            raise ArithmeticError(
                f"{name} at dim {dim}, kappa {kappa}: {mp.nstr(first, 50)} and {mp.nstr(second, 50)} differ"
            )
    return psi, ratio, 1 - ratio**2 - (dim - 1) * ratio / kappa


def main():
    entries = []
    with mp.workdps(WORKING_DIGITS):
        for dim in DIMS:
            for kappa in KAPPAS:
                digits = [mp.nstr(value, STORED_DIGITS) for value in reference(dim, kappa)]
                entries.append({"dim": dim, "kappa": kappa, **dict(zip(("psi", "A", "A_prime"), digits))})
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    path = Path(__file__).with_name("reference.json")
    path.write_text(f'{{"dims": {json.dumps(DIMS)}, "entries": [\n{lines}\n]}}\n')
    print(f"{path}: {len(entries)} entries")


if __name__ == "__main__":
    main()
