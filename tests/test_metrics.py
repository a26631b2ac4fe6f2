"""Metrics against scikit-learn, torchmetrics, pycocotools and a naive loop."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from sklearn.metrics import f1_score, jaccard_score
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.segmentation import dice_score

from shipnb.masks import label_instances
from shipnb.metrics import (IOU_THRESHOLDS, SegmentationMeter, dice, empty_baseline, f2_from_counts, iou, mask_counts, mask_summary, object_counts,
                            object_f2, pixel_dice, segmentation_scores, soft_batch_dice)

label_images = hnp.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4))


def masks(seed, n=24, side=12):
    """Random masks, with every combination of empty and full among them."""
    rng = np.random.default_rng(seed)
    pred, true = (rng.random((n, side, side)) < rng.choice([0, .05, .4, 1], (n, 1, 1)) for _ in range(2))
    pred[:4], true[:4] = np.array([0, 0, 1, 1], bool)[:, None, None], np.array([0, 1, 0, 1], bool)[:, None, None]
    return pred, true


def loop_f2(pred_labels, true_labels):
    """The competition's definition, written as it reads: masks, a greedy search for a hit, F2 at each threshold."""
    preds, trues = ([np.asfortranarray(labels == o).astype(np.uint8) for o in np.unique(labels) if o] for labels in (pred_labels, true_labels))
    if not preds and not trues: return 1.0
    if not preds or not trues: return 0.0
    encoded = [[coco_mask.encode(o) for o in group] for group in (preds, trues)]
    overlaps = np.asarray(coco_mask.iou(*encoded, [0] * len(trues)))
    scores = []
    for k in range(10, 20):
        hit = overlaps > k / 20
        tp = int(hit.any(axis=0).sum())
        fn, fp = len(trues) - tp, int((~hit.any(axis=1)).sum())
        scores.append(5 * tp / (5 * tp + 4 * fn + fp))
    return float(np.mean(scores))


@pytest.mark.parametrize("seed", range(3))
def test_dice_and_iou_equal_scikit_learn(seed):
    pred, true = masks(seed)
    ours = np.stack([dice(pred, true), iou(pred, true)], 1)
    for p, t, (d, j) in zip(pred, true, ours):
        args = (t.ravel(), p.ravel())
        empty = not (p.any() or t.any())
        assert d == pytest.approx(1 if empty else f1_score(*args, zero_division=0), abs=1e-15)
        assert j == pytest.approx(1 if empty else jaccard_score(*args, zero_division=0), abs=1e-15)


def test_dice_equals_torchmetrics_where_both_define_it():
    pred, true = (torch.as_tensor(o)[4:] for o in masks(5))
    some = (pred | true).flatten(1).any(1)
    theirs = dice_score(pred[some][:, None].long(), true[some][:, None].long(), num_classes=1, average="macro", aggregation_level="samplewise")
    assert torch.allclose(dice(pred, true)[some], theirs.flatten().double(), atol=1e-6)
    pooled = BinaryF1Score()
    pooled.update(pred.flatten().int(), true.flatten().int())
    assert pixel_dice(pred, true) == pytest.approx(pooled.compute().item(), abs=1e-6)


def test_pixel_dice_is_the_f1_score_of_all_pixels():
    pred, true = masks(7)
    assert pixel_dice(pred, true) == pytest.approx(f1_score(true.ravel(), pred.ravel()), abs=1e-15)
    assert pixel_dice(list(pred), list(true)) == pixel_dice(pred, true)
    assert pixel_dice([pred[5], pred[6][:3]], [true[5], true[6][:3]]) == pytest.approx(
        f1_score(np.append(true[5], true[6][:3]), np.append(pred[5], pred[6][:3])), abs=1e-15)


