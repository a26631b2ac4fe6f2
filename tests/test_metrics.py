"""Metrics against scikit-learn, torchmetrics, pycocotools and a naive loop."""
import contextlib
import io
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from faster_coco_eval import COCO as FasterCOCO, COCOeval_faster
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, HalfspaceIntersection
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, fbeta_score, jaccard_score, precision_recall_curve
from torchmetrics.classification import BinaryF1Score
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.functional.segmentation import dice_score

from shipnb.masks import label_instances
from shipnb.metrics import (IOU_THRESHOLDS, ChannelMeter, ClassificationMeter, DetectionMeter, Meter, SegmentationMeter, average_precision, box_iou,
                            class_scores, coco_scores, compute_iou_batch, compute_ious, confusion_counts, dice, empty_baseline, f2_from_counts, iou,
                            mask_counts, mask_iou, mask_summary, match_areas, match_boxes, object_counts, object_f2, oriented_iou, pixel_dice, precision_recall,
                            precision_summary, scores_at, segmentation_scores, soft_batch_dice, voc_average_precision)

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


def three_scores(predictions, truths, most, classes=3):
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
    assert [ours[o] for o in ("ap", "ap50", "ap75")] == pytest.approx(three_scores(predictions, truths, most), abs=1e-12, nan_ok=True)
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


# --- the twelve COCO numbers, against pycocotools, faster-coco-eval and torchmetrics

TWELVE = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")


def coco_rows(one, image, by):
    """The rows of a COCO file for one image's prediction or truth; `iscrowd`, `ignore`, `area` and `score` where there are any."""
    rows = []
    for k, label in enumerate(one["labels"]):
        row = dict(image_id=image, category_id=int(label)) | {o: float(one[p][k]) for p, o in (("area", "area"), ("scores", "score")) if p in one}
        row |= {o: int(one[o][k]) for o in ("iscrowd", "ignore") if o in one}
        if by == "boxes":
            x0, y0, x1, y1 = (float(o) for o in one["boxes"][k])
            rows.append(row | dict(bbox=[x0, y0, x1 - x0, y1 - y0], area=row.get("area", (x1 - x0) * (y1 - y0))))
        else:
            code = coco_mask.encode(np.asfortranarray(one["masks"][k].astype(np.uint8)))
            rows.append(row | dict(segmentation=code, area=row.get("area", float(coco_mask.area(code)))))
    return rows


