"""Scores are timed if they are right, and only then."""

import pytest
import torch

from bench.scoring import scoring


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("scf_fast", lambda *faces: scoring.vmf_similarity_matrix(*faces) + 0.01),
        ("scf_fast_top_10", lambda *faces: (scoring.vmf_similarity_matrix(*faces).topk(11).values[:, 1:], None)),
        ("scf_fast_histogram", lambda *faces: scoring.histogram(*faces).roll(3, dims=1)),
    ],
)
def test_wrong_scores_are_not_timed(monkeypatch, name, wrong):
    torch.manual_seed(0)
    faces = (*scoring.fresh_faces(40, "cpu"), *scoring.fresh_faces(40, "cpu"))
    scoring.check(name, faces)
    monkeypatch.setitem(scoring.MATRICES if name == "scf_fast" else scoring.REDUCED, name, wrong)
    with pytest.raises(AssertionError):
        scoring.check(name, faces)