@given(label_images, st.data())
@settings(max_examples=200, deadline=None)
def test_properties(a, data):
    b = data.draw(hnp.arrays(np.int32, a.shape, elements=st.integers(0, 4)))
    d, j, f = dice(a, b), iou(a, b), object_f2(a, b)
    assert 0 <= j <= d <= 1 and 0 <= f <= 1
    assert (d, j) == (dice(b, a), iou(b, a))
    assert d == pytest.approx(2 * j / (1 + j))
    assert dice(a, a) == iou(a, a) == object_f2(a, a) == 1
    assert (d == 1) == ((a > 0) == (b > 0)).all()
    assert dice(torch.as_tensor(a), torch.as_tensor(b)).item() == d
    assert f == pytest.approx(loop_f2(a, b), abs=1e-12)
    assert object_f2(a * 1000, b * 3) == f


def test_f2_equals_the_loop_on_near_misses():
    """Predictions are the truth eroded and shifted a little, so that IoUs spread over every threshold."""
    rng, seen = np.random.default_rng(0), []
    for _ in range(60):
        true = np.zeros((60, 60), np.int32)
        pred = np.zeros((60, 60), np.int32)
        for k, (y, x) in enumerate([(3, 3), (3, 33), (33, 3), (33, 33)], 1):
            h, w = rng.integers(4, 22, 2)
            true[y:y + h, x:x + w] = k
            dy, dx, dh, dw = rng.integers(-2, 3, 4)
            if rng.random() < .9: pred[y + dy:max(y + dy + h + dh, y + dy + 1), x + dx:max(x + dx + w + dw, x + dx + 1)] = k
        seen.append(object_f2(pred, true))
        assert seen[-1] == pytest.approx(loop_f2(pred, true), abs=1e-12)
    assert len(set(seen)) > 20, "the cases must differ, or the loop above proves little"


def test_an_iou_of_exactly_a_threshold_is_no_hit():
    """IoU k/20 for every k: 20 pixels of truth, k of them predicted."""
    for k in range(10, 20):
        true = np.ones((1, 20), int)
        pred = (np.arange(20) < k).astype(int)[None]
        assert object_counts(pred, true)[2].sum() == k - 10, f"IoU {k}/20 must not count as above {k}/20"
    assert IOU_THRESHOLDS.tolist() == [.5, .55, .6, .65, .7, .75, .8, .85, .9, .95]


def test_many_objects_need_no_dense_table():
    """Checkerboards give tens of thousands of objects on both sides; a dense joint table would need gigabytes."""
    numbers = np.arange(256 * 256, dtype=np.int32).reshape(256, 256) + 1
    n_pred, n_true, hits = object_counts(numbers, numbers[::-1, ::-1])
    assert (n_pred, n_true, hits.tolist()) == (65536, 65536, [65536] * 10)


def test_empty_cases_and_baseline():
    zero, one = np.zeros((3, 4), int), np.ones((3, 4), int)
    assert [float(f(*pair)) for f in (dice, iou, object_f2) for pair in ((zero, zero), (zero, one), (one, zero))] == [1, 0, 0] * 3
    assert object_f2(np.zeros((0, 0), int), np.zeros((0, 0), int)) == 1
    counts = [0, 2, 0, 1, 0]
    truths = [one if o else zero for o in counts]
    assert empty_baseline(counts) == segmentation_scores([zero] * 5, truths)
    assert f2_from_counts(np.array([0, 1]), np.array([0, 0]), np.array([0, 0])).tolist() == [1, 0]


def test_with_and_without_follow_the_native_label():
    pred, true = np.zeros((3, 4, 4), bool), np.zeros((3, 4, 4), bool)
    pred[1, 0, 0] = True
    scores = segmentation_scores(pred, true, has_ship=[True, False, False])
    assert (scores["dice_with"], scores["dice_without"], scores["false_alarm"], scores["n_with"]) == (1, .5, .5, 1)
    assert math.isnan(segmentation_scores(pred, true)["dice_with"])


def test_boolean_masks_are_split_into_components():
    rng = np.random.default_rng(3)
    preds, trues = rng.random((2, 6, 30, 30)) < .2
    by_mask = segmentation_scores(preds, trues)
    by_label = segmentation_scores([label_instances(o)[0] for o in preds], [label_instances(o)[0] for o in trues])
    assert by_mask == by_label
    assert by_mask["f2"] == pytest.approx(np.mean([loop_f2(label_instances(p)[0], label_instances(t)[0]) for p, t in zip(preds, trues)]))


