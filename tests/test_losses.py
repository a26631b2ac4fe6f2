"""Losses against NumPy in double, torch, torchvision, segmentation_models_pytorch, a hand-written Lovasz and finite differences."""
import itertools
import math
from functools import partial

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shipnb.losses import LOSSES, bce_loss, dice_loss, dice_with_loss, focal_loss, loss_bounds, lovasz_loss, make_loss


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


@pytest.mark.parametrize("name, y", [(name, y) for name in LOSSES for y in (0.0, 1.0) if (name, y) != ("dice_with", 0.0) and name != "soft_bce"])   # 0 there; lowest between the extremes
def test_extreme_logits_stay_finite_and_right(name, y):
    target = torch.full((1, 1, 4, 4), y)
    good, bad = (LOSSES[name](torch.full((1, 1, 4, 4), o), target) for o in (200 * (2 * y - 1), -200 * (2 * y - 1)))
    assert torch.isfinite(good) and torch.isfinite(bad) and good < 1e-3 < bad


def test_sums_keep_their_parts():
    z, y = case(3)
    parts = make_loss({"bce": 2, "lovasz": 0.5})(z, y)
    assert torch.equal(parts["bce"], 2 * F.binary_cross_entropy_with_logits(z, y)) and torch.equal(parts["lovasz"], 0.5 * lovasz_loss(z, y))


# --- every loss against plain NumPy in double, several classes, weights and ignored pixels

def np_pairs(values, keep, weights):
    """Weighted mean of {(image, class): value} over the pairs that are kept."""
    total = [(weights[c] * v, weights[c]) for (i, c), v in values.items() if keep[i, c]]
    return sum(a for a, _ in total) / sum(b for _, b in total) if total else 0.0


def np_pixels(value, z, y, valid, weights):
    """Weighted mean over the pixels that are valid, by one loop over them."""
    top = bottom = 0.0
    for i, c, r, k in np.ndindex(z.shape):
        if valid[i, c, r, k]: top, bottom = top + weights[c] * value(z[i, c, r, k], y[i, c, r, k]), bottom + weights[c]
    return top / bottom if bottom else 0.0


def np_bce(smoothing=0.0, pos=1.0):
    def value(z, y):
        p, t = 1 / (1 + math.exp(-z)), 1 - smoothing if y else smoothing
        return -(pos * t * math.log(p) + (1 - t) * math.log(1 - p))
    return value


def np_focal(gamma, alpha):
    def value(z, y):
        p = 1 / (1 + math.exp(-z))
        p_t, weight = (p, alpha) if y else (1 - p, 1 - alpha)
        return -weight * (1 - p_t)**gamma * math.log(p_t)
    return value


def np_region(score, z, y, valid, weights, per, present=False):
    """1 - score(tp, fp, fn) per image or per batch, of the pairs with a valid pixel (`present`: with an object)."""
    p = 1 / (1 + np.exp(-z))
    groups = [[i] for i in range(len(z))] if per == "image" else [list(range(len(z)))]
    values, keep = {}, {}
    for g, images in enumerate(groups):
        for c in range(z.shape[1]):
            v = valid[images, c]
            pc, yc = p[images, c][v], y[images, c][v]
            values[g, c] = 1 - score((pc * yc).sum(), (pc * (1 - yc)).sum(), ((1 - pc) * yc).sum())
            keep[g, c] = (yc > 0).any() if present else v.any()
    return np_pairs(values, keep, weights)


def np_lovasz(z, y, valid, weights):
    """The Lovasz extension as an integral over levels of the hinge error, per image and class."""
    values, keep = {}, {}
    for i, c in np.ndindex(z.shape[:2]):
        v = valid[i, c]
        errors, truth = np.maximum(1 - z[i, c][v] * (2 * y[i, c][v] - 1), 0), y[i, c][v] > 0
        levels = np.concatenate([[0.0], np.sort(errors)])
        values[i, c] = sum((high - low) * (errors > low).sum() / ((errors > low) | truth).sum() for low, high in itertools.pairwise(levels) if high > low)
        keep[i, c] = v.any()
    return np_pairs(values, keep, weights)


