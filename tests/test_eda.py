"""Measurements from run-length codes against full masks, OpenCV and counting by hand; the label tables alone."""
import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shipnb import eda
from shipnb.masks import rle_box, rle_decode, rle_encode

SHAPE = (40, 50)
MASKS = arrays(np.uint8, (12, 15), elements=st.integers(0, 1)).filter(lambda o: o.any())


def rectangle_brute(mask):
    """Smallest rectangle around every corner of every pixel, by OpenCV: (long side, short side)."""
    rows, columns = np.nonzero(mask)
    corners = np.concatenate([np.stack([columns + dx, rows + dy], 1) for dx in (0, 1) for dy in (0, 1)]).astype(np.float32)
    return sorted(cv2.minAreaRect(corners)[1], reverse=True)


@settings(deadline=None)
@given(MASKS)
def test_geometry_is_that_of_the_decoded_mask(mask):
    rle = rle_encode(mask)
    row = eda.ship_geometry([rle], mask.shape).iloc[0]
    rows, columns = np.nonzero(mask)
    assert row.area == mask.sum() and (row.x0, row.y0, row.x1, row.y1) == rle_box(rle, mask.shape)
    assert row.length * row.width == pytest.approx(np.prod(rectangle_brute(mask)), rel=1e-3)
    assert (row.x, row.y) == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))   # from the image's corner, not its first pixel's centre
    assert row.at_edge == bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.mark.parametrize("angle", [0, 30, 45, 90, 120, 170])
def test_a_drawn_rectangle_has_its_size_and_direction(angle):
    mask = np.zeros((400, 400), np.uint8)
    points = cv2.boxPoints(((200, 200), (160, 30), -angle))       # OpenCV turns clockwise, y is down
    cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 1)
    row = eda.ship_geometry([rle_encode(mask)], mask.shape).iloc[0]
    assert abs(row.length - 161) < 2.5 and abs(row.width - 31) < 2.5
    assert min(abs(row.orientation - angle), 180 - abs(row.orientation - angle)) < 1.5
    assert row.length_m == pytest.approx(1.5 * row.length) and row.aspect == pytest.approx(row.length / row.width)


@settings(deadline=None)
@given(st.lists(arrays(np.uint8, SHAPE, elements=st.integers(0, 1)), min_size=1, max_size=4))
def test_coverage_map_is_the_sum_of_the_masks(masks):
    codes = [rle_encode(o) for o in masks]
    assert (eda.coverage_map(codes, SHAPE) == sum(rle_decode(o, SHAPE).astype(int) for o in codes)).all()


def test_box_map_counts_boxes():
    rng = np.random.default_rng(0)
    boxes = pd.DataFrame([(x, y, x + w, y + h) for x, y, w, h in rng.integers(1, 20, (30, 4))], columns=["x0", "y0", "x1", "y1"])
    want = np.zeros(SHAPE, int)
    for o in boxes.itertuples(): want[o.y0:o.y1, o.x0:o.x1] += 1
    assert (eda.box_coverage_map(boxes, SHAPE) == want).all()


def test_a_bad_code_is_named():
    with pytest.raises(ValueError, match="object 1.*1 2 3"): eda.ship_geometry(["1 2", "1 2 3"], SHAPE)


def test_the_size_rule_counts_by_hand():
    images = pd.DataFrame({"image": list("abcd"), "bytes": [10 * 1024, 52 * 1024, 53 * 1024, -1], "count": [0, 2, 0, 1]})
    row = eda.size_rule(images, cuts=(52,)).iloc[0]               # a and b are at most 52 kB; b is the one with ships; d is unknown
    assert (row.empty_dropped, row.ship_images_dropped, row.ships_dropped, row.unknown) == (1, 1, 2, 1)


def test_presence_and_counts():
    images = pd.DataFrame({"image": list("abcde"), "count": [0, 0, 0, 1, 4]})
    assert eda.presence_table(images).select_dtypes("number").iloc[:, 0].tolist() == [3, 1, 1]
    assert eda.count_table(images)["images"].to_dict() == {0: 3, 1: 1, 2: 0, 3: 0, 4: 1}


def test_lorenz_ends_at_one_and_lies_below_the_diagonal():
    items, total = eda.lorenz(np.array([1.0, 1.0, 2.0, 6.0]))
    assert np.allclose(items, [0, 0.25, 0.5, 0.75, 1]) and np.allclose(total, [0, 0.1, 0.2, 0.4, 1])


def test_the_complete_label_tables(real_data):
    folder = real_data/"airbus"/"labels"
    catalog = eda.read_labels(folder/"train_ship_segmentations_v2_partial.csv.gz", folder/"train_image_counts.csv.gz")
    assert (len(catalog), int((catalog.counts == 0).sum()), int(catalog.counts.sum())) == (192_556, 150_000, 81_723)
