"""Gaussians of oriented boxes: distances against torch.distributions and matrix roots, and gradients of thin boxes."""

import math

import pytest
import torch
from oriented_scenes import some_boxes
from torch.distributions import MultivariateNormal, kl_divergence

from deltalens.models.oriented_boxes import as_convention
from deltalens.models.oriented_gaussians import gaussian_loss, gaussians_of, gwd, kld

A, B = some_boxes(200).double(), some_boxes(200, seed=1).double()


def test_covariances():
    mean, covariance = gaussians_of(torch.tensor([1.0, 2.0, 8.0, 4.0, math.pi / 2], dtype=torch.float64))
    assert mean.tolist() == [1, 2]
    torch.testing.assert_close(covariance, torch.tensor([[4.0, 0.0], [0.0, 16.0]], dtype=torch.float64))
    _, covariance = gaussians_of(torch.tensor([0.0, 0.0, 8.0, 4.0, 0.3]))
    assert covariance[0, 1] > 0  # x and y grow together where the long side points right and down
    for convention in ("le135", "oc"):
        torch.testing.assert_close(gaussians_of(as_convention(A, convention))[1], gaussians_of(A)[1])


def test_kld_is_torchs():
    want = kl_divergence(MultivariateNormal(*gaussians_of(A)), MultivariateNormal(*gaussians_of(B)))
    torch.testing.assert_close(kld(A, B), want)
    torch.testing.assert_close(kld(A.float(), B.float()), want.float(), rtol=1e-4, atol=1e-5)
    assert kld(A, A).abs().max() < 1e-12


def root(matrices):
    values, vectors = torch.linalg.eigh(matrices)
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT


def test_gwd_is_its_definition():
    (mean, first), (other, second) = gaussians_of(A), gaussians_of(B)
    half = root(first)
    traces = (first + second - 2 * root(half @ second @ half)).diagonal(dim1=-2, dim2=-1).sum(-1)
    want = (mean - other).square().sum(-1) + traces
    torch.testing.assert_close(gwd(A, B), want)
    torch.testing.assert_close(gwd(A.float(), B.float()), want.float(), rtol=1e-4, atol=1e-3)
    assert gwd(A.float(), A.float()).abs().max() == 0


@pytest.mark.parametrize("distance", [kld, gwd])
def test_gradients(distance):
    assert torch.autograd.gradcheck(distance, (A[:20].clone().requires_grad_(), B[:20].clone().requires_grad_()))


@pytest.mark.parametrize("damping", ["log1p", "sqrt", "none"])
@pytest.mark.parametrize("distance", [kld, gwd])
def test_losses_of_thin_and_equal_boxes(distance, damping):
    thin = A.float()
    thin[:, 3] = thin[:, 2] / 1000
    flat = thin.clone()
    flat[:, 3] = 0
    for first in (thin, flat, A.float(), thin + 0.1):
        first = first.clone().requires_grad_()
        loss = gaussian_loss(distance(first, thin), damping)
        assert ((loss >= 0) & (loss <= 1)).all()
        loss.sum().backward()
        assert first.grad.isfinite().all()
    exact = distance(A, thin.double())
    torch.testing.assert_close(distance(A.float(), thin).double(), exact, rtol=1e-3, atol=1e-3)


def test_loss_values_and_errors():
    distance = torch.tensor([0.0, math.e - 1, 9.0])
    torch.testing.assert_close(gaussian_loss(distance)[:2], torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(gaussian_loss(distance, "sqrt", 2.0)[2], torch.tensor(0.8))
    torch.testing.assert_close(gaussian_loss(distance, "none")[2], torch.tensor(0.9))
    with pytest.raises(ValueError, match="log1p"):
        gaussian_loss(distance, "log")
    with pytest.raises(ValueError, match="tau"):
        gaussian_loss(distance, tau=0.5)
    with pytest.raises(ValueError, match=r"\(\.\.\., 5\)"):
        kld(torch.zeros(2, 4), torch.zeros(2, 4))