def reference(predictions, truths, by="boxes", coco=COCO, evaluate=COCOeval, classes=2):
    """The twelve numbers of pycocotools, or of a library with its interface, NaN for its -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        there = coco()
        there.dataset = dict(info={}, images=[dict(id=i + 1, height=64, width=64) for i in range(len(truths))], categories=[dict(id=k + 1, name=str(k)) for k in range(classes)])
        there.dataset["annotations"] = [dict(o, id=k + 1) for k, o in enumerate(o for i, t in enumerate(truths) for o in coco_rows(dict(t, iscrowd=t.get("iscrowd", np.zeros(len(t["labels"])))), i + 1, by))]
        there.createIndex()
        run = evaluate(there, there.loadRes([o for i, p in enumerate(predictions) for o in coco_rows(p, i + 1, by)]), "bbox" if by == "boxes" else "segm")
        run.evaluate(), run.accumulate(), run.summarize()
    return [math.nan if o == -1 else float(o) for o in list(run.stats)[:12]]


def small_case(rng):
    """One to three images of 64 pixels, or of 400 for larger ones, with two classes: near misses, copies, elsewhere, crowds, equal scores, an own column of areas."""
    scale = rng.choice([1, 1, 6])
    predictions, truths = zip(*[random_scene(rng, 2) for _ in range(int(rng.integers(1, 4)))])
    for o in (*predictions, *truths): o["boxes"] = o["boxes"] * scale
    for o in truths:
        if rng.random() < .5: o["area"] = rng.choice([100., 1024, 1500, 9216, 20000], len(o["labels"]))
    return list(predictions), list(truths)


def test_the_twelve_numbers_equal_pycocotools_on_a_thousand_cases():
    rng, compared, filled = np.random.default_rng(0), 0, np.zeros(12)
    while compared < 1000:
        predictions, truths = small_case(rng)
        if not sum(len(o["boxes"]) for o in predictions): continue
        ours, theirs = coco_scores(predictions, truths), reference(predictions, truths)
        assert [ours[o] for o in TWELVE] == pytest.approx(theirs, abs=1e-12, nan_ok=True), (compared, predictions, truths)
        compared, filled = compared + 1, filled + (np.nan_to_num(theirs) > 0)
    assert (filled > 50).all(), "every one of the twelve must be something other than 0 and NaN often"


def random_masks(rng, n):
    """Masks of ellipses and specks on 64 x 64 pixels, of every size."""
    y, x = np.mgrid[:64, :64]
    centre, radius = rng.uniform(0, 64, (n, 2)), rng.choice([1, 3, 10, 30, 50], (n, 2)) * rng.uniform(.5, 1, (n, 2))
    return np.array([((y - c[0]) / r[0]) ** 2 + ((x - c[1]) / r[1]) ** 2 <= 1 for c, r in zip(centre, radius)], bool).reshape(n, 64, 64)


def mask_case(rng):
    truths, predictions = [], []
    for _ in range(int(rng.integers(1, 3))):
        n, extra = (int(o) for o in rng.choice([0, 1, 2, 4], 2))
        truths.append(dict(masks=random_masks(rng, n), labels=rng.integers(1, 3, n), iscrowd=rng.random(n) < .2))
        near = np.array([np.roll(o, rng.integers(-2, 3, 2), (0, 1)) for o in truths[-1]["masks"]], bool).reshape(-1, 64, 64)
        masks = np.concatenate([near, random_masks(rng, extra)])
        labels = np.concatenate([truths[-1]["labels"], rng.integers(1, 3, extra)])
        predictions.append(dict(masks=masks, labels=labels, scores=rng.choice([.2, .5, .7, .9], len(masks))))
    return predictions, truths


def test_the_twelve_numbers_of_masks_equal_pycocotools():
    rng, compared, above = np.random.default_rng(1), 0, 0
    while compared < 200:
        predictions, truths = mask_case(rng)
        if not sum(len(o["labels"]) for o in predictions): continue
        ours = coco_scores(predictions, truths, by="masks")
        assert [ours[o] for o in TWELVE] == pytest.approx(reference(predictions, truths, "masks"), abs=1e-12, nan_ok=True)
        compared, above = compared + 1, above + (0 < ours["ap"] < 1)
    assert above > 50


@pytest.mark.parametrize("by", ["boxes", "masks"])
def test_the_twelve_numbers_equal_faster_coco_eval(by):
    rng = np.random.default_rng(2)
    for _ in range(60):
        predictions, truths = small_case(rng) if by == "boxes" else mask_case(rng)
        if not sum(len(o["labels"]) for o in predictions): continue
        ours = coco_scores(predictions, truths, by=by)
        assert [ours[o] for o in TWELVE] == pytest.approx(reference(predictions, truths, by, FasterCOCO, COCOeval_faster), abs=1e-12, nan_ok=True)


def torchmetrics_scores(predictions, truths, by="boxes", **settings):
    """The twelve numbers of torchmetrics, NaN for its -1; at COCO's thresholds, since its own are rounded to float32."""
    settings = settings or dict(iou_thresholds=np.linspace(.5, .95, 10).tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist())
    tensors = lambda o: {k if k != "ignore" else "": torch.as_tensor(np.asarray(v), dtype={"masks": torch.bool, "labels": torch.int64, "iscrowd": torch.int64}.get(k, torch.float32)) for k, v in o.items()}
    metric = MeanAveragePrecision(iou_type="bbox" if by == "boxes" else "segm", **settings)
    metric.update([tensors(o) for o in predictions], [tensors(o) for o in truths])
    with contextlib.redirect_stdout(io.StringIO()): out = metric.compute()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
    return [math.nan if out[o] == -1 else float(out[o]) for o in names]


@pytest.mark.parametrize("by", ["boxes", "masks"])
def test_the_twelve_numbers_equal_torchmetrics(by):
    rng = np.random.default_rng(3)
    for _ in range(40):
        predictions, truths = small_case(rng) if by == "boxes" else mask_case(rng)
        if not sum(len(o["labels"]) for o in predictions) or by == "masks" and not all(len(o["labels"]) for o in truths): continue   # the table says why
        ours = coco_scores(predictions, truths, by=by)
        assert [ours[o] for o in TWELVE] == pytest.approx(torchmetrics_scores(predictions, truths, by), abs=1e-6, nan_ok=True)   # theirs are float32


