"""Geometry that must hold everywhere: code, mask, instances and boxes are one thing, under flips, turns and every change of size.

Where a rule is exact it is tested as equal. Where pixels are mixed (averaging, linear interpolation) the allowed difference is stated: an edge lies
within one pixel of the grid it is seen on.
"""
import albumentations as A
import cv2
import numpy as np
import pandas as pd
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco
from scipy import ndimage

from shipnb import formats
from shipnb.augment import RandomDownsample, preset
from shipnb.catalog import Catalog
from shipnb.dataset import shrink
from shipnb.masks import (decode_labels, encode_instances, label_boxes, label_instances, render_mask, rle_area, rle_box, rle_boxes, rle_coverage, rle_decode,
                          rle_encode, rle_runs, rle_union, scale_boxes)

MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.integers(0, 1))
SIDES = st.integers(1, 30)
SIZES = st.tuples(SIDES, SIDES)

# each: what it does to an array (height, width), and to boxes (n, 4) of an image of `shape`
TURNS = {
    "left-right": (np.fliplr, lambda b, h, w: np.stack([w - b[:, 2], b[:, 1], w - b[:, 0], b[:, 3]], 1)),
    "upside-down": (np.flipud, lambda b, h, w: np.stack([b[:, 0], h - b[:, 3], b[:, 2], h - b[:, 1]], 1)),
    "diagonal": (np.transpose, lambda b, h, w: b[:, [1, 0, 3, 2]]),
    "quarter": (np.rot90, lambda b, h, w: np.stack([b[:, 1], w - b[:, 2], b[:, 3], w - b[:, 0]], 1)),
    "half": (lambda o: np.rot90(o, 2), lambda b, h, w: np.stack([w - b[:, 2], h - b[:, 3], w - b[:, 0], h - b[:, 1]], 1)),
    "three quarters": (lambda o: np.rot90(o, 3), lambda b, h, w: np.stack([h - b[:, 3], b[:, 0], h - b[:, 1], b[:, 2]], 1)),
}
turns = st.sampled_from(sorted(TURNS))


@st.composite
def rectangles(draw, least=1, margin=0):
    """(shape, box) of a filled rectangle inside an image, `margin` pixels from its edge."""
    h, w = draw(st.integers(2 * margin + least, 60)), draw(st.integers(2 * margin + least, 60))
    x0, y0 = draw(st.integers(margin, w - margin - least)), draw(st.integers(margin, h - margin - least))
    return (h, w), (x0, y0, draw(st.integers(x0 + least, w - margin)), draw(st.integers(y0 + least, h - margin)))


def paint(shape, box):
    mask = np.zeros(shape, np.uint8)
    mask[box[1]:box[3], box[0]:box[2]] = 1
    return mask


def box_of(mask):
    """The tight half-open box of the nonzero pixels, by brute force."""
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def grey(mask):
    """A mask as an image: white object, black background."""
    return np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)


# ---- code, mask, instances, boxes

@given(MASKS)
def test_code_mask_instances_boxes_and_back(mask):
    code = rle_encode(mask)
    labels, n = label_instances(rle_decode(code, mask.shape))
    codes = encode_instances(labels)
    assert len(codes) == n == ndimage.label(mask, np.ones((3, 3)))[1]
    assert (decode_labels(codes, mask.shape) == labels).all() and rle_union(codes, mask.shape) == code
    boxes, areas, errors = rle_boxes(codes, [mask.shape] * n)
    assert not errors and (boxes == label_boxes(labels)).all() and areas.sum() == mask.sum() == rle_area(code)
    for k in range(n): assert tuple(boxes[k]) == box_of(labels == k + 1) == rle_box(codes[k], mask.shape)


@given(MASKS)
def test_instances_agree_with_pycocotools(mask):
    for rle in encode_instances(label_instances(mask)[0]):
        theirs = coco.encode(np.asfortranarray(rle_decode(rle, mask.shape)))
        x, y, w, h = coco.toBbox(theirs)
        assert rle_box(rle, mask.shape) == (x, y, x + w, y + h) and coco.area(theirs) == rle_area(rle)
        assert formats.rle_coco(rle, mask.shape)["counts"] == theirs["counts"].decode()


