"""Evidence, surface and operating points against brute force: threshold, label with scipy, remove small components, count."""
import dataclasses
import json
import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import precision_score, recall_score

from shipnb import thresholds
from shipnb.metrics import dice, iou, object_counts, object_f2, segmentation_scores
from shipnb.thresholds import (EDGES, IOU_NAMES, SCORE_NAMES, SCORES, SUMS, Evidence, ImageEvidence, OperatingPoint, alive, bin_levels, bootstrap_means, change_areas,
                               choose, collect_evidence, edge_index, image_evidence, image_parts, image_scores, interval, keep, nearest_edge, noise_region, pixel_curve,
                               surface, surface_counts, surface_sums, true_labels)

FLOOR = edge_index(-8)


def blobs(size=64, ships=4, seed=0, ragged=1.0, sea=-10.5):
    """Smooth bumps over touching and separate rectangles, with correlated noise, as a trained model gives."""
    rng, truth = np.random.default_rng(seed), np.zeros((size, size), np.int32)
    for k in range(ships):
        y, x = rng.integers(0, size * 3 // 4, 2)
        truth[y:y + rng.integers(2, size // 6), x:x + rng.integers(4, size // 3)] = k + 1
    glow = cv2.GaussianBlur((truth > 0).astype(np.float32), (0, 0), 1.5)
    texture = cv2.GaussianBlur(rng.normal(0, 1, truth.shape).astype(np.float32), (0, 0), 2) * 6
    return (15 * glow + sea + ragged * texture + rng.normal(0, .05, truth.shape)).astype(np.float32), truth


def touching():
    truth = np.zeros((24, 24), np.int32)
    truth[3:9, 2:20], truth[9:15, 2:20], truth[15:18, 5:9] = 1, 2, 3
    return (cv2.GaussianBlur((truth > 0).astype(np.float32), (0, 0), 1) * 12 - 8 + np.random.default_rng(0).normal(0, .3, truth.shape)).astype(np.float32), truth


def noise(size=24, scale=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, (size, size)).astype(np.float32), (rng.random((size, size)) < .2) * rng.integers(1, 4, (size, size)).astype(np.int32)


def constant(value, size=6, ships=True):
    truth = np.zeros((size, size), np.int32)
    if ships: truth[1:3, 1:5] = 1
    return np.full((size, size), value, np.float32), truth


def holes(*images):
    return [(logits, truth * 0) for logits, truth in images]


CASES = dict(
    blobs=blobs(), smooth=blobs(seed=1, ragged=0), many=blobs(96, 12, seed=2), no_ship=(blobs(seed=3)[0], np.zeros((64, 64), np.int32)), noise=noise(),
    wide_noise=noise(16, 14), edges_only=(EDGES[np.random.default_rng(1).integers(0, 2049, (20, 20))].astype(np.float32), noise(20)[1]),
    few_levels=(np.random.default_rng(2).integers(-9, 3, (24, 24)).astype(np.float32), noise(24)[1]), touching=touching(),
    below=constant(-8.001), at_floor=constant(-8), middle=constant(.3), top=constant(16), beyond=constant(1e30), lowest=constant(-1e30), empty=constant(2, ships=False),
    one_pixel=constant(1, 1, False), one_ship_pixel=(np.array([[.5]], np.float32), np.array([[7]], np.int32)), line=(noise(40)[0][:1], noise(40)[1][:1]))


def brute_counts(logits, truth, edge, min_area):
    """The five counts of one setting, by the definition and with scipy's labelling."""
    labels, n = ndimage.label(logits >= edge, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    kept = np.where(np.isin(labels, [k for k in range(1, n + 1) if sizes[k] >= min_area]), labels, 0)
    n_pred, n_true, hits = object_counts(kept, truth)
    return [int(((kept > 0) & (truth > 0)).sum()), int((kept > 0).sum()), n_pred, int(hits.sum())]


def changing_edges(logits):
    """Edges from the floor up around every level that occurs, and the first and last."""
    levels = np.unique(bin_levels(logits)).astype(int)
    near = np.unique(np.concatenate([levels - 1, levels, levels + 1, [FLOOR, 2048]]))
    return near[(near >= FLOOR) & (near <= 2048)]


@pytest.mark.parametrize("name", CASES)
def test_surface_counts_equal_brute_force_at_every_level(name):
    logits, truth = CASES[name]
    sizes = [0, 1, 2, 3, 7, 30, 10**6]
    table = surface_counts(image_evidence(name, logits, truth), sizes)
    edges = changing_edges(logits)
    if len(edges) > 150: edges = np.sort(np.random.default_rng(0).choice(edges, 150, replace=False))
    for k in edges:
        for j, size in enumerate(sizes): assert table[k - FLOOR, j].tolist() == brute_counts(logits, truth, EDGES[k], size), (EDGES[k], size)


@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(-70, 8)), st.data())
@settings(max_examples=150, deadline=None)
def test_surface_counts_property(values, data):
    """Small maps with many ties around edges, and any labels: equal everywhere, twice over (tree and thresholding)."""
    logits = (values / 8 + data.draw(st.sampled_from([0, 1 / 64, 1 / 100, -1 / 100]))).astype(np.float32)
    truth = data.draw(hnp.arrays(np.int32, values.shape, elements=st.integers(0, 3)))
    record, size = image_evidence("a", logits, truth), data.draw(st.integers(0, 9))
    table = surface_counts(record, [size])
    for k in changing_edges(logits):
        expected = brute_counts(logits, truth, EDGES[k], size)
        assert table[k - FLOOR, 0].tolist() == expected
        nodes = alive(record, EDGES[k]) & (record.area >= size)
        assert [record.overlap[nodes].sum(), record.area[nodes].sum(), nodes.sum()] == expected[:3]


@pytest.mark.parametrize("name", ["blobs", "noise", "touching", "few_levels", "at_floor"])
def test_nodes_are_distinct_components(name):
    """Each node is a component that occurs, no two nodes are the same one, and none is missing."""
    logits, truth = CASES[name]
    record, found = image_evidence(name, logits, truth), set()
    for k in changing_edges(logits):
        labels, n = ndimage.label(logits >= EDGES[k], np.ones((3, 3)))
        found |= {np.flatnonzero(labels.ravel() == i).tobytes() for i in range(1, n + 1)}
        assert sorted(record.area[alive(record, EDGES[k])]) == sorted(np.bincount(labels.ravel())[1:])
    assert len(found) == len(record.level)
    assert (record.parent < np.arange(len(record.parent))).all(), "parents must come first"


def test_scores_of_a_set_equal_the_metrics_module():
    images = [blobs(48, ships, seed) for seed, ships in enumerate([0, 1, 3, 0, 5, 2])] + holes(blobs(48, 2, 9))
    evidence = Evidence((48, 48))
    for i, (logits, truth) in enumerate(images): evidence.add(f"{i}", logits, truth)
    whole = surface(evidence, [0, 4, 25])
    for logit in (-8, -7.828125, -4.59375, -2, 0, .015625, 3):
        for size in (0, 4, 25):
            kept = [keep(o, logit, size) for o, _ in images]
            expected = segmentation_scores(kept, [t for _, t in images])
            got = whole.at(logit, size)
            assert got == pytest.approx({key: expected[key] for key in SCORES}, abs=1e-12), (logit, size)
            table = image_scores(evidence, logit, size)
            assert table.dice.tolist() == [dice(p, t) for p, (_, t) in zip(kept, images)]
            assert table.iou.tolist() == [iou(p, t) for p, (_, t) in zip(kept, images)]
            assert table.f2.tolist() == [object_f2(p, t) for p, (_, t) in zip(kept, images)]
    nothing = segmentation_scores([t * 0 for _, t in images], [t for _, t in images])
    assert {key: whole.baseline[key] for key in SCORES} == pytest.approx({key: nothing[key] for key in SCORES})


def test_pixel_curve_equals_brute_force_and_the_surface():
    images = [blobs(40, ships, seed) for seed, ships in enumerate([0, 1, 3, 0])]
    evidence = Evidence()
    for i, (logits, truth) in enumerate(images): evidence.add(f"{i}", logits, truth)
    curve, whole = pixel_curve(evidence, chunk=3), surface(evidence, [0])
    for key in ("dice", "dice_with", "dice_without", "iou", "pixel_dice"):
        assert np.allclose(curve[key][FLOOR:], getattr(whole, key)[:, 0], rtol=0, atol=1e-12), key
    assert len(curve) == 2049 and curve.logit.tolist() == EDGES.tolist() and np.allclose(curve.threshold, 1 / (1 + np.exp(-EDGES)))
    for k in (0, 300, 700, 1024, 1300, 2048):
        preds, trues = [o >= EDGES[k] for o, _ in images], [t > 0 for _, t in images]
        row, expected = curve.iloc[k], segmentation_scores(preds, trues)
        assert row[["dice", "iou", "pixel_dice"]].tolist() == pytest.approx([expected[o] for o in ("dice", "iou", "pixel_dice")], abs=1e-12)
        flat = [np.concatenate([o.ravel() for o in group]) for group in (trues, preds)]
        assert row.pixel_precision == pytest.approx(precision_score(*flat, zero_division=0) if flat[1].any() else 1)
        assert row.pixel_recall == pytest.approx(recall_score(*flat, zero_division=0))
        per_image = [(1, 1) if not (p.any() or t.any()) else (0, 0) if not (p.any() and t.any()) else
                     (precision_score(t.ravel(), p.ravel()), recall_score(t.ravel(), p.ravel(), zero_division=0)) for p, t in zip(preds, trues)]
        assert (row.precision, row.recall) == pytest.approx(tuple(np.mean(per_image, axis=0)))


@given(hnp.arrays(np.float32, 50, elements=st.floats(-20, 20, width=32)))
@settings(deadline=None)
def test_a_bin_answers_as_its_logits(values):
    levels = bin_levels(values)
    for k in np.unique(np.clip(np.concatenate([levels, levels + 1, levels - 1]), 0, 2048)): assert ((levels >= k) == (values >= EDGES[k])).all()


@given(st.floats(1e-6, 1 - 1e-6))
def test_nearest_edge(threshold):
    logit = nearest_edge(threshold)
    assert EDGES[edge_index(logit)] == logit
    exact = np.log(threshold / (1 - threshold))
    assert abs(logit - exact) <= 1 / 128 + 1e-9
    assert np.float32(logit) == logit


def evidence_of(n=7, size=32, **options):
    evidence = Evidence((size, size), **options)
    for i in range(n):
        logits, truth = blobs(size, i % 4, i)
        evidence.add(f"{i}.jpg", logits, truth, group=None if i % 3 == 0 else f"scene {i % 2}")
    return evidence


def same(a, b):
    fields = [o.name for o in dataclasses.fields(ImageEvidence)]
    return len(a) == len(b) and all(np.array_equal(getattr(x, o), getattr(y, o)) for x, y in zip(a.records, b.records) for o in fields)


@pytest.mark.parametrize("floor", [-8, -16, 2.5])
def test_file_round_trip(tmp_path, floor):
    evidence = evidence_of(floor=floor, data="d" * 64, model="m")
    evidence._append(image_evidence("noise", noise(32, 9)[0], noise(32)[1], floor=floor))
    evidence._append(image_evidence("nothing", np.full((32, 32), -20, np.float32), np.zeros((32, 32), np.int32), floor=floor))
    evidence.save(tmp_path/"e.npz")
    loaded = Evidence.load(tmp_path/"e.npz")
    assert same(loaded, evidence)
    assert (loaded.grid, loaded.floor, loaded.data, loaded.model) == ((32, 32), floor, "d" * 64, "m")
    assert np.array_equal(surface(loaded, [0, 5]).f2, surface(evidence, [0, 5]).f2)
    first = (tmp_path/"e.npz").read_bytes()
    evidence.save(tmp_path/"e.npz")
    assert (tmp_path/"e.npz").read_bytes() == first, "the same evidence must give the same bytes"


def test_empty_and_own_sizes_round_trip(tmp_path):
    Evidence().save(tmp_path/"none.npz")
    assert len(Evidence.load(tmp_path/"none.npz")) == 0
    mixed = Evidence()
    for size in (24, 36): mixed.add(f"{size}", *blobs(size, 1))
    mixed.save(tmp_path/"mixed.npz")
    assert Evidence.load(tmp_path/"mixed.npz").grid is None and same(Evidence.load(tmp_path/"mixed.npz"), mixed)


def test_every_changed_byte_or_cut_is_refused_or_harmless(tmp_path):
    """Flip bytes and cut the file all over: either the same evidence comes back (padding) or a ValueError that names the file."""
    evidence = evidence_of(3)
    evidence.save(tmp_path/"e.npz")
    content, refused = (tmp_path/"e.npz").read_bytes(), 0
    variants = [content[:n] for n in range(0, len(content), len(content) // 25)]
    for place in np.random.default_rng(0).integers(0, len(content), 60):
        variants.append(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1:])
    for bad in variants:
        (tmp_path/"bad.npz").write_bytes(bad)
        try: assert same(Evidence.load(tmp_path/"bad.npz"), evidence)
        except ValueError as error:
            assert "bad.npz is not a whole evidence file" in str(error)
            refused += 1
    assert refused > 60


def test_a_consistent_forgery_is_refused_by_its_checksum(tmp_path):
    """A valid zip with one count changed passes the zip's own checks; the sha256 must catch it."""
    evidence_of(3).save(tmp_path/"e.npz")
    with np.load(tmp_path/"e.npz") as file: arrays = {key: file[key].copy() for key in file.files}
    arrays["own"].flat[0] ^= 1
    np.savez(tmp_path/"forged.npz", **arrays)
    with pytest.raises(ValueError, match="checksum"): Evidence.load(tmp_path/"forged.npz")
    np.savez(tmp_path/"foreign.npz", a=np.arange(3))
    with pytest.raises(ValueError, match="not a whole evidence file"): Evidence.load(tmp_path/"foreign.npz")
    np.savez(tmp_path/"pickle.npz", header=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="not a whole evidence file"): Evidence.load(tmp_path/"pickle.npz")
    header = json.loads(arrays["header"].tobytes()) | {"version": 99}
    np.savez(tmp_path/"newer.npz", **arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    with pytest.raises(ValueError, match="version 99"): Evidence.load(tmp_path/"newer.npz")
    with pytest.raises(FileNotFoundError, match="no evidence file"): Evidence.load(tmp_path/"nothing.npz")


def test_merge_and_subset():
    evidence = evidence_of(6)
    parts = [evidence.subset(o) for o in ([0, 2, 4], np.arange(6) % 2 == 1)]
    merged = parts[0].merge(parts[1])
    assert [o.image for o in merged.records] == ["0.jpg", "2.jpg", "4.jpg", "1.jpg", "3.jpg", "5.jpg"]
    assert np.allclose(surface(merged, [0, 9]).dice, surface(evidence, [0, 9]).dice, atol=1e-12)
    for key, other in dict(grid=Evidence((9, 9)), floor=Evidence((32, 32), floor=-7), data=Evidence((32, 32), data="x"), model=Evidence((32, 32), model="x")).items():
        with pytest.raises(ValueError, match=f"evidence with {key} .* cannot be merged"): evidence.merge(other)
    with pytest.raises(ValueError, match="0.jpg is already in this evidence"): evidence.merge(parts[0])


@pytest.mark.parametrize("logits, labels, words", [
    (np.zeros((4, 4), np.uint8), np.zeros((4, 4), int), "not uint8"),
    (np.zeros((4, 4), np.float16), np.zeros((4, 4), int), "not float16"),
    (np.zeros((4, 4)), np.zeros((4, 4), int), "not float64"),
    (torch.zeros(4, 4, dtype=torch.bfloat16), np.zeros((4, 4), int), "not torch.bfloat16"),
    (np.full((4, 4), np.nan, np.float32), np.zeros((4, 4), int), "16 of its logits are not finite"),
    (np.zeros((4, 4), np.float32), np.zeros((4, 5), int), "differ in shape"),
    (np.zeros((4, 4), np.float32), np.full((4, 4), -1), "at least 0"),
    (np.zeros((4, 4), np.float32), np.zeros((4, 4)), "must be integers"),
    (np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), int), "(1, 4, 4)"),
])
def test_wrong_maps_are_refused_by_name(logits, labels, words):
    with pytest.raises(ValueError) as caught: Evidence().add("x.jpg", logits, labels)
    assert words in str(caught.value) and "image x.jpg" in str(caught.value)


def test_labels_without_pixels_are_no_objects():
    logits, truth = touching()
    assert image_evidence("a", logits, truth * 50).object_areas.tolist() == image_evidence("a", logits, truth).object_areas.tolist()


def test_size_rules_are_inclusive():
    logits = np.full((5, 5), -9, np.float32)
    logits[1, 1:4] = 0
    evidence = Evidence()
    evidence.add("a", logits, np.zeros((5, 5), int))
    whole = surface(evidence, [3, 4])
    assert [whole.at(0, 3)["false_alarm"], whole.at(0, 4)["false_alarm"], whole.at(1 / 64, 3)["false_alarm"]] == [1, 0, 0]


def test_bootstrap_equals_a_loop_and_resamples_groups():
    rng = np.random.default_rng(0)
    values, groups = np.append(rng.random(19), np.nan), rng.integers(0, 6, 20)
    names = np.unique(groups)
    loop = []
    for times in np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), 300):
        loop.append(np.nanmean(np.concatenate([np.repeat(values[groups == g], t) for g, t in zip(names, times)])))
    assert np.allclose(bootstrap_means(values, groups, 300, 5), loop)
    assert interval(bootstrap_means(np.full(4, .5), np.arange(4))) == (.5, .5)
    assert np.isnan(bootstrap_means([1, np.nan], ["a", "b"], 200)).any(), "a resample without a value has no mean"