def test_mask_iou_equals_pycocotools():
    rng = np.random.default_rng(4)
    a, b, crowd = random_masks(rng, 12), random_masks(rng, 9), rng.random(9) < .3
    encode = lambda masks: [coco_mask.encode(np.asfortranarray(o.astype(np.uint8))) for o in masks]
    assert np.array_equal(mask_iou(a, b, crowd), coco_mask.iou(encode(a), encode(b), crowd.astype(np.uint8)))
    assert mask_iou(a[:0], b).shape == (0, 9) and mask_iou(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)))[0, 0] == 0


# --- one point of the curve

@pytest.mark.parametrize("seed", range(8))
def test_precision_and_recall_equal_scikit_learn(seed):
    """Its curve knows nothing of missed objects: they join as positives with the lowest score."""
    rng = np.random.default_rng(seed)
    predictions, truths = zip(*[random_scene(rng) for _ in range(8)])
    matches = [match_boxes(p, t) for p, t in zip(predictions, truths)]
    for k in (0, 5):
        rows = [(s, h and not i, i) for one in matches for o in one.values() for s, h, i in zip(o[0], o[1][k], o[2][k])]
        scores, right = (np.array([o[c] for o in rows if not o[2]]) for c in (0, 1))
        n = sum(o[3] for one in matches for o in one.values())
        missed = n - int(right.sum())
        precision, recall, cuts = precision_recall_curve(np.append(right, np.ones(missed)), np.append(scores, np.full(missed, -1.)), drop_intermediate=False)
        ours = precision_recall(matches, k)
        keep = cuts > -1
        assert [o.tolist() for o in ours] == [pytest.approx(o[:len(cuts)][keep][::-1]) for o in (cuts, precision, recall)]
        for cut, p, r in zip(*ours):
            at = scores_at(matches, cut, k, beta=2)
            assert (at["precision"], at["recall"], at["tp"] + at["fn"]) == (pytest.approx(p), pytest.approx(r), n)
            assert at["f"] == pytest.approx(fbeta_score(np.append(right, np.ones(missed)), np.append(scores, np.full(missed, -1.)) >= cut, beta=2, zero_division=0))
    assert scores_at(matches, .5, label=1)["tp"] == sum(scores_at([{1: o[1]} for o in matches if 1 in o], .5)[k] for k in ("tp",))


# --- Pascal VOC, against a plain implementation

def plain_voc(predictions, truths, threshold, points):
    """The definition written as it reads: one list of detections, marks on the truths, a maximum for each recall."""
    out = []
    for kind in sorted({int(o) for t in truths for o in t["labels"]}):
        rows = [(float(s), i, b) for i, p in enumerate(predictions) for b, s, k in zip(p["boxes"], p["scores"], p["labels"]) if k == kind]
        rows = sorted(rows, key=lambda o: o[0], reverse=True)
        taken, n = set(), sum(int(k == kind and not d) for t in truths for k, d in zip(t["labels"], t["difficult"]))
        if n == 0: continue
        tp = fp = 0
        curve = []
        for _, i, (x0, y0, x1, y1) in rows:
            best, which = 0.0, None
            for j, (a, b, c, d) in enumerate(truths[i]["boxes"]):
                if truths[i]["labels"][j] != kind: continue
                w, h = min(x1, c) - max(x0, a), min(y1, d) - max(y0, b)
                overlap = w * h / ((x1 - x0) * (y1 - y0) + (c - a) * (d - b) - w * h) if w > 0 and h > 0 else 0.0
                if overlap > best: best, which = overlap, j
            if best >= threshold and truths[i]["difficult"][which]: continue
            if best >= threshold and (i, which) not in taken: taken.add((i, which)); tp += 1
            else: fp += 1
            curve.append((tp / n, tp / (tp + fp)))
        if points: out.append(sum(max([p for r, p in curve if r >= k / (points - 1)], default=0) for k in range(points)) / points)
        else: out.append(sum(max(p for r, p in curve if r >= k / n) / n for k in range(1, tp + 1)))
    return float(np.mean(out)) if out else math.nan