tversky = lambda a, b, s: lambda tp, fp, fn: (tp + s) / (tp + a * fp + b * fn + s)
dice = lambda s: lambda tp, fp, fn: (2 * tp + s) / (2 * tp + fp + fn + s)
ORACLES = [
    ("bce", {}, lambda *a: np_pixels(np_bce(), *a)),
    ("bce", {"pos_weight": 3.0}, lambda *a: np_pixels(np_bce(pos=3.0), *a)),
    ("soft_bce", {}, lambda *a: np_pixels(np_bce(0.1), *a)),
    ("soft_bce", {"smoothing": 0.2, "pos_weight": 2.0}, lambda *a: np_pixels(np_bce(0.2, 2.0), *a)),
    ("focal", {}, lambda *a: 2 * np_pixels(np_focal(2, 0.5), *a)),
    ("focal", {"gamma": 0.5, "alpha": 0.25}, lambda *a: np_pixels(np_focal(0.5, 0.25), *a)),
    ("dice", {}, lambda *a: np_region(dice(1), *a, "image")),
    ("dice", {"smooth": 0.3, "per": "batch"}, lambda *a: np_region(dice(0.3), *a, "batch")),
    ("batch_dice", {}, lambda *a: np_region(dice(1), *a, "batch")),
    ("dice_with", {}, lambda *a: np_region(dice(1), *a, "image", True)),
    ("jaccard", {}, lambda *a: np_region(tversky(1, 1, 1), *a, "image")),
    ("jaccard", {"per": "batch", "smooth": 2.0}, lambda *a: np_region(tversky(1, 1, 2), *a, "batch")),
    ("tversky", {}, lambda *a: np_region(tversky(0.3, 0.7, 1), *a, "image")),
    ("tversky", {"alpha": 1.5, "beta": 0.0, "per": "batch"}, lambda *a: np_region(tversky(1.5, 0, 1), *a, "batch")),
    ("lovasz", {}, lambda *a: np_lovasz(*a)),
]


def several(seed):
    """Logits and targets of 3 images and 3 classes in double; one image is empty, one class of another is ignored whole, some pixels elsewhere."""
    rng = np.random.default_rng(seed)
    z, y = 3 * rng.standard_normal((3, 3, 4, 5)), (rng.random((3, 3, 4, 5)) < [[[[0.5]], [[0.2]], [[0.1]]]]).astype(float)
    y[1] = 0
    marked = y.copy()
    marked[0, 1], marked[2, :, 1:3, 2] = 255, 255
    return z, y, marked