@given(st.lists(st.tuples(st.integers(-3, 70), st.integers(-3, 12)), max_size=8), st.sampled_from([" ", "  ", " x "]), SIZES)
def test_many_codes_at_once_are_the_codes_one_by_one(pairs, blank, shape):
    """Clean, unsorted, overlapping, damaged: the fast path never says anything else than the slow one."""
    text = blank.join(f"{a}{blank}{b}" for a, b in pairs)
    codes = ["1 1", text, "", " ".join(f"{a} {b}" for a, b in sorted(pairs)), text.rpartition(" ")[0]]
    boxes, areas, errors = rle_boxes(codes, [shape] * len(codes), chunk=2)
    for k, code in enumerate(codes):
        try: expected = (*rle_box(code, shape), int(rle_runs(code, shape)[1].sum()))
        except ValueError as error: assert errors[k] == str(error) and not boxes[k].any() and areas[k] == 0
        else: assert (*boxes[k].tolist(), areas[k]) == expected and k not in errors


# ---- flips and quarter turns

@given(MASKS, turns)
def test_turns_commute_between_mask_instances_boxes_and_codes(mask, turn):
    move, move_boxes = TURNS[turn]
    labels, n = label_instances(mask)
    moved = np.ascontiguousarray(move(mask))
    again, m = label_instances(moved)
    assert m == n
    codes = [rle_encode(move(labels == k + 1)) for k in range(n)]
    assert sorted(codes) == sorted(encode_instances(again)) and rle_union(codes, moved.shape) == rle_encode(moved)
    boxes, areas, _ = rle_boxes(codes, [moved.shape] * n)
    assert (boxes == move_boxes(label_boxes(labels), *mask.shape)).all()
    assert sorted(areas) == sorted(np.bincount(labels.ravel(), minlength=n + 1)[1:])


@given(MASKS, turns, turns)
def test_turns_compose_and_come_back(mask, first, second):
    boxes, shape = label_boxes(label_instances(mask)[0]), mask.shape
    for turn in (first, second):
        move, move_boxes = TURNS[turn]
        boxes, mask = move_boxes(boxes, *shape), np.ascontiguousarray(move(mask))
        shape = mask.shape
    assert sorted(boxes.tolist()) == sorted(label_boxes(label_instances(mask)[0]).tolist())
    assert (rle_decode(rle_encode(np.rot90(np.rot90(mask), 3)), shape) == mask).all()


