"""Suppression, fusion and the two ways between instances and boxes, against plain loops and another package."""
import numpy as np
import pytest
import torch
from ensemble_boxes import weighted_boxes_fusion

from shipnb.boxes import fuse, suppress, to_detections, to_instances
from shipnb.masks import label_instances
from shipnb.metrics import average_precision, box_iou, match_boxes, object_f2, oriented_iou, precision_summary


def random_boxes(rng, n, side=100):
    corner, extent = rng.uniform(0, side - 31, (n, 2)), rng.uniform(5, 30, (n, 2))
    return np.concatenate([corner, corner + extent], 1)


def crowded(rng, n=6, copies=4):
    """Boxes of `n` objects, each several times and a little moved, with scores that never tie."""
    boxes = np.repeat(random_boxes(rng, n), copies, 0) + rng.uniform(-1.5, 1.5, (n * copies, 4))
    return dict(boxes=np.clip(boxes, 0, 100), scores=rng.permutation(n * copies * 3)[:n * copies] / (n * copies * 3 + 1) + .001, labels=rng.integers(1, 3, n * copies))


def plain_nms(ious, scores, labels, threshold):
    order, kept = sorted(range(len(scores)), key=lambda i: -scores[i]), []
    while order:
        i = order.pop(0)
        kept.append(i)
        order = [k for k in order if labels[k] != labels[i] or ious[i][k] <= threshold]
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_suppression_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    one, threshold = crowded(rng), float(rng.choice([.3, .5, .7]))
    wanted = plain_nms(box_iou(one["boxes"], one["boxes"]), one["scores"], one["labels"], threshold)
    assert suppress(one["boxes"], one["scores"], one["labels"], threshold).tolist() == wanted
    assert suppress(*(torch.from_numpy(one[o]) for o in ("boxes", "scores", "labels")), threshold).tolist() == wanted


@pytest.mark.parametrize("seed", range(10))
def test_suppression_of_oriented_boxes_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    boxes = np.repeat(np.column_stack([rng.uniform(10, 60, (5, 2)), rng.uniform(8, 30, (5, 2)), rng.uniform(0, 180, 5)]), 4, 0) + rng.normal(0, 1.5, (20, 5))
    scores, labels = rng.permutation(20) / 20, rng.integers(1, 3, 20)
    assert suppress(boxes, scores, labels, .4).tolist() == plain_nms(oriented_iou(boxes, boxes), scores, labels, .4)


@pytest.mark.parametrize("seed", range(40))
def test_fusion_equals_its_authors_package(seed):
    rng = np.random.default_rng(seed)
    models = [crowded(np.random.default_rng(seed), n=int(rng.integers(1, 6)), copies=int(rng.integers(1, 4))) for _ in range(int(rng.integers(1, 4)))]
    for o in models: o["boxes"] = np.clip(o["boxes"] + rng.normal(0, .5, (len(o["boxes"]), 2))[:, [0, 1, 0, 1]], 0, 99)
    weights, threshold = rng.choice([.5, 1., 2.], len(models)), float(rng.choice([.4, .55, .7]))
    for o in models: o["scores"] = o["scores"] * rng.uniform(.5, 1)
    ours = fuse(models, threshold, weights)
    boxes, scores, labels = weighted_boxes_fusion([o["boxes"] / 100 for o in models], [o["scores"] for o in models], [o["labels"] for o in models], weights=weights, iou_thr=threshold)
    mine, theirs = np.lexsort([ours["boxes"][:, 0], ours["scores"].round(6)]), np.lexsort([boxes[:, 0], scores.round(6)])
    assert len(mine) == len(theirs)
    np.testing.assert_allclose(ours["boxes"][mine], boxes[theirs] * 100, atol=1e-3)
    np.testing.assert_allclose(ours["scores"][mine], scores[theirs], atol=1e-5)
    assert (ours["labels"][mine] == labels[theirs]).all() and (np.diff(ours["scores"]) <= 0).all()


