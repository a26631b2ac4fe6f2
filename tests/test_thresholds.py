"""Evidence, surface and operating points against brute force: threshold, label with scipy, remove small components, count."""
import dataclasses
import json
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
from shipnb.thresholds import (EDGES, SCORES, Evidence, ImageEvidence, OperatingPoint, alive, bin_levels, bootstrap_means, choose, collect_evidence, edge_index,
                               image_evidence, image_scores, interval, keep, nearest_edge, pixel_curve, surface, surface_counts, true_labels)

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
