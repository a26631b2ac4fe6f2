"""Losses against torch, segmentation_models_pytorch, a hand-written Lovasz and finite differences."""
import itertools

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shipnb.losses import LOSSES, bce_loss, dice_loss, dice_with_loss, focal_loss, lovasz_loss, make_loss


def case(seed, shape=(3, 2, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator), (torch.rand(shape, generator=generator) < 0.3).float()


@pytest.mark.parametrize("seed", range(5))
def test_bce_is_the_definition_in_double(seed):
    z, y = case(seed)
    p = torch.sigmoid(z.double())
    assert torch.allclose(bce_loss(z, y).double(), -(y * p.log() + (1 - y) * (1 - p).log()).mean(), atol=1e-6)


@pytest.mark.parametrize("gamma,alpha", [(2.0, None), (2.0, 0.25), (0.5, 0.75)])
def test_focal_agrees_with_torchvision(gamma, alpha):
    from torchvision.ops import sigmoid_focal_loss
    z, y = case(1)
    want = sigmoid_focal_loss(z, y, alpha=-1 if alpha is None else alpha, gamma=gamma, reduction="mean")
    assert torch.allclose(focal_loss(z, y, gamma, alpha), want, atol=1e-6)


def test_dice_per_image_agrees_with_smp_one_image_at_a_time():
    z, y = case(2, (4, 1, 8, 8))
    theirs = smp.losses.DiceLoss("binary", smooth=0.5)
    # smp writes (I + s) / (sum / 2 + s) over its whole batch: s = 1/2 and one image at a time is ours
    want = torch.stack([theirs(z[i:i + 1], y[i:i + 1]) for i in range(4) if y[i].any()]).mean()
    keep = [i for i in range(4) if y[i].any()]
    assert torch.allclose(dice_loss(z[keep], y[keep]), want, atol=1e-6)


def test_dice_with_agrees_with_smp_on_a_batch_with_empty_images():
    z, y = case(2, (5, 1, 8, 8))
    y[1] = y[3] = 0
    # smp sets the loss of empty classes to zero, but counts them in its mean: one image at a time, over those with an object
    theirs = smp.losses.DiceLoss("binary", smooth=0.5)
    assert torch.allclose(dice_with_loss(z, y), torch.stack([theirs(z[i:i + 1], y[i:i + 1]) for i in (0, 2, 4)]).mean(), atol=1e-6)


def test_dice_with_of_a_batch_without_objects_is_zero_and_has_gradients():
    z = torch.randn(2, 1, 4, 4, requires_grad=True)
    value = dice_with_loss(z, torch.zeros(2, 1, 4, 4))
    value.backward()
    assert value == 0 and torch.equal(z.grad, torch.zeros_like(z))


def lovasz_brute(z, y):
    """Lovasz extension of the Jaccard loss as an expectation over thresholds of the hinge errors (Berman et al., definition 1)."""
    errors = torch.relu(1 - z * (2 * y - 1))
    levels = torch.cat([torch.zeros(1), errors.sort().values])
    total = torch.zeros(())
    for low, high in itertools.pairwise(levels):
        wrong = errors > low
        union = (wrong | (y > 0)).sum()
        if union: total = total + (high - low) * wrong.sum() / union
    return total


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_lovasz_is_the_integral_over_error_levels(seed):
    generator = torch.Generator().manual_seed(seed)
    z, y = 2 * torch.randn(1, 1, 3, 4, generator=generator), (torch.rand(1, 1, 3, 4, generator=generator) < 0.4).float()
    assert torch.allclose(lovasz_loss(z, y), lovasz_brute(z.flatten(), y.flatten()), atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right(name):
    z = torch.tensor([[[[0.3, -1.2], [2.0, 0.1]]]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    LOSSES[name](z, y).backward()
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-2
        step = step.reshape(z.shape)
        slope = (LOSSES[name](z.detach() + step, y) - LOSSES[name](z.detach() - step, y)) / 2e-2
        assert abs(float(slope) - float(z.grad.flatten()[i])) < 1e-3


@pytest.mark.parametrize("name, y", [(name, y) for name in LOSSES for y in (0.0, 1.0) if (name, y) != ("dice_with", 0.0)])   # which is 0 there
def test_extreme_logits_stay_finite_and_right(name, y):
    target = torch.full((1, 1, 4, 4), y)
    good, bad = (LOSSES[name](torch.full((1, 1, 4, 4), o), target) for o in (200 * (2 * y - 1), -200 * (2 * y - 1)))
    assert torch.isfinite(good) and torch.isfinite(bad) and good < 1e-3 < bad


def test_sums_keep_their_parts():
    z, y = case(3)
    parts = make_loss({"bce": 2, "lovasz": 0.5})(z, y)
    assert torch.equal(parts["bce"], 2 * F.binary_cross_entropy_with_logits(z, y)) and torch.equal(parts["lovasz"], 0.5 * lovasz_loss(z, y))