@pytest.mark.parametrize("points", [11, 101, None])
def test_voc_equals_a_plain_implementation(points):
    rng, seen = np.random.default_rng(5), []
    for _ in range(150):
        predictions, truths = zip(*[random_scene(rng, 2) for _ in range(int(rng.integers(1, 5)))])
        truths = [dict(o, difficult=rng.random(len(o["labels"])) < .2) for o in truths]
        threshold = float(rng.choice([.3, .5, .75]))
        seen.append(voc_average_precision(predictions, truths, threshold, points)["ap"])
        assert seen[-1] == pytest.approx(plain_voc(predictions, truths, threshold, points), abs=1e-12, nan_ok=True)
    assert np.nanstd(seen) > .1


def test_voc_on_the_published_example():
    """Padilla, Object-Detection-Metrics: image, score and right or wrong of 24 detections of 15 objects; 26.84 % and 24.56 %."""
    rows = """1 88 FP|1 70 TP|1 80 FP|2 71 FP|2 54 TP|2 74 FP|3 18 TP|3 67 FP|3 38 FP|3 91 TP|3 44 FP|4 35 FP|4 78 FP|4 45 FP|4 14 FP|5 62 TP|5 44 FP|5 95 TP|5 23 FP|6 45 FP|6 84 FP|6 43 FP|7 48 TP|7 95 FP"""
    box, objects = np.array([0, 0, 10, 10]), {1: 2, 2: 2, 3: 3, 4: 2, 5: 2, 6: 2, 7: 2}
    predictions, truths = [], []
    for image, n in objects.items():
        mine = [o.split() for o in rows.split("|") if o.split()[0] == str(image)]
        right = np.cumsum([o[2] == "TP" for o in mine]) - 1
        boxes = [box + 20 * right[k] if o[2] == "TP" else box + 500 + 20 * k for k, o in enumerate(mine)]
        predictions.append(dict(boxes=boxes, scores=[int(o[1]) / 100 for o in mine], labels=[1] * len(mine)))
        truths.append(dict(boxes=[box + 20 * k for k in range(n)], labels=[1] * n))
    assert sum(objects.values()) == 15 and sum(len(o["labels"]) for o in predictions) == 24
    assert voc_average_precision(predictions, truths, .3, 11)["ap"] == pytest.approx(.2684, abs=5e-5)
    assert voc_average_precision(predictions, truths, .3, None)["ap"] == pytest.approx(.2456, abs=1.1e-4)   # they print 24.56, the curve's sum is 24.57


# --- the steel source's Meter, against its definition written out image by image

def plain_meter(batches):
    """[dice, dice_neg, dice_pos] and iou as the source defines them, in plain loops."""
    pos, neg, ious = [], [], []
    for targets, outputs in batches:
        of_batch = []
        for t, z in zip(targets.numpy().astype(bool), outputs.numpy()):
            p = 1 / (1 + np.exp(-z.astype(np.float64))) > .5
            if t.any():
                pos.append(2 * (p & t).sum() / (p.sum() + t.sum()))
                of_batch.append((p & t).sum() / (p | t).sum())
            else: neg.append(float(not p.any()))
        if of_batch: ious.append(np.mean(of_batch))
    return [np.mean(pos + neg), np.mean(neg), np.mean(pos)], np.mean(ious)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_steel_meter_follows_its_definition(size):
    rng = np.random.default_rng(size)
    z = torch.as_tensor(rng.normal(-1, 2, (30, 4, 6, 9)), dtype=torch.float32)
    z[:6] = -5
    y = torch.as_tensor(rng.random((30, 4, 6, 9)) < rng.choice([0, .3], (30, 4, 1, 1))).float()
    y[:3] = y[8:12] = 0
    meter = Meter("val", 0)
    batches = list(zip(y.split(size), z.split(size)))
    for targets, outputs in batches: meter.update(targets, outputs)
    dices, iou = meter.get_metrics()
    expected = plain_meter(batches)
    assert dices == pytest.approx(expected[0], abs=1e-12) and iou == pytest.approx(expected[1], abs=1e-12)
    channels = ChannelMeter(4)
    channels.update(z > 0, y)
    assert dices[0] == pytest.approx(channels.compute()["dice_volume"], abs=1e-12)
    batch_ious = [compute_iou_batch((o > 0).int().numpy(), t.int().numpy()) for t, o in batches]
    assert iou == pytest.approx(np.nanmean(batch_ious), abs=1e-12)