@pytest.mark.parametrize("name,options,oracle", ORACLES)
@pytest.mark.parametrize("weights", [None, [1.0, 2.5, 0.5]])
def test_each_loss_is_its_formula_in_double(name, options, oracle, weights):
    for seed in range(3):
        z, y, marked = several(seed)
        numbers = weights or [1.0] * 3
        got = LOSSES[name](torch.tensor(z), torch.tensor(y), class_weights=weights, **options)
        assert got.dtype == torch.float64 and float(got) == pytest.approx(oracle(z, y, np.ones_like(y, bool), numbers), rel=1e-12)
        got = LOSSES[name](torch.tensor(z), torch.tensor(marked), class_weights=weights, ignore=255, **options)
        assert float(got) == pytest.approx(oracle(z, y, marked != 255, numbers), rel=1e-12)
        narrow = LOSSES[name](torch.tensor(z).bfloat16(), torch.tensor(y), class_weights=weights, **options)
        rounded = torch.tensor(z).bfloat16().double().numpy()
        assert narrow.dtype == torch.float32 and float(narrow) == pytest.approx(oracle(rounded, y, np.ones_like(y, bool), numbers), rel=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    z, y, marked = (torch.tensor(o) for o in several(0))
    for target, options in ((y, {}), (y, {"class_weights": [1, 2, 3]}), (marked, {"ignore": 255})):
        assert torch.autograd.gradcheck(partial(LOSSES[name], y=target, **options), z.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_have_no_gradient_and_nothing_to_learn_from_is_zero(name):
    z, _, marked = (torch.tensor(o) for o in several(1))
    z.requires_grad_()
    LOSSES[name](z, marked, ignore=255).backward()
    assert (z.grad[marked == 255] == 0).all() and (z.grad[marked != 255] != 0).any()
    value = LOSSES[name](z, torch.full_like(marked, 255), ignore=255)
    z.grad = None
    value.backward()
    assert value == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("name,options,theirs", [
    ("batch_dice", {}, smp.losses.DiceLoss("multilabel", smooth=0.5)), ("jaccard", {"per": "batch"}, smp.losses.JaccardLoss("multilabel", smooth=1.0)),
    ("tversky", {"per": "batch"}, smp.losses.TverskyLoss("multilabel", smooth=1.0, alpha=0.3, beta=0.7)), ("focal", {}, smp.losses.FocalLoss("multilabel")),
    ("soft_bce", {}, smp.losses.SoftBCEWithLogitsLoss(smooth_factor=0.1)), ("batch_dice", {"class_weights": [1, 2, 3]}, smp.losses.DiceLoss("multilabel", smooth=0.5, class_weights=[1, 2, 3]))])
def test_agrees_with_smp_over_a_batch_where_every_class_has_objects(name, options, theirs):
    z, y = (torch.tensor(o, dtype=torch.float32) for o in several(2)[:2])
    assert float(LOSSES[name](z, y, **options)) == pytest.approx(float(theirs(z, y)), rel=1e-5)


def test_lovasz_agrees_with_smp_class_by_class():
    z, y = (torch.tensor(o, dtype=torch.float32) for o in several(2)[:2])
    theirs = smp.losses.LovaszLoss("binary", per_image=True)
    assert float(lovasz_loss(z, y)) == pytest.approx(np.mean([float(theirs(z[:, c], y[:, c])) for c in range(3)]), rel=1e-5)


def test_where_smp_is_not_used():
    """The reasons that the notebook gives, so that we notice when smp changes."""
    everywhere, empty = torch.full((1, 1, 8, 8), 20.0), torch.zeros(1, 1, 8, 8)
    for loss in (smp.losses.DiceLoss, smp.losses.JaccardLoss, smp.losses.TverskyLoss): assert loss("binary")(everywhere, empty) == 0
    with pytest.raises(RuntimeError, match="dtype"): smp.losses.LovaszLoss("binary")(everywhere.double(), empty)
    assert torch.isnan(smp.losses.FocalLoss("binary", ignore_index=255)(torch.ones(4), torch.full((4,), 255.0)))
    z, y = (torch.tensor(o, dtype=torch.float32) for o in several(0)[:2])
    assert smp.losses.DiceLoss("binary")(z, y) != smp.losses.DiceLoss("multilabel")(z, y)   # the wrong mode merges the classes, silently


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
def test_focal_has_finite_gradients_where_the_model_is_sure(gamma):
    """1 - p is 0 in float32 there, and the slope of its power infinite: torchvision and smp give NaN."""
    from torchvision.ops import sigmoid_focal_loss
    z = torch.tensor([[[[-200.0, -20.0, 20.0, 200.0]]]]).repeat(1, 2, 1, 1).requires_grad_()
    y = torch.tensor([0.0, 1.0])[None, :, None, None].expand(z.shape)
    focal_loss(z, y, gamma).backward()
    assert torch.isfinite(z.grad).all() and z.grad[0, 0, 0, 3] > 0 > z.grad[0, 1, 0, 0]
    z.grad = None
    sigmoid_focal_loss(z, y, alpha=-1, gamma=gamma).sum().backward()
    assert torch.isnan(z.grad).any() == (gamma < 1)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_keeps_its_digits_where_the_model_is_sure(gamma):
    """Of an object pixel: as 1 - p it would lose a percent of them at a logit of 15, and all at 20. (For background torch's cross-entropy itself ends at 1e-7.)"""
    for z in (10.0, 15.0, 20.0, 30.0):
        missed = 1 / (1 + math.exp(z))
        got = float(focal_loss(torch.full((1, 1, 1, 1), z), torch.ones(1, 1, 1, 1), gamma))
        assert got == pytest.approx(-missed**gamma * math.log1p(-missed), rel=1e-5, abs=0)


def test_the_common_area_of_a_small_ship_is_exact_in_float32():
    """As a difference of sums over 768 x 768 pixels, as smp has it, it is off by more than a tenth."""
    y = torch.zeros(1, 1, 768, 768)
    y[..., 0, :10] = 1
    z = -4.6 + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    exact = 1 - float(dice_loss(z.double(), y.double(), smooth=0))
    score = smp.losses.TverskyLoss("multilabel", alpha=0.5, beta=0.5).compute_score(torch.sigmoid(z), y, dims=(0, 2, 3))
    p = torch.sigmoid(z.double())
    assert exact == pytest.approx(float(2 * p[..., 0, :10].sum() / (p.sum() + 10)), rel=1e-12)
    assert abs(float(score) / exact - 1) > 0.1
    z.requires_grad_()
    dice_loss(z, y, smooth=0).backward()
    slope = torch.autograd.grad(dice_loss(wide := z.detach().double().requires_grad_(), y.double(), smooth=0), wide)[0]
    assert torch.allclose(z.grad.double(), slope, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("call,message", [
    (lambda: make_loss("bse"), "unknown loss 'bse'; known are bce, soft_bce, focal"),
    (lambda: make_loss(["bce"]), r"a loss is a name or a mapping of names to weights, not \['bce'\]"),
    (lambda: make_loss({}), "no loss named"), (lambda: make_loss(""), "no loss named"),
    (lambda: make_loss({"bce": -1}), "the weight of loss 'bce' must be positive, not -1"),
    (lambda: make_loss({"bce": True}), "must be positive, not True"), (lambda: make_loss({"bce": float("nan")}), "must be positive, not nan"),
    (lambda: make_loss({"bce": "2"}), "must be positive, not '2'"),
    (lambda: make_loss({"focal": {"gama": 2}}), "loss 'focal' has no parameter 'gama'; it has gamma, alpha"),
    (lambda: make_loss({"focal": {"gamma": "two"}}), "loss 'focal': gamma must be at least 0, not 'two'"),
    (lambda: make_loss({"focal": {"alpha": 2}}), "loss 'focal': alpha must be between 0 and 1, not 2"),
    (lambda: make_loss({"soft_bce": {"smoothing": 0.5}}), "loss 'soft_bce': smoothing must be at least 0 and below 0.5"),
    (lambda: make_loss({"bce": {"pos_weight": 0}}), "loss 'bce': pos_weight must be positive, not 0"),
    (lambda: make_loss({"dice": {"smooth": -1}}), "loss 'dice': smooth must be at least 0, not -1"),
    (lambda: make_loss({"dice": {"per": "class"}}), "per must be 'image' or 'batch', not 'class'"),
    (lambda: make_loss({"dice": {"class_weights": [1, 0]}}), "class_weights must be positive, not 0"),
    (lambda: make_loss({"tversky": {"alpha": 0, "beta": 0}}), "must not both be 0"),
    (lambda: make_loss({"bce": {"class_weights": [1, 2], "pos_weight": [1, 2, 3]}}), "class_weights must be 3 numbers, one per class, not 2|pos_weight must be 3"),
    (lambda: bce_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4)), r"same shape \(N, C, H, W\), not \(2, 1, 4, 4\) and \(2, 4, 4\)"),
    (lambda: dice_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), class_weights=[1, 2]), "class_weights must be 3 numbers, one per class, not 2"),
    (lambda: loss_bounds("bce", 2), "object_fraction must be 0, or between one pixel of 589824 and 1, not 2"),
    (lambda: loss_bounds("bce", 1e-9), "object_fraction must be 0, or between one pixel"), (lambda: loss_bounds("bce", "x"), "object_fraction must be"),
    (lambda: loss_bounds("bse", 0.1), "unknown loss")])