def test_chosen_point_is_the_middle_of_the_best_plateau():
    """One bright ship, sea at -3: every edge in (-3, 5] is perfect, so the middle is about 1."""
    truth = np.zeros((16, 16), np.int32)
    truth[4:8, 4:12] = 1
    evidence = Evidence((16, 16))
    for i in range(6): evidence.add(f"{i}", np.where(truth > 0, 5, -3).astype(np.float32) if i % 2 else np.full((16, 16), -3, np.float32), truth * (i % 2))
    for objective in ("dice", "dice_with", "f2", "iou"):
        point = choose(surface(evidence, [0, 8]), objective)
        assert (point.logit, point.score, point.interval, point.plateau) == (1.0, 1, (1, 1), (-3 + 1 / 64, 5)), objective
        assert point.min_area == 0 and point.grid == (16, 16) and point.unit == "image" and point.n_with == 3
        assert point.baseline == (0 if objective == "dice_with" else .5)


def test_choice_is_the_best_allowed_setting_up_to_a_tenth_of_its_error():
    evidence = Evidence((48, 48))
    for i in range(14): evidence.add(f"{i}", *blobs(48, i % 3, i, ragged=2, sea=-5), group=str(i // 2))
    whole = surface(evidence, [0, 6, 20])
    free = choose(whole, "dice_with")
    assert free.score >= whole.dice_with.max() - .01 and free.unit == "group"
    bound = (whole.false_alarm.min() + whole.at(free.logit, free.min_area)["false_alarm"]) / 2
    tight = choose(whole, "dice_with", max_false_alarm=bound)
    assert tight.false_alarm <= bound < free.false_alarm and tight.score <= free.score
    assert tight.score >= whole.dice_with[whole.false_alarm <= bound].max() - .02
    assert choose(whole, "dice_with") == free, "the same seed must give the same point"


def test_a_minimum_area_that_gains_nothing_is_not_chosen():
    """Removing specks below 30 pixels changes no score here, so the smallest size wins; where specks cost, it does not."""
    clean, specks = Evidence(), Evidence()
    for i in range(8):
        logits = np.full((20, 20), -6, np.float32)
        truth = np.zeros((20, 20), np.int32)
        if i % 2: truth[5:11, 5:11] = 1
        logits[truth > 0] = 4
        clean.add(f"{i}", logits, truth)
        logits = logits.copy()
        logits[15, 15:18] = 5
        specks.add(f"{i}", logits, truth)
    assert choose(surface(clean, [0, 2, 30]), "dice").min_area == 0
    assert choose(surface(specks, [0, 4, 30]), "dice").min_area == 4


def test_choose_errors():
    whole = surface(evidence_of(6), [0])
    with pytest.raises(ValueError, match="none of dice"): choose(whole, "accuracy")
    with pytest.raises(ValueError, match="leave it None"): choose(surface(whole.evidence.subset(whole.evidence.counts > 0), [0]), max_false_alarm=.1)
    with pytest.raises(ValueError, match="no image counts"): choose(surface(whole.evidence.subset(whole.evidence.counts == 0), [0]), "dice_with")
    loud = Evidence()
    loud.add("a", np.full((4, 4), 20, np.float32), np.zeros((4, 4), int))
    with pytest.raises(ValueError, match="the least is 100%"): choose(surface(loud, [0]), max_false_alarm=.5)


@pytest.mark.parametrize("point", [OperatingPoint(0.0), OperatingPoint.at(4e-4, 12, (768, 768)), OperatingPoint(1.5, 3, (2, 2), "dice", .5, (.1, float("nan")), .2)])
def test_operating_point_round_trip(point):
    text = json.dumps(point.to_dict(), allow_nan=False)
    again = OperatingPoint.from_dict(json.loads(text))
    assert (again.logit, again.min_area, again.grid, again.threshold) == (point.logit, point.min_area, point.grid, point.threshold)
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    logits, _ = touching()
    assert np.array_equal(point.keep(logits), keep(logits, point.logit, point.min_area))


@pytest.mark.parametrize("values, words", [(dict(logit=.01), "no bin edge"), (dict(min_area=3), "no logit"), (dict(logit=0., min_area=1.5), "whole number"),
                                           (dict(logit=0., door=.5), "unknown"), (dict(logit=0., gate=.01), "no bin edge"), (dict(logit=0., gate_slope=1.), "floor"), (dict(logit=0., total_area=-1), "whole number"), (dict(logit=0., threshold=.6), "is not that of logit"), (dict(logit=17.), "no bin edge")])
def test_operating_point_refuses(values, words):
    with pytest.raises(ValueError, match=words): OperatingPoint.from_dict(values)


def test_keep_equals_scipy():
    for name, (logits, truth) in CASES.items():
        for logit, size in ((-8, 0), (-1, 3), (0, 12)):
            labels = keep(logits, logit, size)
            other, n = ndimage.label(logits >= logit, np.ones((3, 3)))
            areas = np.bincount(other.ravel(), minlength=n + 1)[1:]
            assert sorted(np.bincount(labels.ravel(), minlength=1)[1:]) == sorted(areas[areas >= size]), name
            assert set(np.unique(labels)) - {0} == set(range(1, labels.max() + 1))


def test_true_labels_on_a_smaller_grid():
    from shipnb.masks import encode_instances, render_mask
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = np.zeros((40, 60), np.int32)
        for k in range(rng.integers(1, 6)):
            y, x = rng.integers(0, 35), rng.integers(0, 50)
            truth[y:y + rng.integers(1, 8), x:x + rng.integers(1, 12)] = k + 1
        rles = [o for o in encode_instances(truth) if o]
        labels = true_labels(rles, (40, 60), (10, 20))
        assert np.array_equal(labels > 0, render_mask(rles, (40, 60), (10, 20)) > 0)
        assert labels.max() <= len(rles) and labels.dtype == np.int32
        largest = np.argmax([len(np.flatnonzero(truth == k + 1)) for k in range(truth.max())])
        assert len(rles) != truth.max() or (labels == largest + 1).any(), "the largest ship has lost all its pixels"
    assert np.array_equal(true_labels(rles, (40, 60), (40, 60)) > 0, truth > 0)


class FakeCatalog:
    """Four images whose brightness is the logit."""

    def __init__(self, shapes):
        import pandas as pd
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 255, (*shape, 3), np.uint8) for shape in shapes]
        self.images = pd.DataFrame(dict(image=[f"{i}.jpg" for i in range(len(shapes))], group=["s", "", "s", float("nan")][:len(shapes)]))

    def __len__(self): return len(self.pictures)
    def shape(self, i): return self.pictures[i].shape[:2]
    def read_image(self, i): return self.pictures[i]
    def rles(self, i): return ["2 3"] if i % 2 else []
    def fingerprint(self): return "fingerprint"


