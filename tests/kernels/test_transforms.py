"""The public functions under torch.func and in forward mode, against the derivatives that plain autograd gives of the
plain formulas. The tangents of the operators themselves would silently be zero.
"""

import warnings
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from scf_fast import kernels
from scf_fast.kernels import reference

DIM, ROWS, CLASSES = 8, 3, 4
RNG = torch.Generator().manual_seed(7)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


FEATURES, CENTERS, OTHERS = draw(ROWS, DIM), draw(CLASSES, DIM), draw(ROWS, DIM)
LABELS, IDS = torch.tensor([2, 0, 3]), torch.tensor([1, 0, 1])
LOG_KAPPA, KAPPA = torch.tensor([0.5, 2.0, 4.5]).double(), torch.tensor([0.3, 5.0, 80.0]).double()
RHO = torch.tensor([0.05, 0.4, 0.9]).double()
ARCFACE = {"scale": 8.0, "margins": (1.0, 0.5, 0.0), "label_smoothing": 0.1}
IGNORED = torch.tensor([2, -1, 3])


def scf_loss(**given):
    inputs = {"features": FEATURES, "log_kappa": LOG_KAPPA, "class_centers": CENTERS, "labels": LABELS, **given}
    return kernels.scf_loss(**inputs, reduction="none", normalizer="exact")


def published_scf_loss(**given):
    inputs = {"features": FEATURES, "log_kappa": LOG_KAPPA, "class_centers": CENTERS, "labels": LABELS, **given}
    return kernels.scf_loss(**inputs, reduction="none", normalizer="published")


def plain_scf_loss(function=reference.scf_loss, **given):
    inputs = {"features": FEATURES, "log_kappa": LOG_KAPPA, "class_centers": CENTERS, "labels": LABELS, **given}
    return function(**inputs)


LOG_VARIANCE, LOG_VARIANCES = torch.tensor([-1.0, 0.5, 0.2]).double(), 0.5 * draw(ROWS, DIM)
PEOPLE = torch.tensor([5, 2, 5])


def center_loss(function, features=FEATURES, log_variance=LOG_VARIANCE, class_centers=CENTERS):
    loss = function(features, log_variance, class_centers, LABELS)
    return loss if loss.ndim else loss[None]


gaussian_rows = partial(kernels.gaussian_center_loss, reduction="none")


def pair_loss(function, features=FEATURES, parameter=LOG_VARIANCE, density="gaussian"):
    return function(features, parameter, PEOPLE, density)[None]


def margin_loss(function, embeddings=FEATURES, class_centers=CENTERS, labels=LABELS):
    return function(embeddings, class_centers, labels, **ARCFACE)[0]


def similarity(function, mu1=FEATURES, kappa1=KAPPA, mu2=OTHERS, kappa2=LOG_KAPPA):
    return function(mu1, kappa1, mu2, kappa2)


def pooled(function, mu=FEATURES, kappa=KAPPA):
    directions, kappas = function(mu, kappa, IDS, 2)
    return torch.cat([directions, kappas[:, None]], dim=1)