def test_compute_ious_equals_scikit_learn_and_leaves_its_input_alone():
    rng = np.random.default_rng(0)
    pred, label = rng.integers(0, 4, (2, 8, 9))
    label[label == 3], label[0] = 0, 255
    before = pred.copy()
    ious = compute_ious(pred, label, [0, 1, 2, 3])
    known = label != 255
    assert ious[:3] == pytest.approx(jaccard_score(label[known], pred[known], labels=[0, 1, 2], average=None)) and math.isnan(ious[3])
    assert (pred == before).all()
    assert compute_ious(pred, label, [3], only_present=False) == [0] and compute_ious(pred, label, [9], only_present=False) == [1]


# --- oriented boxes

def overlap_of_half_planes(a, b):
    """Area of the intersection of two rectangles as the hull of what all eight half-planes share (scipy's qhull), from the definition of the five numbers."""
    rows = []
    for x, y, length, width, angle in (a, b):
        u = np.array([math.cos(math.radians(angle)), -math.sin(math.radians(angle))])
        v = np.array([-u[1], u[0]])
        for n, reach in ((u, length / 2), (-u, length / 2), (v, width / 2), (-v, width / 2)): rows.append([*n, -(n @ [x, y]) - reach])
    rows = np.array(rows)
    inside = linprog([0, 0, -1], np.c_[rows[:, :2], np.ones(8)], -rows[:, 2], bounds=[(None, None), (None, None), (0, None)])
    if inside.status or inside.x[2] < 1e-9: return 0.0
    return ConvexHull(HalfspaceIntersection(rows, inside.x[:2]).intersections).volume


def random_oriented(rng, n):
    return np.column_stack([rng.uniform(0, 60, (n, 2)), rng.uniform(20, 60, n), rng.uniform(1, 20, n), rng.uniform(-180, 360, n)])


def test_oriented_iou_equals_the_half_planes():
    rng = np.random.default_rng(6)
    a = random_oriented(rng, 120)
    b = a + rng.normal(0, 1, a.shape) * rng.choice([0, 1, 8], a.shape)
    b[:, 2:4] = np.maximum(b[:, 2:4], .5)
    seen = []
    for one, two in zip(a, b):
        overlap = overlap_of_half_planes(one, two)
        seen.append(overlap / (one[2] * one[3] + two[2] * two[3] - overlap))
        assert oriented_iou([one], [two])[0, 0] == pytest.approx(seen[-1], abs=1e-9)
    assert 20 < sum(0 < o < 1 for o in seen)


oriented = st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(.1, 500), st.floats(.1, 500), st.floats(-720, 720))


@given(oriented, oriented, st.floats(-180, 180), st.tuples(st.floats(-100, 100), st.floats(-100, 100)))
@settings(max_examples=200, deadline=None)
def test_oriented_iou_properties(a, b, turn, shift):
    iou_ab = oriented_iou([a], [b])[0, 0]
    assert 0 <= iou_ab <= 1 and iou_ab == pytest.approx(oriented_iou([b], [a])[0, 0], abs=1e-6)
    assert oriented_iou([a], [a])[0, 0] == pytest.approx(1, abs=1e-9)
    assert oriented_iou([a], [(*a[:2], a[3], a[2], a[4] + 90)])[0, 0] == pytest.approx(1, abs=1e-6), "the same box said otherwise"
    moved = [(*(np.add(o[:2], shift)), *o[2:]) for o in (a, b)]
    assert oriented_iou(moved[:1], moved[1:])[0, 0] == pytest.approx(iou_ab, abs=1e-6)
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    turned = [(o[0] * cosine + o[1] * sine, o[1] * cosine - o[0] * sine, *o[2:4], o[4] + turn) for o in (a, b)]
    assert oriented_iou(turned[:1], turned[1:])[0, 0] == pytest.approx(iou_ab, abs=1e-6)