def test_soft_batch_dice():
    rng = np.random.default_rng(0)
    p, y = rng.random((4, 1, 8, 8)), rng.random((4, 1, 8, 8)) < .3
    assert soft_batch_dice(p, y) == pytest.approx(2 * np.vdot(p, y) / (p.sum() + y.sum()))
    assert soft_batch_dice(y, y) == 1 and soft_batch_dice(y & False, y & False) == 1
    assert soft_batch_dice(p, y, smooth=1) == pytest.approx((2 * np.vdot(p, y) + 1) / (p.sum() + y.sum() + 1))
    assert soft_batch_dice(torch.tensor(p, requires_grad=True), torch.as_tensor(y)) == soft_batch_dice(p, y)


@pytest.mark.parametrize("from_logits", [False, True])
def test_meter_is_independent_of_batches_and_equals_the_functions(from_logits):
    rng = np.random.default_rng(1)
    z = torch.as_tensor(rng.normal(0, 3, (11, 1, 9, 7)), dtype=torch.float32)
    y = torch.as_tensor(rng.random((11, 9, 7)) < rng.choice([0, .3], (11, 1, 1))).to(torch.uint8)
    results = []
    for size in (1, 4, 11):
        meter = SegmentationMeter(threshold=.25, from_logits=from_logits)
        for zb, yb in zip(z.split(size), y.split(size)): meter.update(zb if from_logits else zb.sigmoid(), yb)
        results.append(meter.compute())
    assert results[0] == results[1] == results[2]
    pred = (z.sigmoid() >= .25)[:, 0]
    assert results[0] == mask_summary(np.transpose([o.numpy() for o in mask_counts(pred, y)]))
    expected = dice(pred, y)
    has = y.flatten(1).any(1).bool()
    assert results[0]["dice_with"] == pytest.approx(expected[has].mean().item())
    assert results[0]["false_alarm"] == pytest.approx(pred[~has].flatten(1).any(1).double().mean().item())


def test_meter_takes_has_ship_resets_and_accepts_half_precision():
    meter = SegmentationMeter()
    p, y = torch.full((2, 1, 3, 3), .75, dtype=torch.bfloat16), torch.zeros(2, 1, 3, 3)
    meter.update(p, y, has_ship=torch.tensor([True, False]))
    assert meter.compute()["n_with"] == 1 and meter.compute()["false_alarm"] == 1
    meter.reset()
    assert meter.compute()["n"] == 0 and math.isnan(meter.compute()["dice"])


@pytest.mark.parametrize("call, words", [
    (lambda: dice(np.full((2, 2), .5), np.ones((2, 2))), "threshold first"),
    (lambda: dice(np.ones((2, 2)), np.ones((2, 3))), "differ in shape"),
    (lambda: object_f2(np.zeros((2, 2, 2), int), np.zeros((2, 2, 2), int)), "label image"),
    (lambda: object_f2(np.full((2, 2), -1), np.zeros((2, 2), int)), "negative label -1"),
    (lambda: object_counts(np.zeros((2, 2), int), np.zeros((2, 2), int), [.4]), "smallest is 0.5"),
    (lambda: segmentation_scores([np.zeros((2, 2), bool)], []), "1 predictions for 0 truths"),
    (lambda: SegmentationMeter().update(torch.full((1, 1, 2, 2), -3.), torch.zeros(1, 1, 2, 2)), "from_logits=True"),
    (lambda: SegmentationMeter().update(torch.full((1, 1, 2, 2), float("inf")), torch.zeros(1, 1, 2, 2)), "not finite"),
    (lambda: SegmentationMeter().update(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)), "(N, 1, height, width)"),
])
def test_errors(call, words):
    with pytest.raises(ValueError) as caught: call()
    assert words in str(caught.value)