@settings(max_examples=60, deadline=None)
@given(rectangles(), st.sampled_from([A.HorizontalFlip, A.VerticalFlip, A.Transpose, A.RandomRotate90, A.D4]), st.integers(0, 99))
def test_the_augmentation_library_moves_image_mask_and_boxes_alike(drawn, kind, seed):
    shape, box = drawn
    mask = paint(shape, box)
    change = A.Compose([kind(p=1)], bbox_params=A.BboxParams(format="pascal_voc", label_fields=["kinds"]), seed=seed)
    out = change(image=grey(mask), mask=mask, bboxes=[box], kinds=[0])
    assert ((out["image"][..., 0] > 127) == out["mask"]).all() and out["mask"].sum() == mask.sum()
    np.testing.assert_allclose(out["bboxes"], [box_of(out["mask"])], atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(MASKS, st.integers(0, 999))
def test_our_flip_preset_moves_image_and_mask_alike(mask, seed):
    assume(min(mask.shape) > 1)
    out = preset("d4", seed=seed)(image=grey(mask), mask=mask)
    assert ((out["image"][..., 0] > 127) == out["mask"]).all()
    assert label_instances(np.ascontiguousarray(out["mask"]))[1] == label_instances(mask)[1]


# ---- smaller and larger

@given(MASKS, SIZES)
def test_area_is_conserved_at_every_size(mask, size):
    cover = rle_coverage(rle_encode(mask), mask.shape, size).astype(np.float64)
    assert abs(cover.mean() - mask.mean()) < 1e-6 and cover.min() >= 0 and cover.max() <= 1


@given(MASKS, SIZES, turns)
def test_coverage_commutes_with_turns(mask, size, turn):
    """Resize then turn, or turn then resize: the same numbers, in integers below, so equal."""
    move = TURNS[turn][0]
    target = move(np.zeros(size, bool)).shape
    assert (rle_coverage(rle_encode(move(mask)), move(mask).shape, target) == move(rle_coverage(rle_encode(mask), mask.shape, size))).all()


@given(MASKS, SIZES)
def test_the_truth_keeps_every_object(mask, size):
    codes = encode_instances(label_instances(mask)[0])
    small = render_mask(codes, mask.shape, size)
    cover = rle_coverage(rle_encode(mask), mask.shape, size)
    assert (small[cover >= 0.5] == 1).all() and (small[cover == 0] == 0).all()
    for code in codes: assert small[rle_coverage(code, mask.shape, size) > 0].any()


@given(MASKS, st.integers(1, 5))
def test_whole_factors_multiply_areas_and_boxes(mask, factor):
    codes, (h, w) = encode_instances(label_instances(mask)[0]), mask.shape
    size = (h * factor, w * factor)
    large = render_mask(codes, mask.shape, size)
    assert (large == np.kron(mask, np.ones((factor, factor)))).all() and label_instances(large)[1] == len(codes)
    boxes = scale_boxes(rle_boxes(codes, [mask.shape] * len(codes))[0], mask.shape, size)
    assert sorted(boxes.tolist()) == sorted(label_boxes(label_instances(large)[0]).tolist())


@given(MASKS, SIZES)
def test_a_scaled_box_is_where_the_object_is(mask, size):
    """Every pixel that holds part of the object is in the scaled box rounded outward; rounding moves an edge by less than one pixel."""
    assume(mask.any())
    (H, W), (h, w) = mask.shape, size
    x0, y0, x1, y1 = (int(o) for o in box_of(mask))
    outward = (x0 * w // W, y0 * h // H, -(-x1 * w // W), -(-y1 * h // H))
    assert box_of(rle_coverage(rle_encode(mask), mask.shape, size) > 0) == outward
    scaled = scale_boxes([(x0, y0, x1, y1)], mask.shape, size)[0]
    assert (np.abs(scaled - outward) < 1).all()
    np.testing.assert_allclose(scale_boxes([scaled], size, mask.shape)[0], (x0, y0, x1, y1), atol=1e-9)


@given(rectangles(), SIZES)
def test_the_whole_image_scales_to_the_whole_image(drawn, size):
    (H, W), box = drawn
    assert scale_boxes([(0, 0, W, H)], (H, W), size).tolist() == [[0, 0, size[1], size[0]]]
    area = scale_boxes([box], (H, W), size)[0]
    share = (box[2] - box[0]) * (box[3] - box[1]) / (H * W)
    np.testing.assert_allclose((area[2] - area[0]) * (area[3] - area[1]) / (size[0] * size[1]), share, rtol=1e-9)


@settings(max_examples=150, deadline=None)
@given(rectangles(), st.data())
def test_a_smaller_image_its_truth_and_its_boxes_agree(drawn, data):
    """Image by area averaging, truth by coverage, box by scaling: white in the image is ship in the truth, and its edges are the scaled box's rounded."""
    shape, box = drawn
    size = data.draw(st.integers(1, shape[0])), data.draw(st.integers(1, shape[1]))
    mask = paint(shape, box)
    small, cover = shrink(grey(mask), size)[..., 0].astype(float), rle_coverage(rle_encode(mask), shape, size)
    assert np.abs(small / 255 - cover).max() <= 1 / 255
    truth = render_mask([rle_encode(mask)], shape, size)
    clear = np.abs(cover - 0.5) > 1 / 128
    if (cover >= 0.5).any(): assert ((small[clear] >= 128) == truth[clear].astype(bool)).all()
    (scaled,) = scale_boxes([box], shape, size)
    edges = np.array(box_of(truth))
    assert (edges[:2] > scaled[:2] - 1).all() and (edges[2:] < scaled[2:] + 1).all()
    if min(scaled[2:] - scaled[:2]) >= 2: assert (np.abs(edges - scaled) <= 0.5 + 1e-9).all()   # a slimmer object may keep only its best pixel


@settings(max_examples=100, deadline=None)
@given(rectangles(least=3, margin=2), st.floats(1, 4), st.floats(1, 4))
def test_a_larger_image_its_truth_and_its_boxes_agree(drawn, fy, fx):
    """Linear interpolation crosses half the height at the edge itself: each edge within one pixel of the scaled box."""
    shape, box = drawn
    size = round(shape[0] * fy), round(shape[1] * fx)
    mask = paint(shape, box)
    (scaled,) = scale_boxes([box], shape, size)
    assert (np.abs(np.array(box_of(shrink(grey(mask), size)[..., 0] > 127)) - scaled) <= 1).all()
    assert (np.abs(np.array(box_of(render_mask([rle_encode(mask)], shape, size))) - scaled) <= 1).all()


@settings(max_examples=60, deadline=None)
@given(rectangles(least=8), st.integers(0, 999), st.sampled_from(["small", "pad", "resize"]))
def test_random_downsampling_keeps_image_and_mask_together(drawn, seed, output):
    """The mask's edges lie within one pixel of those seen in the image (of the coarse grid, where it was blurred), and one object stays."""
    shape, box = drawn
    mask = paint(shape, box)
    image, small = RandomDownsample(p=1, factor=(1.5, 4), seed=seed, output=output)(grey(mask), mask)
    assert image.shape[:2] == small.shape and small.any()
    if output == "pad": return                                   # the padding mirrors the object, so there may be several
    slack = 4 if output == "resize" else 1
    seen = np.array(box_of(image[..., 0] > 127))
    assert (np.abs(seen - np.array(box_of(small))) <= slack).all() and label_instances(small)[1] == 1


@settings(max_examples=40, deadline=None)
@given(rectangles(least=8), st.integers(0, 999))
def test_padded_downsampling_mirrors_image_and_mask_alike(drawn, seed):
    shape, box = drawn
    mask = paint(shape, box)
    image, small = RandomDownsample(p=1, factor=(1.5, 4), seed=seed, output="pad")(grey(mask), mask)
    white = image[..., 0].astype(float)
    clear = np.abs(white - 127.5) > 2                               # nearer to half, rounding to a whole grey decides
    assert ((white > 127) == small)[clear].all()


# ---- boxes and masks through the formats

def one_image(shape, boxes):
    """A labels-only Catalog of one image with these boxes."""
    objects = pd.DataFrame([("a.png", "ship", "", *o, (o[2] - o[0]) * (o[3] - o[1])) for o in boxes], columns=["image", "label", "rle", "x0", "y0", "x1", "y1", "area"])
    images = pd.DataFrame([("a.png", *shape, len(boxes), -1, "", "")], columns=["image", "height", "width", "count", "bytes", "group", "split"])
    return Catalog(images, objects)


@given(rectangles())
def test_a_filled_box_is_the_painted_rectangle(drawn):
    shape, box = drawn
    (rle,) = formats.fill_boxes(one_image(shape, [box])).rles(0)
    assert rle == rle_encode(paint(shape, box)) and rle_box(rle, shape) == box


@given(st.tuples(st.floats(0, 19), st.floats(0, 19), st.floats(0.01, 20), st.floats(0.01, 20)))
def test_a_filled_fractional_box_keeps_its_edges_within_half_a_pixel(drawn):
    x, y, width, height = drawn
    box = (x, y, min(x + width, 20.0), min(y + height, 20.0))
    (rle,) = formats.fill_boxes(one_image((20, 20), [box])).rles(0)
    edges = np.array(rle_box(rle, (20, 20)))
    slim = np.array([box[2] - box[0] < 1, box[3] - box[1] < 1])
    assert (np.abs(edges - box) <= np.where(np.tile(slim, 2), 1, 0.5) + 1e-9).all() and rle_area(rle) >= 1


@settings(max_examples=30, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=16, max_side=24), elements=st.integers(0, 1)), st.tuples(st.integers(0, 15), st.integers(0, 15)))
def test_masks_survive_png_and_coco(tmp_path_factory, mask, pixel):
    mask[pixel] = 1                     # at least one object
    root = tmp_path_factory.mktemp("trip")
    for folder in ("images", "masks"): (root/folder).mkdir()
    cv2.imwrite(str(root/"images"/"a.png"), grey(mask))
    cv2.imwrite(str(root/"masks"/"a.png"), mask * 255)
    catalog = formats.read(root)
    assert rle_union(catalog.rles(0), mask.shape) == rle_encode(mask) and len(catalog.objects) == label_instances(mask)[1]
    catalog.to_coco(root/"x.json")
    again = formats.read_coco(root, root/"x.json")
    assert again.rles(0) == catalog.rles(0) and (again.objects[["x0", "y0", "x1", "y1"]] == catalog.objects[["x0", "y0", "x1", "y1"]]).all(axis=None)