def test_oriented_iou_of_upright_boxes_is_box_iou_and_opencv_loses_some():
    rng = np.random.default_rng(7)
    boxes = random_boxes(rng, 20)
    five = np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], np.zeros(20)])
    assert oriented_iou(five, five) == pytest.approx(box_iou(boxes, boxes), abs=1e-12)
    kind, corners = cv2.rotatedRectangleIntersection(((0, 0), (83, 14), 150), ((0, 0), (83, 15), 150))
    assert oriented_iou([[0, 0, 83, 14, -150]], [[0, 0, 83, 15, -150]])[0, 0] == pytest.approx(14 / 15, abs=1e-12)
    lost = corners is None or cv2.contourArea(cv2.convexHull(corners)) < 83 * 14 / 2
    assert lost, "OpenCV finds this intersection now: say so in 12_metrics, and consider its function"


# --- the tables of the notebook, row by row

NOTEBOOK = Path(__file__).parents[1]/"nbs"/"12_metrics.ipynb"


def table_of(heading):
    """The rows of the table under a heading of the notebook: list of dicts by column name."""
    text = "\n".join("".join(o["source"]) for o in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if o["cell_type"] == "markdown")
    lines = [o for o in text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if o.startswith("|")]
    cells = [[c.strip() for c in o.strip("|").split("|")] for o in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


NO_BOX, ONE_BOX = dict(boxes=np.zeros((0, 4)), labels=[]), dict(boxes=[[0, 0, 4, 4]], labels=[1])
EMPTY_CASES = {"nothing true, nothing found": [(0, 0)], "nothing true, something found": [(0, 1)], "something true, nothing found": [(1, 0)], "no image": []}


def empty_scores(pairs):
    """Every column of the table of empty cases, for images whose truth and prediction are there (1) or not (0)."""
    mask = {0: np.zeros((4, 4), int), 1: np.ones((4, 4), int)}
    preds, trues = [mask[p] for _, p in pairs], [mask[t] for t, _ in pairs]
    found, there = ([dict(o, scores=[.5] * len(o["labels"])) for o in ([NO_BOX, ONE_BOX][p] for _, p in pairs)], [[NO_BOX, ONE_BOX][t] for t, _ in pairs])
    masks, ap, coco = segmentation_scores(preds, trues), average_precision(found, there)["ap"], coco_scores(found, there)["ap"]
    assert ap == pytest.approx(coco, nan_ok=True) and masks["dice"] == pytest.approx(masks["iou"], nan_ok=True)
    at = scores_at([match_boxes(*o) for o in zip(found, there)], .1)
    meter = Meter()
    for p, t in zip(preds, trues): meter.update(torch.as_tensor(t)[None, None], torch.as_tensor(p * 20. - 10)[None, None])
    return [masks["dice"], masks["f2"], at["precision"], at["recall"], at["f"], ap, voc_average_precision(found, there)["ap"], meter.get_metrics()[0][0], meter.get_metrics()[1]]


@pytest.mark.parametrize("row", table_of("Empty cases"), ids=lambda o: o["case"])
def test_every_entry_of_the_table_of_empty_cases(row):
    said = [float(o) for name, o in row.items() if name != "case"]
    assert empty_scores(EMPTY_CASES[row["case"]]) == pytest.approx(said, nan_ok=True, abs=0)


def boxes_of(*boxes, **columns): return dict(boxes=[list(o) for o in boxes], labels=[1] * len(boxes)) | columns


def row_class_without_truth():
    found, there = [boxes_of((0, 0, 4, 4), (9, 9, 12, 12), scores=[.9, .8], labels=[1, 2])], [boxes_of((0, 0, 4, 4))]
    assert average_precision(found, there)["ap"] == 1 and reference(found, there)[0] == pytest.approx(1)
    nothing = dict(NO_BOX, labels=np.zeros(0, int))
    assert math.isnan(average_precision(found, [nothing])["ap"])
    for coco, evaluate in ((COCO, COCOeval), (FasterCOCO, COCOeval_faster)):
        with contextlib.redirect_stdout(io.StringIO()):
            there = coco()
            there.dataset = dict(info={}, images=[dict(id=1)], categories=[dict(id=1, name="ship")], annotations=[])
            there.createIndex()
            run = evaluate(there, there.loadRes(coco_rows(found[0], 1, "boxes")), "bbox")
            run.evaluate(), run.accumulate(), run.summarize()
        assert run.stats[0] == -1
    metric = MeanAveragePrecision()
    metric.update([dict(boxes=torch.tensor([[0., 0, 4, 4]]), scores=torch.tensor([.9]), labels=torch.tensor([1]))], [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))])
    assert metric.compute()["map"] == -1