def test_bad_parameters_are_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught: call()
    assert "\n" not in str(caught.value)


def test_settings_reach_the_loss():
    z, y = case(4)
    loss = make_loss({"tversky": {"weight": 0.5, "alpha": 0.2, "beta": 0.8}, "bce": {"class_weights": [1, 3]}, "soft_bce": 2})
    parts = loss(z, y)
    assert torch.equal(parts["tversky"], 0.5 * LOSSES["tversky"](z, y, 0.2, 0.8))
    assert float(parts["bce"]) == pytest.approx(float((bce_loss(z[:, :1], y[:, :1]) + 3 * bce_loss(z[:, 1:], y[:, 1:])) / 4), rel=1e-6)
    assert torch.equal(parts["soft_bce"], 2 * bce_loss(z, y * 0.8 + 0.1))


# --- what a loss can reach

def squeezed(p_object, p_rest, f, pixels=None, smooth=0.0):
    """BCE, focal loss and batch Dice loss, in closed form, of a model whose probabilities go through a second sigmoid."""
    sigmoid = lambda o: 1 / (1 + math.exp(-o))
    on, off, s = sigmoid(p_object), sigmoid(p_rest), smooth / pixels if pixels else 0.0
    return {"bce": -f * math.log(on) - (1 - f) * math.log(1 - off), "focal": -f * (1 - on)**2 * math.log(on) - (1 - f) * off**2 * math.log(1 - off),
            "batch_dice": 1 - (2 * f * on + s) / (f * on + (1 - f) * off + f + s)}