# name: (function, the same plainly, where)
CASES = {
    "log I": (lambda x: kernels.log_bessel_i(1.5, x), lambda x: reference.psi(1.5, x) + 1.5 * x.log(), KAPPA),
    "log C": (lambda x: kernels.log_vmf_normalizer(x, DIM), lambda x: reference.log_vmf_normalizer(x, DIM), KAPPA),
    "psi and A": (
        lambda x: torch.stack(kernels.psi_and_ratio(1.5, x)),
        lambda x: torch.stack([reference.psi(1.5, x), reference.mean_resultant_length(x, 5)]),
        KAPPA,
    ),
    "A": (lambda x: kernels.mean_resultant_length(x, DIM), lambda x: reference.mean_resultant_length(x, DIM), KAPPA),
    "inverse of A": (
        lambda x: kernels.inverse_mean_resultant_length(x, DIM),
        lambda x: reference.inverse_mean_resultant_length(x, DIM),
        RHO,
    ),
    "loss, features": (lambda x: scf_loss(features=x), lambda x: plain_scf_loss(features=x), FEATURES),
    "loss, log kappa": (lambda x: scf_loss(log_kappa=x), lambda x: plain_scf_loss(log_kappa=x), LOG_KAPPA),
    "loss, centers": (lambda x: scf_loss(class_centers=x), lambda x: plain_scf_loss(class_centers=x), CENTERS),
    "published loss, log kappa": (
        lambda x: published_scf_loss(log_kappa=x),
        lambda x: plain_scf_loss(reference.published_scf_loss, log_kappa=x),
        LOG_KAPPA,
    ),
    "Gaussian loss, features": (
        lambda x: center_loss(gaussian_rows, x, LOG_VARIANCES),
        lambda x: center_loss(reference.gaussian_center_loss, x, LOG_VARIANCES),
        FEATURES,
    ),
    "Gaussian loss, log variance": (
        lambda x: center_loss(gaussian_rows, log_variance=x),
        lambda x: center_loss(reference.gaussian_center_loss, log_variance=x),
        LOG_VARIANCE,
    ),
    "Gaussian loss, log variances": (
        lambda x: center_loss(gaussian_rows, log_variance=x),
        lambda x: center_loss(reference.gaussian_center_loss, log_variance=x),
        LOG_VARIANCES,
    ),
    "Gaussian loss, centers": (
        lambda x: center_loss(gaussian_rows, class_centers=x),
        lambda x: center_loss(reference.gaussian_center_loss, class_centers=x),
        CENTERS,
    ),
    "pairs, features": (
        lambda x: pair_loss(kernels.pair_likelihood_loss, x, LOG_VARIANCES),
        lambda x: pair_loss(reference.pair_likelihood_loss, x, LOG_VARIANCES),
        FEATURES,
    ),
    "pairs, log variance": (
        lambda x: pair_loss(kernels.pair_likelihood_loss, parameter=x),
        lambda x: pair_loss(reference.pair_likelihood_loss, parameter=x),
        LOG_VARIANCE,
    ),
    "pairs, features under log kappa": (
        lambda x: pair_loss(kernels.pair_likelihood_loss, x, LOG_KAPPA, "vmf"),
        lambda x: pair_loss(reference.pair_likelihood_loss, x, LOG_KAPPA, "vmf"),
        FEATURES,
    ),
    "pairs, log kappa": (
        lambda x: pair_loss(kernels.pair_likelihood_loss, parameter=x, density="vmf"),
        lambda x: pair_loss(reference.pair_likelihood_loss, parameter=x, density="vmf"),
        LOG_KAPPA,
    ),
    "margin loss, embeddings": (
        lambda x: margin_loss(kernels.margin_softmax_loss, x, labels=IGNORED),
        lambda x: margin_loss(reference.margin_softmax_loss, x[[0, 2]], labels=IGNORED[[0, 2]]),
        FEATURES,
    ),
    "margin loss, centers": (
        lambda x: margin_loss(kernels.margin_softmax_loss, class_centers=x),
        lambda x: margin_loss(reference.margin_softmax_loss, class_centers=x),
        CENTERS,
    ),
    "similarity, direction": (
        lambda x: similarity(kernels.vmf_similarity, x),
        lambda x: similarity(reference.vmf_similarity, x),
        FEATURES,
    ),
    "similarity, kappa": (
        lambda x: similarity(kernels.vmf_similarity, kappa2=x),
        lambda x: similarity(reference.vmf_similarity, kappa2=x),
        KAPPA,
    ),
    "pooling, directions": (
        lambda x: pooled(kernels.pool_templates, x),
        lambda x: pooled(reference.pool_templates, x),
        FEATURES,
    ),
    "pooling, weights": (
        lambda x: pooled(kernels.pool_templates, kappa=x),
        lambda x: pooled(reference.pool_templates, kappa=x),
        KAPPA,
    ),
}


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_first_derivatives_in_both_modes(case):
    function, plain, x = case
    jacobian = plain_jacobian(plain, x)
    assert jacobian.abs().max() > 1e-3
    tangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    expected = (jacobian * tangent).flatten(jacobian.ndim - x.ndim).sum(dim=-1)
    value, found = jvp(function, (x,), (tangent,))
    close(value, plain(x))
    close(found, expected)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent, expected)
    close(jacfwd(function)(x), jacobian)
    close(jacrev(function)(x), jacobian)
    close(grad(lambda x: function(x).sum())(x), plain_jacobian(lambda x: plain(x).sum(), x))


def test_second_derivatives(case):
    function, plain, x = case
    expected = plain_hessian(lambda x: plain(x).square().sum(), x)
    for found in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(found(lambda x: function(x).square().sum())(x), expected, rtol=1e-6, atol=1e-6)


