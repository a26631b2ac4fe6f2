"""The vessel trainer's data and scores: instances of both kinds against independent oracles, boxes-only sets, real labels, and a run of the study on another layout."""
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from shipnb.augment import RandomDownsample
from shipnb.catalog import Catalog, read_airbus
from shipnb.fleet_tasks import make_voc
from shipnb.formats import fill_boxes, read
from shipnb.maskrcnn import VesselDataset, mask_boxes
from shipnb.masks import decode_labels, encode_instances, is_empty_rle, rle_area, rle_decode
from shipnb.metrics import coco_scores, object_f2
from shipnb.objects import ObjectScores, components


def blobs(rng, n, side=64):
    """A label image of up to `n` disjoint rectangles."""
    labels, k = np.zeros((side, side), np.int32), 0
    for _ in range(n):
        (y, x), (h, w) = rng.integers(0, side - 12, 2), rng.integers(2, 12, 2)
        if not labels[y:y + h, x:x + w].any():
            k += 1
            labels[y:y + h, x:x + w] = k
    return labels


def shaken(rng, labels):
    """The label image with some objects gone, some moved, and new ones; numbered 1..n, and a score for each."""
    out = np.zeros_like(labels)
    for k in range(1, labels.max() + 1):
        if rng.random() < 0.8: out[np.roll(labels == k, rng.integers(-2, 3, 2), (0, 1))] = k
    other = blobs(rng, 2)
    out = np.where((out == 0) & (other > 0), other + labels.max(), out)
    kinds = np.unique(out[out > 0])
    return np.searchsorted(np.append(0, kinds), out).astype(np.int32), rng.random(len(kinds)).round(2)


@pytest.fixture(scope="module")
def case():
    """A Catalog of 24 images in 8 scenes, its truths, and two systems' answers."""
    rng = np.random.default_rng(0)
    truths = [blobs(rng, int(rng.integers(0, 6))) for _ in range(24)]
    images = pd.DataFrame(dict(image=[f"{k:02d}.png" for k in range(24)], height=64, width=64, count=[o.max() for o in truths], bytes=-1, group=[f"g{k % 8}" for k in range(24)], split=""))
    rows = [(images.image[i], "ship", code, 0, 0, 64, 64, rle_area(code)) for i, o in enumerate(truths) for code in encode_instances(o)]
    catalog = Catalog(images, pd.DataFrame(rows, columns=["image", "label", "rle", "x0", "y0", "x1", "y1", "area"]))
    return catalog, truths, [[shaken(rng, o) for o in truths] for _ in range(2)]


BANDS = {"small": (0, 30), "large": (30, math.inf)}


def scored(case, which=0, order=range(24)):
    scores = ObjectScores(case[0], BANDS)
    for i in order: scores.add(i, *case[2][which][i])
    return scores


def plain_scores(case, which, which_images):
    """The same scores by loops over pairs of objects."""
    f2, found, large, n, n_large, right, pred = [], 0, 0, 0, 0, 0, 0
    for i in which_images:
        truth, (labels, _) = case[1][i], case[2][which][i]
        f2.append(object_f2(labels, truth))
        iou = lambda a, b: (a & b).sum() / (a | b).sum()
        for k in range(1, truth.max() + 1):
            area, hit = (truth == k).sum(), any(iou(truth == k, labels == j) > 0.5 for j in range(1, labels.max() + 1))
            n, found, n_large, large = n + 1, found + hit, n_large + (area >= 30), large + (hit and area >= 30)
        for j in range(1, labels.max() + 1): pred, right = pred + 1, right + any(iou(truth == k, labels == j) > 0.5 for k in range(1, truth.max() + 1))
    return {"f2": np.mean(f2), "recall": found / n, "recall large": large / n_large, "precision": right / pred}


@pytest.mark.parametrize("which", [0, 1])
def test_scores_are_those_of_plain_loops(case, which):
    values = scored(case, which).values()
    for key, value in plain_scores(case, which, range(24)).items(): assert values[key] == pytest.approx(value, abs=1e-12), key
    empty = [i for i in range(24) if not case[0].counts[i]]
    assert values["false_alarm"] == pytest.approx(np.mean([case[2][which][i][0].any() for i in empty]))
    assert values["f2_with"] == pytest.approx(np.mean([object_f2(case[2][which][i][0], case[1][i]) for i in range(24) if i not in empty]))


def test_average_precision_is_coco_s(case):
    planes = lambda labels: labels == np.arange(1, labels.max() + 1)[:, None, None]
    ones = lambda n: np.ones(n, int)
    found = [dict(masks=planes(labels), scores=s, labels=ones(len(s))) for labels, s in case[2][0]]
    there = [dict(masks=planes(o), labels=ones(o.max())) for o in case[1]]
    coco, values = coco_scores(found, there, by="masks"), scored(case).values()
    assert values["ap"] == pytest.approx(coco["ap"], abs=1e-12) and values["ap50"] == pytest.approx(coco["ap50"], abs=1e-12)


