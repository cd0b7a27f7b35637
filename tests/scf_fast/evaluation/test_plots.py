"""The points of curves, and the notes on sets that are small."""

import numpy as np
import pytest

from scf_fast.evaluation import plots, protocols


@pytest.mark.parametrize("impostors", [1, 2, 9, 10, 11, 99])
def test_few_impostor_pairs_give_a_curve(impostors):
    """Ten and fewer gave one point, 400 times."""
    rng = np.random.default_rng(impostors)
    scores = np.concatenate([rng.normal(1.0, 1, 40), rng.normal(0.0, 1, impostors)])
    same = np.arange(40 + impostors) < 40
    fars, tars = plots.roc_points(scores, same)
    assert len(np.unique(fars)) == 400 and fars[0] < 1 / impostors and fars[-1] == 1 and (np.diff(tars) >= 0).all()
    assert tars[-1] == 1 and tars[0] == np.mean(scores[same] > scores[~same].max())  # where no impostor passes
    for far, tar in list(zip(fars, tars))[::40]:
        allowed = sorted(scores[~same], reverse=True)[: int(far * impostors + 1e-9) + 1]
        assert tar == np.mean(scores[same] > allowed[-1]) or far == 1
    assert plots.plot_roc("t", {("a", "cosine"): (fars, tars)})[:4] == b"\x89PNG" if impostors == 1 else True


def test_many_start_where_ten_pass():
    scores, same = np.arange(300.0), np.arange(300) % 3 == 0
    assert plots.roc_points(scores, same)[0][0] == pytest.approx(10 / 200)


def test_the_note_says_what_is_left_out():
    same = np.arange(60) < 20
    assert protocols.note_on_few_impostors("x", same)[0].startswith("x has 40 impostor pairs: TAR at FAR below 0.25 is")
    assert "x has 3 impostor pairs, and TAR at FAR takes more" in protocols.note_on_few_impostors("x", same[17:23])[0]
    assert protocols.note_on_few_impostors("x", np.arange(120) < 20) == []
