"""Metrics against scikit-learn, torchmetrics, pycocotools and a naive loop."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, jaccard_score
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.segmentation import dice_score

from shipnb.masks import label_instances
from shipnb.metrics import (IOU_THRESHOLDS, ClassificationMeter, DetectionMeter, SegmentationMeter, average_precision, box_iou, class_scores,
                            confusion_counts, dice, empty_baseline, f2_from_counts, iou, mask_counts, mask_summary, match_boxes, object_counts,
                            object_f2, pixel_dice, precision_summary, segmentation_scores, soft_batch_dice)

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


# --- boxes, against pycocotools

def random_boxes(rng, n):
    """Boxes on a grid of eighths, so that x, y, width, height lose nothing and ties are ties for both."""
    corner, side = rng.integers(0, 400, (n, 2)), rng.integers(8, 200, (n, 2))
    return np.concatenate([corner, corner + side], 1) / 8


def random_scene(rng, classes=3):
    """Truth with crowds and a prediction that is near it, elsewhere, or a copy; scores from a few values, so that many are equal. Some images are empty."""
    n, extra = (int(rng.choice([0, 0, 1, 3, 9])) for _ in range(2))
    truth = dict(boxes=random_boxes(rng, n), labels=rng.integers(1, classes + 1, n), iscrowd=rng.random(n) < 0.2)
    near = truth["boxes"] + rng.integers(-8, 9, (n, 1)) / 8 * rng.integers(0, 2, (n, 4))
    boxes = np.concatenate([near, near[: n // 2], random_boxes(rng, extra)])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 0.125)
    labels = np.concatenate([truth["labels"], truth["labels"][: n // 2], rng.integers(1, classes + 1, extra)])
    return dict(boxes=boxes, labels=labels, scores=rng.choice([0.2, 0.5, 0.5, 0.7, 0.9], len(boxes))), truth


def coco_scores(predictions, truths, most, classes=3):
    """(AP, AP50, AP75) of pycocotools."""
    xywh = lambda o: [*o[:2], o[2] - o[0], o[3] - o[1]]
    rows = [dict(image_id=i, category_id=int(k), bbox=xywh(b), area=float((b[2:] - b[:2]).prod()), iscrowd=int(c))
            for i, t in enumerate(truths) for b, k, c in zip(t["boxes"], t["labels"], t["iscrowd"])]
    coco = COCO()
    coco.dataset = dict(images=[dict(id=i) for i in range(len(truths))], categories=[dict(id=k) for k in range(1, classes + 1)],
                        annotations=[dict(o, id=k + 1) for k, o in enumerate(rows)])
    coco.createIndex()
    found = [dict(image_id=i, category_id=int(k), bbox=xywh(b), score=float(s)) for i, p in enumerate(predictions) for b, k, s in zip(p["boxes"], p["labels"], p["scores"])]
    run = COCOeval(coco, coco.loadRes(found), "bbox")
    run.params.maxDets = [1, 2, most]
    run.evaluate(), run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 2]          # thresholds, recalls, classes
    mean = lambda o: o[o > -1].mean() if (o > -1).any() else math.nan
    return mean(precision), mean(precision[0]), mean(precision[5])


@pytest.mark.parametrize("seed", range(25))
def test_average_precision_equals_pycocotools(seed, capsys):
    rng = np.random.default_rng(seed)
    predictions, truths = zip(*[random_scene(rng) for _ in range(int(rng.integers(1, 12)))])
    if not any(len(o["boxes"]) for o in predictions): return
    most = int(rng.choice([3, 100]))
    ours = average_precision(list(predictions), list(truths), most)
    assert [ours[o] for o in ("ap", "ap50", "ap75")] == pytest.approx(coco_scores(predictions, truths, most), abs=1e-12, nan_ok=True)
    assert (ours["n"], ours["n_objects"]) == (len(truths), sum(int((~o["iscrowd"]).sum()) for o in truths))


def test_the_random_scenes_hold_what_is_hard():
    """Were there no crowds, ties or empty images among them, the comparison would show little."""
    scenes = [random_scene(np.random.default_rng(k)) for k in range(60)]
    assert any(not len(t["boxes"]) and len(p["boxes"]) for p, t in scenes) and any(not len(p["boxes"]) for p, t in scenes)
    assert sum(t["iscrowd"].sum() for _, t in scenes) > 10 and any(len(np.unique(p["scores"])) < len(p["scores"]) for p, _ in scenes)
    ignored = [o[2].any() for p, t in scenes for o in match_boxes(p, t).values()]
    assert 0 < sum(ignored) < len(ignored)


def test_box_iou_equals_pycocotools():
    rng = np.random.default_rng(1)
    a, b, crowd = random_boxes(rng, 40), random_boxes(rng, 30), rng.random(30) < 0.3
    xywh = lambda o: np.concatenate([o[:, :2], o[:, 2:] - o[:, :2]], 1)
    assert np.array_equal(box_iou(a, b, crowd), coco_mask.iou(xywh(a), xywh(b), crowd.astype(np.uint8)))
    assert (box_iou([[0, 0, 0, 0]], [[0, 0, 0, 0]]) == 0).all()


def test_detection_meter_takes_tensors_and_any_batches():
    rng = np.random.default_rng(4)
    predictions, truths = zip(*[random_scene(rng) for _ in range(9)])
    tensors = lambda rows: [{k: torch.as_tensor(v) for k, v in o.items()} for o in rows]
    meter = DetectionMeter()
    for part in (slice(0, 4), slice(4, 9)): meter.update(tensors(predictions[part]), tensors(truths[part]))
    assert meter.compute() == average_precision(list(predictions), list(truths))
    draw = rng.integers(0, 9, 9)
    again = average_precision([predictions[i] for i in draw], [truths[i] for i in draw])
    assert precision_summary([meter.matches[i] for i in draw]) == again


# --- crops, against scikit-learn

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_crop_scores_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 6))
    true, pred = rng.integers(0, max(1, classes - seed % 2), 50), rng.integers(0, classes, 50)
    counts = confusion_counts(pred, true, classes)
    assert np.array_equal(counts, confusion_matrix(true, pred, labels=range(classes)))
    scores = class_scores(counts)
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, pred), abs=1e-15)
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, pred), abs=1e-15) and scores["n"] == 50
    assert scores["macro_f1"] == pytest.approx(f1_score(true, pred, average="macro"), abs=1e-15)
    meter = ClassificationMeter(classes)
    for part in np.array_split(np.arange(50), 4): meter.update(torch.eye(classes)[pred[part]], torch.as_tensor(true[part]))
    assert meter.compute() == scores
