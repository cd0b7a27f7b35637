"""The start against brute force; the limit of the learning rate."""

import copy

import pytest
import torch

from scf_fast.errors import InputError
from scf_fast.kernels import scf_loss
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.objectives import Objective
from scf_fast.stages.start import best_constant, check_cosine, genuine_cosine, rate_limit


@pytest.mark.parametrize("normalizer", ["exact", "published"])
def test_scf_starts_at_the_lowest_loss(normalizer):
    """Of images that scatter around their centers, among kappas in steps of 2 %."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(4, 512, generator=generator))
    labels = torch.arange(64) % 4
    features = centers[labels] + 0.03 * torch.randn(64, 512, generator=generator)
    cos = torch.nn.functional.cosine_similarity(features, centers[labels]).mean().item()
    start = best_constant(Objective.SCF, cos, 512, normalizer == "published")
    candidates = torch.tensor(start).log() + 0.02 * torch.arange(-5, 6)
    losses = [scf_loss(features, k.expand(64), centers, labels, normalizer=normalizer).item() for k in candidates]
    assert losses.index(min(losses)) == 5


def test_genuine_cosine_is_that_of_all_pairs():
    mu, labels = torch.nn.functional.normalize(torch.randn(7, 5).double()), torch.tensor([0, 4, 0, 2, 4, 0, 9])
    same = (labels[:, None] == labels[None]) & ~torch.eye(7, dtype=torch.bool)
    cosines = (mu @ mu.T * same).sum(dim=1)[same.any(dim=1)] / same.sum(dim=1)[same.any(dim=1)]
    assert genuine_cosine(mu, labels).tolist() == pytest.approx(cosines.tolist(), abs=1e-12)


@pytest.mark.parametrize("cosine", [0.0099, -0.3, float("nan")])
def test_centers_of_other_people_are_refused(cosine):
    with pytest.raises(InputError, match=r"--saved_fc fc.pth: .* mean cosine .*--initial_kappa none"):
        check_cosine(cosine, "--saved_fc fc.pth")
    check_cosine(0.01, "--saved_fc fc.pth")


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_first_step_of_adam_stays_within_the_limit(name):
    torch.manual_seed(0)
    net, x = build_confidence_net(name, 8, 7, 100.0), torch.randn(32, 8, 7, 7)
    kept = copy.deepcopy(net.state_dict())
    rate = rate_limit(net, net.parameters(), x, 0.1)
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())
    before = net(x).mean().item()
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    net(x).mean().backward()
    optimizer.step()
    moved = before - net(x).mean().item()  # all weights move against their gradient, under BatchNorm hardly
    assert (0.08 if name == "mlp" else 0.01) < moved < 0.12