def test_vmap_is_a_loop(case):
    function, _, x = case
    several = torch.stack([x, 0.9 * x, 0.8 * x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a loop of its own
        found = vmap(function)(several)
        gradients = vmap(grad(lambda x: function(x).sum()))(several)
    close(found, torch.stack([function(one) for one in several]))
    close(gradients, torch.stack([grad(lambda x: function(x).sum())(one) for one in several]))


def test_gradient_of_each_sample():
    def loss(features, log_kappa, label):
        return kernels.scf_loss(features[None], log_kappa[None], CENTERS, label[None])

    found = vmap(grad(loss, argnums=(0, 1)))(FEATURES, LOG_KAPPA, LABELS)
    expected = grad(lambda f, k: scf_loss(features=f, log_kappa=k).sum(), argnums=(0, 1))(FEATURES, LOG_KAPPA)
    for one, other in zip(found, expected):
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_the_operators(dtype):
    x, kappa, centers = FEATURES.to(dtype), KAPPA.to(dtype), CENTERS.to(dtype)
    for function in (
        lambda x: kernels.scf_loss(x, kappa.log(), centers, LABELS),
        lambda x: kernels.gaussian_center_loss(x, -kappa.log(), centers, LABELS),
        lambda x: kernels.pair_likelihood_loss(x, kappa.log(), PEOPLE),
        lambda x: kernels.margin_softmax_loss(x, centers, LABELS, compute_dtype=torch.float32)[0],
        lambda x: kernels.vmf_similarity(x, kappa, centers[:3], kappa),
        lambda x: kernels.pool_templates(x, kappa, IDS, 2)[0],
        lambda x: kernels.inverse_mean_resultant_length(kernels.mean_resultant_length(x.abs(), 5), 5),
    ):
        value, tangent = jvp(function, (x,), (torch.ones_like(x),))
        assert tangent.dtype == value.dtype == torch.float32 and tangent.abs().max() > 0
        torch.testing.assert_close(value, function(x), rtol=1e-5, atol=1e-5)
        assert grad(lambda x, function=function: function(x).sum())(x).dtype == dtype


def test_terms_carry_no_derivative():
    def terms(log_kappa):
        return kernels.scf_loss(FEATURES, log_kappa, CENTERS, LABELS, return_terms=True)[1]

    found, tangents = jvp(lambda k: torch.stack(terms(k)), (LOG_KAPPA,), (torch.ones_like(LOG_KAPPA),))
    close(found, torch.stack(terms(LOG_KAPPA)))
    assert not tangents.any()


def test_kappa_zero_and_templates_without_images():
    """Where the plain formulas have 0 / 0."""
    zero = torch.zeros(ROWS, dtype=torch.float64)
    score = lambda kappa: kernels.vmf_similarity(FEATURES, kappa, OTHERS, kappa)  # noqa: E731
    cosine = torch.cosine_similarity(FEATURES, OTHERS)
    close(jacfwd(jacrev(score))(zero).diagonal(dim1=1, dim2=2).diagonal(), 2 * cosine / DIM)  # kappa^2 cos / d
    directions = lambda mu: kernels.pool_templates(mu, KAPPA, IDS, 3)[0]  # noqa: E731
    assert jacfwd(directions)(FEATURES)[2].eq(0).all() and jacrev(directions)(FEATURES)[2].eq(0).all()


def test_interpreted_kernels_are_transformed_too(place):
    kappa = KAPPA.to(place.device)
    second = hessian(lambda x: kernels.log_vmf_normalizer(x, DIM, backend=place.backend).sum())(kappa)
    expected = plain_hessian(lambda x: reference.log_vmf_normalizer(x, DIM).sum(), KAPPA)
    torch.testing.assert_close(second.cpu(), expected, rtol=1e-8, atol=1e-10)


def test_what_has_no_derivative_says_so():
    def derivative(function):
        return lambda x: grad(lambda x: function(x).sum())(x)

    def forward_derivative(function):
        return lambda x: jvp(function, (x,), (torch.ones_like(x),))[1]

    def log_normalizer(x):
        return kernels.log_vmf_normalizer(x, DIM)

    third = derivative(derivative(derivative(log_normalizer)))
    plain_second = lambda x: plain_hessian(lambda x: reference.log_vmf_normalizer(x, DIM).sum(), x, True).sum(1)  # noqa: E731
    close(third(KAPPA), plain_jacobian(plain_second, KAPPA).sum(1))
    for fourth in (derivative(third), forward_derivative(third)):
        with pytest.raises(NotImplementedError, match="log_vmf_normalizer has derivatives up to the third"):
            fourth(KAPPA)
    for function, x in (log_normalizer, KAPPA), (lambda x: kernels.inverse_mean_resultant_length(x, DIM), RHO):
        with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
            forward_derivative(forward_derivative(function))(x)
    with pytest.raises(NotImplementedError, match="similarity of all pairs carries no derivative"):
        forward_derivative(lambda x: kernels.vmf_similarity_matrix(x, KAPPA, OTHERS, KAPPA))(FEATURES)