def row_no_detections():
    assert average_precision([dict(NO_BOX, scores=[])], [ONE_BOX])["ap"] == 0
    with pytest.raises(IndexError): reference([dict(NO_BOX, scores=[])], [ONE_BOX])


def row_equal_scores():
    found = [boxes_of((50, 50, 60, 60), (0, 0, 10, 10), scores=[.5, .5])]
    turned = [boxes_of((0, 0, 10, 10), (50, 50, 60, 60), scores=[.5, .5])]
    there = [boxes_of((0, 0, 10, 10))]
    assert [average_precision(o, there)["ap50"] for o in (found, turned)] == [.5, 1]
    assert [reference(o, there)[1] for o in (found, turned)] == pytest.approx([.5, 1])
    assert all([o.tolist() for o in precision_recall([match_boxes(p[0], there[0])])] == [[.5], [.5], [1]] for p in (found, turned))
    assert precision_recall_curve([0, 1], [.5, .5])[0].tolist() == precision_recall_curve([1, 0], [.5, .5])[0].tolist() == [.5, 1]


def row_ignore():
    found, there = [boxes_of((0, 0, 4, 4), scores=[.9])], [boxes_of((0, 0, 4, 4), (9, 9, 12, 12), ignore=[0, 1])]
    assert average_precision(found, there)["ap"] == 1
    assert reference(found, there)[0] == pytest.approx(51 / 101) and reference(found, there)[8] == .5
    assert coco_scores(found, there)["ar_100"] == 1


def row_crowd():
    inside = boxes_of((0, 0, 4, 4), (5, 5, 9, 9), (20, 20, 24, 24), scores=[.9, .8, .7])
    there = boxes_of((0, 0, 10, 10), (20, 20, 24, 24), iscrowd=[1, 0], difficult=[1, 0])
    assert average_precision([inside], [there])["ap"] == 1 == pytest.approx(reference([inside], [there])[0])
    assert voc_average_precision([inside], [there], points=None)["ap"] == pytest.approx(1 / 3)


def row_next_best():
    found = boxes_of((0, 0, 10, 10), (0, 1, 10, 11), scores=[.9, .8])
    there = boxes_of((0, 0, 10, 10), (0, 4, 10, 14))
    assert box_iou(found["boxes"], there["boxes"])[1].argmax() == 0 and box_iou(found["boxes"], there["boxes"])[1, 1] > .5
    assert average_precision([found], [there])["ap50"] == 1 == pytest.approx(reference([found], [there])[1])
    assert voc_average_precision([found], [there], points=None)["ap"] == .5


def row_equal_ious():
    found = boxes_of((0, 2, 10, 12), (0, -1, 10, 9), scores=[.9, .8])          # the first lies between both truths, the second reaches only one
    there = boxes_of((0, 0, 10, 10), (0, 4, 10, 14))
    ious = box_iou(found["boxes"], there["boxes"])
    assert ious[0, 0] == ious[0, 1] and ious[1, 1] < .5 < ious[1, 0]
    assert average_precision([found], [there])["ap50"] == 1 == pytest.approx(reference([found], [there])[1])
    assert voc_average_precision([found], [there], points=None)["ap"] == .5


def row_recalls():
    found, there = boxes_of((0, 0, 4, 4), scores=[.9]), boxes_of((0, 0, 4, 4), (9, 9, 12, 12))
    assert average_precision([found], [there])["ap50"] == pytest.approx(51 / 101) == pytest.approx(reference([found], [there])[1])
    assert [voc_average_precision([found], [there], points=o)["ap"] for o in (11, None)] == [pytest.approx(6 / 11), .5]


def row_area_on_a_boundary():
    found, there = boxes_of((0, 0, 32, 32), scores=[.9]), boxes_of((0, 0, 32, 32))
    for scores in ([coco_scores([found], [there])[o] for o in TWELVE], reference([found], [there])): assert scores[3:5] == pytest.approx([1, 1]) and math.isnan(scores[5])


def row_area_of_a_truth():
    found, there = boxes_of((0, 0, 40, 40), scores=[.9]), boxes_of((0, 0, 40, 40))
    for area, small, medium in ((None, math.nan, 1), (500., 1, math.nan)):
        truth = there | (dict(area=[area]) if area else {})
        assert [coco_scores([found], [truth])[o] for o in ("ap_small", "ap_medium")] == pytest.approx([small, medium], nan_ok=True)
        assert torchmetrics_scores([found], [truth])[3:5] == pytest.approx([small, medium], nan_ok=True)


