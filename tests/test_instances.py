"""Splitting touching ships: what must always hold, and independent ways to the same parts; oriented boxes against brute force."""
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from shipnb.eda import ship_geometry
from shipnb.instances import (SPLITTERS, boxes_from_corners, normal_boxes, oriented_boxes, pieces, renumber, split_contour, split_distance, split_erosion,
                              split_ships)
from shipnb.masks import encode_instances, label_instances
from shipnb.metrics import oriented_corners, oriented_iou

EIGHT = np.ones((3, 3))


def blobs(seed, side=48):
    """A label image of overlapping discs and bars, cut at random into labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for k in range(int(rng.integers(1, 9))):
        cy, cx, a, b, t = *rng.uniform(0, side, 2), rng.uniform(2, 14), rng.uniform(1, 6), rng.uniform(0, math.pi)
        u, v = (x - cx) * math.cos(t) + (y - cy) * math.sin(t), (y - cy) * math.cos(t) - (x - cx) * math.sin(t)
        labels[(u / a) ** 2 + (v / b) ** 2 <= 1] = k + 1 if rng.random() < .3 else 1
    return labels, rng


def ways(labels, rng):
    """Every splitter with some settings, on one label image."""
    contour = ndimage.gaussian_filter(rng.random(labels.shape), 1) * 2 - .5
    area = int(rng.choice([1, 4, 16]))
    yield "none", split_ships(labels)
    yield "distance", split_distance(labels, float(rng.choice([.4, .617, .9])), area)
    yield "contour", split_contour(labels, contour, .5, area)
    yield "minor", split_erosion(labels, "minor", .8, area)
    yield "major", split_erosion(labels, "major", .5, area)


def check(labels, out):
    """The rules that 14_instances states for every splitter."""
    assert out.dtype == np.int32 and ((out > 0) == (labels > 0)).all(), "pixels are lost or won"
    parents = np.unique(np.stack([out[out > 0], labels[out > 0]]), axis=1)
    assert len(np.unique(parents[0])) == parents.shape[1], "a part reaches over two labels"
    before = sum(ndimage.label(labels == o, EIGHT)[1] for o in np.unique(labels[labels > 0]))
    assert out.max(initial=0) >= before, "fewer labels than components"
    for k in range(1, out.max(initial=0) + 1): assert ndimage.label(out == k, EIGHT)[1] == 1, f"label {k} is not one piece"
    assert (renumber(out) == out).all()


def test_the_rules_hold_on_many_blobs():
    split = dict.fromkeys(["none", "distance", "contour", "minor", "major"], 0)
    for seed in range(60):
        labels, rng = blobs(seed)
        for name, out in ways(labels, rng):
            check(labels, out)
            split[name] += int(out.max() > pieces(labels).max())
    assert split.pop("none") == 0 and all(o >= 3 for o in split.values()), f"every way must split something here: {split}"


@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 3)))
@settings(max_examples=60, deadline=None)
def test_the_rules_hold_on_noise(labels):
    for _, out in ways(labels, np.random.default_rng(int(labels.sum()))): check(labels, out)


@pytest.mark.parametrize("seed", range(8))
def test_numbers_that_come_in_do_not_matter_and_runs_agree(seed):
    labels, _ = blobs(seed)
    order = np.append(0, np.random.default_rng(seed).permutation(np.arange(1, labels.max() + 1)) * 70_001)
    for (name, a), (_, b), (_, again) in zip(*(ways(o, np.random.default_rng(5)) for o in (labels, order[labels], labels))):
        assert (a == b).all(), f"{name} depends on the numbers"
        assert (a == again).all()


def test_renumber_and_pieces_against_plain_loops():
    for seed in range(12):
        labels = blobs(seed)[0] * 5
        seen = list(dict.fromkeys(labels[labels > 0].tolist()))
        assert renumber(labels).tolist() == [[seen.index(o) + 1 if o else 0 for o in line] for line in labels.tolist()]
        parts, n = np.zeros_like(labels), 0
        for o in seen:
            found, count = ndimage.label(labels == o, EIGHT)
            parts, n = np.where(found, found + n, parts), n + count
        assert (pieces(labels) == renumber(parts)).all()
    assert pieces(np.zeros((0, 5), int)).shape == (0, 5) and renumber(np.zeros((3, 0), int)).shape == (3, 0)


def summits(mask, neck):
    """How many summits of the distance stand out by the ratio: pixels from the highest down, components joined at their saddles."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))
    places = sorted(map(tuple, np.argwhere(distance > 0)), key=lambda o: -distance[o])
    owner, peak, count = {}, {}, 0

    def root(o):
        while owner[o] != o: o = owner[o]
        return o

    for p in places:
        owner[p], peak[p] = p, distance[p]
        for q in [(p[0] + dy, p[1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]:
            if q not in owner: continue
            a, b = root(p), root(q)
            if a == b: continue
            low, high = sorted((a, b), key=lambda o: peak[o])
            count += distance[p] / peak[low] < neck - 1e-9 and low != p
            owner[low] = high
    return count + 1


def test_the_neck_rule_equals_joining_from_the_summits_down():
    seen = []
    for seed in range(60):
        mask, n = label_instances(blobs(seed)[0] > 0)
        for k in range(1, n + 1):
            part = mask == k
            expected = summits(part, .617) if ndimage.distance_transform_edt(np.pad(part, 1)).max() >= 1.5 else 1
            seen.append(int(split_distance(part.astype(int), .617, 1).max()))
            assert seen[-1] == expected, (seed, k)
    assert max(seen) > 2 and seen.count(1) > 20


def hull(shape, box):
    """Pixels whose centres lie in an ellipse of an oriented box's size."""
    y, x = np.mgrid[:shape[0], :shape[1]] + .5
    t = math.radians(box[4])
    u, v = (x - box[0]) * math.cos(t) - (y - box[1]) * math.sin(t), (x - box[0]) * math.sin(t) + (y - box[1]) * math.cos(t)
    return (2 * u / box[2]) ** 2 + (2 * v / box[3]) ** 2 <= 1


@pytest.mark.parametrize("angle", range(0, 180, 15))
def test_two_ships_bow_to_stern_come_apart_and_one_stays_whole(angle):
    t = math.radians(angle)
    ends = [(70 + s * 29 * math.cos(t), 70 - s * 29 * math.sin(t), 62, 15, angle) for s in (-1, 1)]
    ships = [hull((140, 140), o) for o in ends]
    mask = ships[0] | ships[1]
    assert label_instances(mask)[1] == 1
    for out in (split_distance(mask.astype(int)), split_erosion(mask.astype(int), "minor")):
        assert out.max() == 2 and all((out[o] == k).mean() > .85 for o in ships for k in [np.bincount(out[o & ~(ships[0] & ships[1])]).argmax()])
    for one in ships:
        assert split_distance(one.astype(int)).max() == split_erosion(one.astype(int), "minor").max() == split_erosion(one.astype(int), "major").max() == 1


def test_contour_parts_follow_the_line_and_small_parts_join_the_others():
    mask = np.ones((20, 30), int)
    contour = np.zeros(mask.shape)
    contour[:, 12] = 1
    out = split_contour(mask, contour)
    assert out.max() == 2 and (out[:, :12] == 1).all() and (out[:, 13:] == 2).all()
    contour[3, :] = 1                                             # a strip of 36 and one of 51 pixels on top
    assert split_contour(mask, contour, min_area=1).max() == 4
    assert split_contour(mask, contour, min_area=100).max() == 2
    assert split_contour(mask, contour, min_area=400).max() == 1


def test_empty_images_and_unknown_names():
    for labels in (np.zeros((5, 6), int), np.zeros((0, 6), int)):
        for name in SPLITTERS: assert split_ships(labels, name, **(dict(contour=np.zeros(labels.shape)) if name == "contour" else {})).max(initial=0) == 0
    for call, words in [(lambda: split_ships(np.zeros((2, 2), int), "x"), "how is one of"), (lambda: split_distance(np.zeros((2, 2))), "holds integers"),
                        (lambda: split_contour(np.ones((2, 2), int), np.ones((2, 3))), "the contour has the shape"), (lambda: split_erosion(np.ones((2, 2), int), share=1), "between 0 and 1")]:
        with pytest.raises(ValueError, match=words): call()


# --- oriented boxes

def smallest_area(points):
    """Area of the smallest rectangle around points: one side lies along an edge of the hull, so every pair of points names a direction."""
    best = math.inf
    for k in range(len(points)):
        for d in points[k + 1:] - points[k]:
            u = d / np.hypot(*d)
            best = min(best, np.ptp(points @ u) * np.ptp(points @ np.array([-u[1], u[0]])))
    return best


@pytest.mark.parametrize("seed", range(10))
def test_oriented_boxes_are_the_smallest_and_hold_every_pixel(seed):
    labels = pieces(blobs(seed, 24)[0])
    boxes = oriented_boxes(labels)
    geometry = ship_geometry(encode_instances(labels), labels.shape)
    for k, box in enumerate(boxes, 1):
        rows, columns = np.nonzero(labels == k)
        points = np.unique(np.concatenate([np.column_stack([columns + dx, rows + dy]) for dx in (0, 1) for dy in (0, 1)]), axis=0).astype(float)
        t = math.radians(box[4])
        u, v = (points - box[:2]) @ [math.cos(t), -math.sin(t)], (points - box[:2]) @ [math.sin(t), math.cos(t)]
        assert np.abs(u).max() <= box[2] / 2 + 1e-3 and np.abs(v).max() <= box[3] / 2 + 1e-3
        assert box[2] * box[3] == pytest.approx(smallest_area(hull_points(points)), rel=1e-4)
        assert box[2:4] == pytest.approx(geometry.loc[k - 1, ["length", "width"]].to_numpy(float), abs=1e-3)


def hull_points(points):
    """The points of the convex hull, by their turns (monotone chain)."""
    def half(rows):
        out = []
        for p in rows:
            while len(out) > 1 and (out[-1][0] - out[-2][0]) * (p[1] - out[-2][1]) - (out[-1][1] - out[-2][1]) * (p[0] - out[-2][0]) <= 0: out.pop()
            out.append(p)
        return out
    rows = sorted(map(tuple, points))
    return np.array(half(rows)[:-1] + half(rows[::-1])[:-1])


box = st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(.5, 500), st.floats(.5, 500), st.floats(-720, 720))


@given(box)
@settings(max_examples=200, deadline=None)
def test_boxes_and_corners_round_trip(o):
    normal = normal_boxes([o])
    assert normal[0, 2] >= normal[0, 3] and 0 <= normal[0, 4] < 180
    assert (normal_boxes(normal) == normal).all(), "the normal form is its own"
    assert oriented_iou([o], normal)[0, 0] == pytest.approx(1, abs=1e-9)
    corners = oriented_corners(normal)
    back = boxes_from_corners(corners)
    assert oriented_corners(back) == pytest.approx(corners, abs=1e-8) or normal[0, 2] - normal[0, 3] < 1e-6 or normal[0, 4] > 180 - 1e-6
    assert back[0, :4] == pytest.approx(normal[0, :4], abs=1e-9)
    for way in ([1, 2, 3, 0], [3, 2, 1, 0], [2, 3, 0, 1]): assert oriented_iou(boxes_from_corners(corners[:, way]), normal)[0, 0] == pytest.approx(1, abs=1e-9)


def test_normal_form_at_its_seams():
    assert normal_boxes([[0, 0, 5, 2, 180], [0, 0, 5, 2, -1e-20], [0, 0, 3, 3, 90], [0, 0, 2, 5, 90]])[:, 4].tolist() == [0, 0, 0, 0]
    assert oriented_boxes(np.zeros((4, 4), int)).shape == (0, 5)
    assert np.isnan(oriented_boxes(np.array([[2]]))).tolist() == [[True] * 5, [False] * 5]
    with pytest.raises(ValueError, match="not the corners"): boxes_from_corners([[0, 0], [4, 0], [5, 2], [1, 2]])