def test_draws_resample_whole_scenes(case):
    """Every draw is the score of the images of some eight scenes, those scenes drawn as often as the weights say."""
    from shipnb.uncertainty import group_draws, group_members
    scores = scored(case)
    drawn, (names, member), weights = scores.draws(20, 3), group_members(scores.units), group_draws(8, 20, 3)
    for k in range(20):
        again = [i for i in range(24) for _ in range(weights[k, member[i]])]
        for key, value in plain_scores(case, 0, again).items(): assert drawn[key][k] == pytest.approx(value, abs=1e-12), key
    assert len(names) == 8 and len(drawn["ap"]) == 20


def test_the_order_of_the_images_does_not_matter_and_a_difference_is_paired(case):
    a, b = scored(case, 0), scored(case, 1)
    turned = scored(case, 0, range(23, -1, -1))
    assert a.values() == turned.values() and all(np.array_equal(o, turned.draws(50)[key], equal_nan=True) for key, o in a.draws(50).items())
    there, back, none = a.difference(b, 200), b.difference(a, 200), a.difference(turned, 200)
    assert np.allclose(there.difference, -back.difference) and np.allclose(there.low, -back.high)
    assert (none.to_numpy() == 0).all()


def test_components_are_scipy_s_with_their_mean_probability():
    rng = np.random.default_rng(1)
    for _ in range(20):
        p = ndimage.gaussian_filter(rng.random((40, 50)), 2)
        p = (p - p.min()) / (p.max() - p.min())
        truth, n = ndimage.label(p >= 0.6, np.ones((3, 3)))
        labels, scores = components(p, 0.6)
        assert len(scores) == n and all(len(np.unique(labels[truth == k])) == 1 for k in range(1, n + 1))
        for k in range(1, n + 1): assert scores[k - 1] == pytest.approx(p[labels == k].mean())
        large, kept = components(p, 0.6, min_area=20)
        assert len(kept) == large.max(initial=0) == sum((labels == k).sum() >= 20 for k in range(1, n + 1))


# --- boxes only

@pytest.fixture(scope="module")
def voc(tmp_path_factory): return read(make_voc(tmp_path_factory.mktemp("voc")/"set", images=8, seed=2))


def test_a_set_of_boxes_trains_boxes_and_filled_rectangles(voc):
    """MASATI's layout: what a box says of a mask is the box itself."""
    with pytest.raises(ValueError, match="has only a box"): VesselDataset(voc, None)
    filled = fill_boxes(voc)
    filled.objects["label"] = "ship"
    data = VesselDataset(filled, None, ["ship"])
    for i in range(len(filled)):
        image, target = data[i]
        assert image.shape[1:] == filled.shape(i)
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist()): assert mask.sum() == (x1 - x0) * (y1 - y0) and mask[y0:y1, x0:x1].all()


def test_the_sizes_of_vessels_need_no_image(voc):
    rng = np.random.default_rng(4)
    for code in encode_instances(blobs(rng, 6)): assert rle_area(code) == rle_decode(code, (64, 64)).sum()


# --- real labels and images

def test_real_airbus_images_are_instances_with_tight_boxes(real_data):
    catalog = read_airbus(real_data/"airbus")
    few = catalog.subset(np.argsort(-catalog.counts, kind="stable")[:6])
    data = VesselDataset(few, None, downsample=RandomDownsample(p=1, factor=(2, 2)))
    for i in range(6):
        image, target = data[i]
        assert image.shape == (3, 384, 384) and len(target["labels"]) == few.counts[i] and torch.equal(target["boxes"], mask_boxes(target["masks"]))
    areas = [rle_area(o) for o in few.objects["rle"]]
    assert areas == few.objects["area"].tolist() and decode_labels(few.rles(0)).max() == few.counts[0]


def test_real_voc_images_have_boxes_only_and_sizes_of_their_own(real_data):
    catalog = read(real_data/"ships_voc")
    assert catalog.objects["rle"].map(is_empty_rle).all()
    data = VesselDataset(fill_boxes(catalog), None, crop=256)
    shapes = {tuple(data[i][0].shape[1:]) for i in range(6)}
    assert all(max(o) <= 256 for o in shapes)


@pytest.mark.skipif(not os.environ.get("SHIPNB_SLOW"), reason="runs the study on another layout, about a minute; SHIPNB_SLOW=1")
def test_the_study_runs_on_boxes_in_the_layout_of_masati(tmp_path):
    from shipnb.files import read_json
    from shipnb.runs import run_notebook
    root = make_voc(tmp_path/"voc", images=12, seed=2)
    record = run_notebook("vessels_maskrcnn", dict(data=str(root), images=0, size=0, warmup=0, crop=96, epochs=1, draws=50), tmp_path/"run")
    assert record["status"] == "finished"
    results = read_json(tmp_path/"run"/"results.json")
    assert results["images"] == 12 and {o.name for o in (tmp_path/"run").iterdir()} >= {"as_labelled", "downsampled"}
