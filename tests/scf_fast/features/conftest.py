"""Plain code that several tests of features compare with."""

import copy

import numpy as np
import pytest
import torch

from scf_fast.pipelines.loading.decode import decode_face


def _plain_centers(backbone, source, normalization, orientations=2, left_out=()):
    """Returns (C, D) float64 class centers, computed in float64, one image after another."""
    network, total = copy.deepcopy(backbone).double().eval(), np.zeros((source.num_classes, backbone.z_dim))
    scale = {"insightface": 127.5, "published": 128.0}[normalization]
    for i in set(range(len(source))) - set(left_out):
        face = torch.from_numpy((decode_face(source.encoded(i)) - 127.5) / scale).permute(2, 0, 1)
        with torch.no_grad():
            features = network(torch.stack([face, face.flip(2)][:orientations]))[0].numpy()
        total[source.labels[i]] += (features / np.linalg.norm(features, axis=1, keepdims=True)).sum(axis=0)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


@pytest.fixture(scope="session")
def plain_centers():
    """``plain_centers(backbone, source, normalization, orientations=2, left_out=())``: mean directions, plainly."""
    return _plain_centers