def row_area_of_a_found_mask():
    diagonal = np.eye(64, dtype=bool)[None]
    found, there = dict(masks=diagonal, scores=[.9], labels=[1]), dict(masks=diagonal, labels=[1])
    rows = coco_rows(found, 1, "masks")
    for box, area in ((None, 64), ([0, 0, 64, 64], 64 * 64)):
        coco = COCO()
        coco.dataset = dict(info={}, images=[dict(id=1, height=64, width=64)], categories=[dict(id=1)], annotations=[])
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            assert coco.loadRes([rows[0] | (dict(bbox=box) if box else {})]).anns[1]["area"] == area
    match = match_areas(found, dict(there, masks=~diagonal), by="masks")
    assert [match[o][1][2].all() for o in ("small", "medium")] == [False, True], "a false alarm of 64 pixels is a small one"


def row_thresholds_in_single_precision():
    boxes = [(20 * k, 0, 20 * k + 4, 4) for k in range(25)]
    found, there = boxes_of(*boxes[:7], scores=[.9] * 7), boxes_of(*boxes)
    assert average_precision([found], [there])["ap"] == pytest.approx(29 / 101) == pytest.approx(reference([found], [there])[0])
    assert torchmetrics_scores([found], [there])[0] == pytest.approx(29 / 101)
    assert torchmetrics_scores([found], [there], average="macro")[0] == pytest.approx(28 / 101)      # its defaults


def row_masks_of_empty_images():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :3] = True
    found = [dict(masks=mask, scores=[.9], labels=[1]), dict(masks=mask, scores=[.95], labels=[1])]
    there = [dict(masks=mask, labels=[1]), dict(masks=mask[:0], labels=np.zeros(0, int))]
    assert coco_scores(found, there, by="masks")["ap"] == .5 == pytest.approx(reference(found, there, "masks")[0])
    assert torchmetrics_scores(found, there, "masks")[0] == pytest.approx(1)


def row_most_detections():
    n = 120
    there = boxes_of(*[(20 * k, 0, 20 * k + 9, 9) for k in range(n)], labels=[1] * 60 + [2] * 60)
    found = dict(there, scores=[.9] * n)
    assert average_precision([found], [there])["ap"] == 1 == pytest.approx(torchmetrics_scores([found], [there])[0]) == pytest.approx(reference([found], [there])[0])
    same = dict(there, labels=[1] * n)
    assert average_precision([dict(same, scores=[.9] * n)], [same])["ap"] == pytest.approx(84 / 101)   # 100 of 120 are found


def row_iou_at_the_threshold():
    pred, true = np.zeros((1, 20), int), np.ones((1, 20), int)
    pred[0, :10] = 1
    found, there = boxes_of((0, 0, 10, 1), scores=[.9]), boxes_of((0, 0, 20, 1))
    assert object_counts(pred, true)[2].tolist() == [0] * 10
    assert average_precision([found], [there])["ap50"] == 1 == pytest.approx(reference([found], [there])[1]) == voc_average_precision([found], [there])["ap"]


DIFFERENCES = {"a class without truth": row_class_without_truth, "a set without detections": row_no_detections, "equal scores": row_equal_scores, "`ignore` in a truth": row_ignore,
               "a crowd": row_crowd, "the best truth is taken already": row_next_best, "two truths of equal IoU": row_equal_ious, "recalls averaged over": row_recalls,
               "area on a boundary": row_area_on_a_boundary, "area of a truth": row_area_of_a_truth, "area of a found mask": row_area_of_a_found_mask,
               "recalls and IoU thresholds": row_thresholds_in_single_precision, "masks of an image without truth": row_masks_of_empty_images, "most detections": row_most_detections, "IoU at the threshold": row_iou_at_the_threshold}


@pytest.mark.parametrize("what", [o["what"] for o in table_of("Where the libraries differ")])
def test_every_row_of_the_table_of_differences(what):
    DIFFERENCES[what]()


def test_no_row_is_tested_that_is_not_in_the_table():
    assert set(DIFFERENCES) == {o["what"] for o in table_of("Where the libraries differ")}