def test_fusion_of_a_model_with_itself_changes_nothing():
    one = crowded(np.random.default_rng(0), copies=1)
    one = {name: o[suppress(one["boxes"], one["scores"], one["labels"], .3)] for name, o in one.items()}
    both = fuse([one, one])
    np.testing.assert_allclose(both["boxes"], one["boxes"])
    np.testing.assert_allclose(both["scores"], one["scores"])


def random_instances(rng, shape=(40, 50)):
    return label_instances(rng.random((8, 10)).repeat(5, 0).repeat(5, 1) > .75)[0][:shape[0], :shape[1]]


@pytest.mark.parametrize("seed", range(10))
def test_instances_to_detections_and_back(seed):
    rng = np.random.default_rng(seed)
    labels = random_instances(rng)
    labels[labels == 2] = 0                                                    # a number that does not occur
    p = rng.random(labels.shape)
    found = to_detections(labels, p)
    numbers = [o for o in np.unique(labels) if o]
    for k, number in enumerate(numbers):
        rows, columns = np.nonzero(labels == number)
        assert found["boxes"][k].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found["scores"][k] == pytest.approx(p[labels == number].mean(), abs=1e-12)
        assert (found["masks"][k] == (labels == number)).all()
    assert len(found["scores"]) == len(numbers)
    back = to_instances(found, labels.shape, 0)
    assert ((back > 0) == (labels > 0)).all() and object_f2(back, labels) == 1
    assert all(np.isclose(p[back == k + 1].mean(), np.sort(found["scores"])[::-1][k]) for k in range(len(numbers)))


def test_nothing_stays_nothing():
    found = to_detections(np.zeros((6, 7), int))
    assert found["masks"].shape == (0, 6, 7) and found["boxes"].shape == (0, 4)
    assert (to_instances(found, (6, 7)) == 0).all()


def test_a_pixel_that_several_detections_claim_goes_to_the_best():
    rng = np.random.default_rng(1)
    masks, scores = rng.random((5, 1, 20, 20)), rng.permutation(5) / 5 + .1
    out = to_instances(dict(masks=torch.from_numpy(masks), scores=torch.from_numpy(scores)), (20, 20), .3, .6)
    order = [i for i in np.argsort(-scores) if scores[i] >= .3]
    for y in range(20):
        for x in range(20):
            claims = [number for number, i in enumerate(order, 1) if masks[i, 0, y, x] >= .6]
            assert out[y, x] == (claims[0] if claims else 0)


def test_a_segmenter_and_a_detector_that_say_the_same_have_the_same_scores():
    """By mask, by box and by F2: instances of a label image, and the same objects from a detector, in another order."""
    rng = np.random.default_rng(3)
    truths, segmenter, detector = [], [], []
    for _ in range(6):
        labels = random_instances(rng)
        truths.append(to_detections(labels))
        p = rng.random(labels.shape)
        segmenter.append(to_detections(np.where(rng.random(labels.max() + 1)[labels] < .7, np.roll(labels, 1, 1), 0), p))
        shuffle = rng.permutation(len(segmenter[-1]["scores"]))
        detector.append({name: torch.from_numpy(o[shuffle]) for name, o in segmenter[-1].items()})
        detector[-1]["masks"] = detector[-1]["masks"][:, None].float()          # as Mask R-CNN gives them
        assert object_f2(to_instances(detector[-1], labels.shape, 0), labels) == object_f2(to_instances(segmenter[-1], labels.shape, 0), labels)
    assert average_precision(segmenter, truths) == average_precision(detector, truths)
    plain = [o | {"masks": o["masks"][:, 0] >= .5} for o in detector]
    by_mask = [precision_summary([match_boxes(p, t, by="masks") for p, t in zip(found, truths)]) for found in (segmenter, plain)]
    assert by_mask[0] == by_mask[1] and 0 < by_mask[0]["ap50"] < 1