class Mean(torch.nn.Module):
    """Twice the mean of the channels, as a logit; notes the precision it ran in."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.))

    def forward(self, x):
        assert not self.training and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return (x @ torch.eye(x.shape[-1])).mean(1, keepdim=True) * self.weight


def test_collect_evidence_equals_doing_it_by_hand():
    catalog, model = FakeCatalog([(24, 36)] * 4), Mean()
    with torch.autocast("cpu", torch.bfloat16): evidence = collect_evidence(model, catalog, (12, 12), batch_size=3, model_hash="m")
    assert model.training and (evidence.data, evidence.model, evidence.grid) == ("fingerprint", "m", (24, 36))
    assert [o.group for o in evidence.records] == ["s", None, "s", None] and evidence.counts.tolist() == [0, 1, 0, 1]
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    for i, record in enumerate(evidence.records):
        small = cv2.resize(catalog.read_image(i), (12, 12), interpolation=cv2.INTER_AREA)
        z = 2 * ((torch.as_tensor(small) / 255 - mean) / std).mean(-1)
        z = torch.nn.functional.interpolate(z[None, None], size=(24, 36), mode="bilinear", align_corners=False)[0, 0]
        far = (z * 64 - (z * 64).round()).abs() > 1e-3   # rounding may decide a pixel that lies on an edge
        counts = np.bincount(bin_levels(z.numpy()).ravel() + 1, minlength=2050)
        assert np.abs(counts - record.object_counts - record.background_counts).sum() <= 2 * int((~far).sum())


def test_collect_evidence_on_mixed_sizes_and_a_smaller_grid():
    catalog = FakeCatalog([(24, 36), (20, 20), (24, 36)])
    assert collect_evidence(Mean(), catalog, (12, 12)).grid is None
    small = collect_evidence(Mean(), catalog, (12, 12), grid=(8, 8))
    assert small.grid == (8, 8) and {(o.height, o.width) for o in small.records} == {(8, 8)}
    with pytest.raises(ValueError, match="float32"): collect_evidence(Mean().to(torch.bfloat16), catalog, (12, 12))


def test_numba_cache_goes_beside_the_module_or_nowhere(tmp_path):
    assert thresholds._cache_beside(str(tmp_path/"missing.py")) is False and thresholds._cache_beside(None) is False
    (tmp_path/"module.py").write_text("")
    assert thresholds._cache_beside(str(tmp_path/"module.py")) is True


def test_without_a_place_for_the_cache_the_kernels_still_work(monkeypatch):
    monkeypatch.setattr(thresholds, "_cache_beside", lambda file: False)
    assert thresholds._jit(lambda a: a + 1)(2) == 3
    assert type(thresholds._jit(lambda a: a)._cache).__name__ == "NullCache"


def test_speed_and_size_at_256():
    """Generous bounds (about ten times what is measured on an idle core), so that only a change of order fails."""
    maps = [blobs(256, 6, seed, sea=-10.5) for seed in range(6)]
    image_evidence("warm", *maps[0])
    start = time.process_time()
    evidence = Evidence((256, 256))
    for i, pair in enumerate(maps): evidence.add(str(i), *pair)
    assert (time.process_time() - start) / len(maps) < .1
    start = time.process_time()
    surface(evidence, [0, 4, 8, 16, 32, 64])
    assert (time.process_time() - start) / len(maps) < .1


# every minimum area at once

def brute_sums(images, edge, min_area, total_area=0, shifts=None, floor=FLOOR):
    """The sums of one setting: threshold, label with scipy, drop, score with 12_metrics, round to 2^-44, add Python integers."""
    out = dict.fromkeys(SUMS + IOU_NAMES, 0)
    for i, (logits, truth) in enumerate(images):
        k = min(max(edge - (shifts[i] if shifts is not None else 0), floor), 2048)
        labels, n = ndimage.label(logits >= EDGES[k], np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=n + 1)
        kept = np.where(np.isin(labels, [c for c in range(1, n + 1) if sizes[c] >= min_area]) & (sizes[1:].sum() >= total_area), labels, 0)
        n_pred, n_true, hits = object_counts(kept, truth)
        overlap, pred, true = int(((kept > 0) & (truth > 0)).sum()), int((kept > 0).sum()), int((truth > 0).sum())
        fixed = lambda value: round(float(value) * 2**44)
        if n_true:
            out["dice"] += fixed(dice(kept > 0, truth > 0))
            out["iou"] += fixed(iou(kept > 0, truth > 0))
            out["precision"] += fixed(overlap / pred if pred else 0)
            out["recall"] += fixed(overlap / true)
            out["f2"] += fixed(object_f2(kept, truth))
            for name, hit in zip(IOU_NAMES, hits.tolist()): out[name] += fixed(5 * hit / (5 * hit + 4 * (n_true - hit) + (n_pred - hit)))
        else: out["alarms"] += int(pred > 0)
        for key, value in dict(overlap=overlap, pred_area=pred, n_pred=n_pred, found=int(hits[0]), hits=int(hits.sum())).items(): out[key] += value
    return out


def half():
    """IoU exactly 0.5 (no hit) in the upper ship, just above in the lower; two components of equal area; a hole in the levels."""
    truth, logits = np.zeros((12, 16), np.int32), np.full((12, 16), -12, np.float32)
    truth[1, 1:5], truth[6, 1:6] = 1, 2
    logits[1, 1:3], logits[6, 1:4], logits[9, 1:3], logits[9, 6:9] = 2, 2, 2, 1
    return logits, truth


EVERY = dict(mixed=[CASES[o] for o in ("touching", "few_levels", "at_floor", "empty", "one_pixel", "one_ship_pixel", "beyond", "lowest")] + [half()],
             blobs=[blobs(40, n, n) for n in (0, 1, 4)] + holes(blobs(40, 2, 8)), noise=[noise(18), noise(14, 9, 3), (noise(12)[0], np.zeros((12, 12), np.int32))])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("total_area, shifted", [(0, False), (9, False), (3, True)])
def test_every_edge_and_every_minimum_area_equals_brute_force_bit_for_bit(name, total_area, shifted):
    images = EVERY[name]
    evidence, rng = Evidence(), np.random.default_rng(0)
    for i, pair in enumerate(images): evidence.add(str(i), *pair)
    shifts = rng.integers(-300, 300, len(images)) if shifted else None
    sizes = change_areas(evidence)
    sums = surface_sums(evidence.records, sizes, -8, total_area, 0 if shifts is None else shifts, per_iou=True)
    edges = np.unique(np.clip(np.concatenate([changing_edges(o) + s for (o, _), s in zip(images, shifts if shifted else [0] * len(images))]), FLOOR, 2048))
    for k in rng.choice(edges, min(25, len(edges)), replace=False):
        for m in {0, 1, 2, 3, *rng.choice(sizes, 3).tolist(), *(rng.choice(sizes, 2) + 1).tolist()}:
            j = np.searchsorted(sizes, m)   # the smallest change of at least m; beyond the last nothing is kept
            got = {key: int(value[k - FLOOR, j]) if j < len(sizes) else 0 for key, value in sums.items()}
            assert got == brute_sums(images, int(k), m, total_area, shifts), (EDGES[k], m)
    assert sums["pred_area"][:, -1].max() == 0 and sizes[0] == 0


def test_the_sums_do_not_depend_on_order_threads_or_blocks():
    evidence = evidence_of(9)
    sizes = change_areas(evidence)
    whole = surface_sums(evidence.records, sizes, workers=1)
    parts = [surface_sums([evidence.records[i] for i in o], sizes, workers=3) for o in ([8, 2, 5], [0, 7, 1, 3, 4, 6])]
    for key, value in whole.items(): assert np.array_equal(value, parts[0][key] + parts[1][key]), key


def test_iou_of_exactly_one_half_is_no_hit():
    logits, truth = half()
    evidence = Evidence()
    evidence.add("a", logits, truth)
    assert image_scores(evidence, 2, 0).found.item() == 1 and image_scores(evidence, 2, 0).hits.item() == 2   # IoU 3/5: 0.50, 0.55
    whole = surface(evidence, [0, 2, 3], per_iou=True)
    assert whole.at(2, 0, ["f2_50", "f2_60"]) == pytest.approx({"f2_50": 5 / (5 + 4 + 2), "f2_60": 0}) and whole.at(2, 3, ["object_precision"]) == {"object_precision": 1}


def test_scores_with_and_without_ships_and_over_the_set():
    images = [blobs(40, ships, seed) for seed, ships in enumerate([0, 2, 3, 0, 1])]
    evidence = Evidence()
    for i, pair in enumerate(images): evidence.add(str(i), *pair)
    whole, has = surface(evidence, [0, 6], per_iou=True), evidence.counts > 0
    for logit in (-7, -2, 1, 16):
        table = image_scores(evidence, logit, 6)
        at = whole.at(logit, 6, SCORE_NAMES)
        for key in ("dice", "iou", "precision", "recall", "f2"):
            for kind, rows in (("", slice(None)), ("_with", has), ("_without", ~has)): assert at[key + kind] == pytest.approx(table[key][rows].mean(), abs=1e-12), key + kind
        kept, trues = [keep(o, logit, 6) for o, _ in images], [t for _, t in images]
        flat, true = (np.concatenate([o.ravel() for o in group]) > 0 for group in (kept, trues))
        assert at["pixel_precision"] == pytest.approx(precision_score(true, flat, zero_division=1)) and at["pixel_recall"] == pytest.approx(recall_score(true, flat))
        assert at["pixel_iou"] == pytest.approx((flat & true).sum() / (flat | true).sum())
        counts = [object_counts(p, t) for p, t in zip(kept, trues)]
        n_pred, n_true, found = (sum(o) for o in zip(*((a, b, h[0]) for a, b, h in counts)))
        assert at["object_recall"] == found / n_true and at["object_precision"] == (found / n_pred if n_pred else 1)
        assert whole.score("cost", (2, 5))[edge_index(logit) - FLOOR, 1] == pytest.approx((2 * (n_pred - found) + 5 * (n_true - found)) / 5)
        assert np.mean([at[o] for o in IOU_NAMES]) == pytest.approx(at["f2"], abs=1e-12)


# the file under attack

def forged(path, evidence, change):
    """Write an evidence file whose arrays and header `change` altered, with a checksum that fits."""
    evidence.save(path)
    with np.load(path) as file: arrays = {key: file[key].copy() for key in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    header["sha256"] = thresholds._digest(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def poke(name, place, value):
    def change(header, arrays): arrays[name][0, place] = value
    return change


FORGERIES = dict(
    cyclic_parents=poke("back", 3, 200), root_in_its_own_past=poke("back", 0, 1), level_not_above=poke("gap", 1, 0), area_of_zero=poke("own", 0, 0), more_area=poke("own", 2, 99),
    more_overlap=poke("own_overlap", 0, 77), foreign_object=poke("match", 1, 9), histogram=poke("object_counts", 900, 5), object_area=poke("object_areas", 0, 1), height=poke("sizes", 0, 31),
    images=lambda h, a: h["images"].pop(), twice=lambda h, a: h["images"].__setitem__(1, h["images"][0]), no_text=lambda h, a: h["images"].__setitem__(1, 5), group=lambda h, a: h["groups"].__setitem__(0, 5),
    gate=lambda h, a: h["gates"].__setitem__(0, "high"), grid=lambda h, a: h.update(grid=[0, -1]), grid_text=lambda h, a: h.update(grid="ab"), floor=lambda h, a: h.update(floor=.3), floor_list=lambda h, a: h.update(floor=[1]),
    no_floor=lambda h, a: h.pop("floor"), no_image=lambda h, a: h.update(images=None), data=lambda h, a: h.update(data=None), short=lambda h, a: a.update(own=a["own"][:, :-1]), planes=lambda h, a: a.update(own=np.vstack([a["own"]] * 3)),
    negative=lambda h, a: a.update(own=a["own"].astype(np.int64) - 50), floats=lambda h, a: a.update(own=a["own"] * .5), flat=lambda h, a: a.update(gap=a["gap"].ravel()), huge=lambda h, a: a.update(own=np.vstack([a["own"][:1]] * 8) | 255),
    extra=lambda h, a: a.update(more=np.zeros(3, np.uint8)), missing=lambda h, a: a.pop("match"), list_header=None, deep_header=None, pickled=None)


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_with_a_right_checksum_is_refused_in_one_sentence(tmp_path, name):
    evidence, path = evidence_of(4), tmp_path/"forged.npz"
    if FORGERIES[name]: forged(path, evidence, FORGERIES[name])
    else:
        evidence.save(path)
        with np.load(path) as file: arrays = {key: file[key] for key in file.files}
        header = dict(list_header=b"[1, 2]", deep_header=b"[" * 100_000, pickled=None)[name]
        np.savez(path, **arrays | {"header": np.frombuffer(header, np.uint8) if header else np.array([dict(a=1)], object)})
    with pytest.raises(ValueError, match="forged.npz is not a whole evidence file") as caught: Evidence.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_a_file_claims_is_looked_at_before_it_is_unpacked(tmp_path, monkeypatch):
    """A bomb of zeros, and a header that promises a terabyte: refused without the memory."""
    import tracemalloc, zipfile
    evidence_of(2).save(tmp_path/"good.npz")
    with zipfile.ZipFile(tmp_path/"good.npz") as old, zipfile.ZipFile(tmp_path/"bomb.npz", "w", zipfile.ZIP_DEFLATED) as new:
        for o in old.namelist():
            if o != "own.npy": new.writestr(o, old.read(o))
        with new.open("own.npy", "w", force_zip64=True) as f:
            for _ in range(40): f.write(bytes(2**20))
    with zipfile.ZipFile(tmp_path/"good.npz") as old, zipfile.ZipFile(tmp_path/"boast.npz", "w") as new:
        for o in old.namelist():
            content = old.read(o)
            if o == "own.npy": content = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1099511627776), }".ljust(117) + b"\n" + bytes(9)
            new.writestr(o, content)
    monkeypatch.setattr(thresholds, "MAX_UNPACKED", 30 * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="unpacks to .* bytes, and at most"): Evidence.load(tmp_path/"bomb.npz")
    with pytest.raises(ValueError, match="boast.npz is not a whole evidence file"): Evidence.load(tmp_path/"boast.npz")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_single_bits_of_the_directory_and_headers(tmp_path):
    """Every bit of the last 400 bytes and the first 150 (zip headers, method, flags, sizes): the same evidence or one clear error."""
    evidence = evidence_of(2)
    evidence.save(tmp_path/"e.npz")
    content = (tmp_path/"e.npz").read_bytes()
    for place in [*range(0, 150), *range(len(content) - 400, len(content))]:
        bad = bytearray(content)
        bad[place] ^= 1 << place % 8
        (tmp_path/"bad.npz").write_bytes(bad)
        try: assert same(Evidence.load(tmp_path/"bad.npz"), evidence)
        except ValueError as error: assert "bad.npz is not a whole evidence file" in str(error)


def test_shards_in_any_order_are_the_file_of_the_whole_pass(tmp_path):
    evidence = evidence_of(7, data="d", model="m").with_gates(np.linspace(-3, 3, 7), "g")
    evidence.save(tmp_path/"whole.npz")
    shards, names = [evidence.subset(o) for o in ([6, 0], [3], [1, 5, 2, 4])], [o.image for o in evidence.records]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        a, b, c = (shards[i] for i in order)
        a.merge(b, c).in_order(names).save(tmp_path/"merged.npz")
        assert (tmp_path/"merged.npz").read_bytes() == (tmp_path/"whole.npz").read_bytes()
    assert Evidence.load(tmp_path/"whole.npz").gates.tolist() == evidence.gates.tolist() and Evidence.load(tmp_path/"whole.npz").gate_model == "g"
    with pytest.raises(ValueError, match="2 images are not in both"): shards[0].merge(shards[2]).in_order([*names, "new.jpg"])
    with pytest.raises(ValueError, match="comes twice"): evidence.in_order(names + names[:1])
    with pytest.raises(ValueError, match="gate_model"): evidence.merge(evidence_of(0, data="d", model="m"))


# noise

def test_noise_region_is_the_paired_bootstrap(monkeypatch):
    evidence = Evidence((48, 48))
    for i in range(14): evidence.add(f"{i}", *blobs(48, i % 3, i, ragged=2, sea=-5), group=str(i // 2))
    whole, rng = surface(evidence, [0, 6, 20]), np.random.default_rng(0)
    for objective, prices in (("dice_with", None), ("object_recall", None), ("pixel_dice", None), ("cost", (1, 3))):
        region = noise_region(whole, objective, prices=prices)
        assert region.inside[region.best] and region.below.min() >= -1e-12 and region.error[region.best] == 0
        parts = lambda k, j, objective=objective, prices=prices: image_parts(image_scores(evidence, whole.logits[k], whole.min_areas[j]), objective, prices)
        for k, j in zip(rng.integers(0, 1300, 6), rng.integers(0, 3, 6)):
            (a, b), (c, d) = parts(*region.best), parts(k, j)
            sign = -1 if objective == "cost" else 1
            assert region.below[k, j] == pytest.approx(sign * (a.sum() / b.sum() - c.sum() / d.sum()), abs=1e-9)
            groups = np.unique(evidence.groups.astype(str), return_inverse=True)[1]
            a, b, c, d = (np.bincount(groups, o) for o in (a, b, c, d))
            terms = (a - a.sum() / b.sum() * b) / b.sum() - (c - c.sum() / d.sum() * d) / d.sum()
            assert region.error[k, j] == pytest.approx(np.sqrt((terms**2).sum()), abs=1e-9)
        assert np.array_equal(region.inside, region.below <= 1.96 * region.error)


def test_recall_at_a_precision_and_cost_are_the_best_allowed():
    evidence = Evidence((48, 48))
    for i in range(14): evidence.add(f"{i}", *blobs(48, i % 3, i, ragged=2, sea=-5), group=str(i // 2))
    whole = surface(evidence, [0, 6, 20])
    for name in ("object", "pixel"):
        point = choose(whole, f"{name}_recall", min_precision=.6, draws=200)
        allowed = whole.score(f"{name}_precision") >= .6
        assert whole.at(point.logit, point.min_area, [f"{name}_precision"])[f"{name}_precision"] >= .6
        assert whole.score(f"{name}_recall")[allowed].max() - point.score <= .03 and point.min_precision == .6
    costs = [choose(whole, "cost", prices=(1, o), draws=200) for o in (.1, 30)]
    for point in costs: assert point.score <= whole.score("cost", point.prices).min() + .1
    assert costs[1].logit < costs[0].logit and OperatingPoint.from_dict(costs[0].to_dict()) == costs[0]
    with pytest.raises(ValueError, match="precision of 200%"): choose(whole, "object_recall", min_precision=2)


# --- ten thousand images

MEMORY = """
import dataclasses, json, resource, sys
from shipnb.thresholds import Evidence, surface
high = lambda: int(next(o for o in open("/proc/self/status") if o.startswith("VmHWM")).split()[1]) / 1e6
before = high()
evidence = Evidence.load(sys.argv[1])
whole = surface(evidence, (0, 8, 16, 32, 64))
print(json.dumps(dict(images=len(evidence), nodes=float(evidence.table().nodes.mean()), before=before, peak=high(), best=float(whole.dice.max()))))
"""


@pytest.mark.skipif("SHIPNB_SLOW" not in os.environ, reason="SHIPNB_SLOW is not set: making and reading 10,000 images takes half a minute")
def test_ten_thousand_images_fit_in_two_gigabytes(tmp_path):
    rng, evidence, labels = np.random.default_rng(0), Evidence((256, 256)), np.zeros((256, 256), np.int32)
    labels[100:110, 60:100], labels[30:38, 200:220] = 1, 2
    for k in range(20):     # a glow over the ships and smooth noise: as many components as real maps have
        noise = cv2.GaussianBlur(rng.normal(0, 1, labels.shape).astype(np.float32), (0, 0), 3)
        evidence.add(f"{k}.jpg", (14 * cv2.GaussianBlur((labels > 0).astype(np.float32), (0, 0), 2) - 10 + 6 * noise).astype(np.float32), labels)
    many = Evidence(evidence.grid, records=[dataclasses.replace(evidence.records[k % 20], image=f"{k}.jpg") for k in range(10_000)])
    many.save(tmp_path/"many.npz")
    said = subprocess.run([sys.executable, "-c", MEMORY, tmp_path/"many.npz"], capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    print(found)
    assert found["images"] == 10_000 and found["nodes"] > 500 and found["peak"] - found["before"] < 2.0, found