def test_the_fingerprint_of_an_activation_applied_twice():
    """A perfect predictor at 0.5 % ship pixels; the Airbus document reports 0.691, 0.172 and 0.985."""
    for name, published, tabled in (("bce", 0.6912, 0.691), ("focal", 0.1725, 0.172), ("batch_dice", 0.9856, 0.985)):
        bounds = loss_bounds(name, 0.005)
        assert round(bounds.doubled_floor, 4) == published and tabled <= bounds.doubled_floor < tabled + 1e-3
        assert bounds.floor < 1e-12 and bounds.ceiling > 0.99
        assert bounds.doubled_floor == pytest.approx(squeezed(1, 0, 0.005)[name], abs=2e-5)      # without smoothing, and with 0.12 of a pixel more
    assert round(loss_bounds({"dice": {"per": "batch"}}, 0.005, pixels=16 * 256**2).doubled_floor, 4) == 0.9856


@pytest.mark.parametrize("f", [0.25, 0.0625])
def test_bounds_are_the_closed_form_where_the_fraction_is_a_number_of_pixels(f):
    best, worst = squeezed(1, 0, f, 4096, 1.0), squeezed(0, 1, f, 4096, 1.0)
    for name in best:
        bounds = loss_bounds(name, f, 4096)
        assert bounds.doubled_floor == pytest.approx(best[name], rel=1e-12) and bounds.doubled_ceiling == pytest.approx(worst[name], rel=1e-12)
    assert loss_bounds("dice", f, 4096).ceiling == pytest.approx(1 - 1 / 4097, rel=1e-9)
    assert loss_bounds("bce", f, 4096).ceiling == loss_bounds("focal", f, 4096).ceiling == loss_bounds("lovasz", f, 4096).ceiling == math.inf
    assert loss_bounds("lovasz", f, 4096).doubled_floor == pytest.approx(1 - f, rel=1e-12)       # all background at the margin, no object
    entropy = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert loss_bounds("soft_bce", f, 4096).floor == pytest.approx(entropy, rel=1e-12)


SETTINGS = [*LOSSES, {"soft_bce": {"smoothing": 0.3, "pos_weight": 5.0}}, {"soft_bce": {"smoothing": 0.45}}, {"bce": {"pos_weight": 20.0}}, {"focal": {"alpha": 0.25}}, {"bce": 1, "dice": 2}]


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_no_predictor_leaves_the_bounds(loss):
    """Random predictors, and gradient descent towards the floor and the ceiling, of three images of which one is empty."""
    fractions, pixels = [0.25, 0.0, 0.125], 16
    bounds, parts = loss_bounds(loss, fractions, pixels), make_loss(loss)
    y = torch.zeros(3, 1, 1, pixels, dtype=torch.float64)
    y[0, ..., :4] = y[2, ..., :2] = 1
    value = lambda z: sum(parts(z, y).values())
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 5.0):
        z = spread * torch.randn((200, *y.shape), generator=generator, dtype=torch.float64)
        assert all(bounds.floor - 1e-9 <= value(o) <= bounds.ceiling + 1e-9 for o in z)
        assert all(bounds.doubled_floor - 1e-9 <= value(torch.sigmoid(o)) <= bounds.doubled_ceiling + 1e-9 for o in z)
    for sign, limit in ((1, bounds.doubled_floor), (-1, bounds.doubled_ceiling)):
        reached = []
        for start in (y, 1 - y, torch.zeros_like(y), torch.ones_like(y)):                       # a convex loss has its highest values in corners: four ways up
            q = start * 0.8 + 0.1
            for _ in range(200): q = (q - sign * 0.3 * torch.autograd.grad(value(r := q.clone().requires_grad_()), r)[0] * y.numel()).clamp(0, 1)
            reached.append(sign * float(value(q)))
        assert sign * min(reached) == pytest.approx(limit, abs=2e-3)


def test_bounds_of_a_sum_and_of_several_classes():
    one, two, both = loss_bounds("bce", 0.01), loss_bounds({"dice": 2}, 0.01), loss_bounds({"bce": 1, "dice": 2}, 0.01)
    assert both == pytest.approx([a + b for a, b in zip(one, two)])
    assert loss_bounds({"bce": {"class_weights": [1, 2, 3, 4]}}, 0.01, 10_000) == pytest.approx(loss_bounds("bce", 0.01, 10_000))
