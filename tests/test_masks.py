"""Run-length codes against brute force and pycocotools; property tests of round trips and of coverage."""
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco
from scipy import ndimage

from shipnb import masks

MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.integers(0, 1))
SIZES = st.tuples(st.integers(1, 16), st.integers(1, 16))


def decode_brute(rle, shape):
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    numbers = [int(o) for o in rle.split()]
    for start, length in zip(numbers[::2], numbers[1::2]):
        for k in range(length): flat[start - 1 + k] = 1
    return flat.reshape(shape, order="F")


def runs_brute(mask):
    out, previous = [], 0
    for position, value in enumerate(mask.ravel(order="F"), 1):
        if value and not previous: out += [position, 0]
        if value: out[-1] += 1
        previous = value
    return " ".join(map(str, out))


def coverage_brute(mask, size):
    """Each image pixel is cut into size[0] x size[1] parts, each small pixel into the image's height x width parts: all parts are equal squares."""
    parts = np.kron(mask, np.ones(size, np.int64))
    (H, W), (h, w) = mask.shape, size
    return parts.reshape(h, H, w, W).sum(axis=(1, 3))


@given(MASKS)
def test_encode_is_brute_force_and_decodes_back(mask):
    rle = masks.rle_encode(mask)
    assert rle == runs_brute(mask)
    decoded = masks.rle_decode(rle, mask.shape)
    assert decoded.dtype == np.uint8 and (decoded == mask).all()
    assert (decode_brute(rle, mask.shape) == mask).all()
    assert masks.rle_area(rle) == mask.sum()


@given(MASKS)
def test_agrees_with_pycocotools(mask):
    """COCO's uncompressed counts are column-major run lengths that begin with background."""
    ours = masks.rle_encode(mask)
    theirs = coco.encode(np.asfortranarray(mask))
    assert (coco.decode(theirs) == masks.rle_decode(ours, mask.shape)).all()
    assert coco.area(theirs) == masks.rle_area(ours)
    x, y, w, h = coco.toBbox(theirs)
    if mask.any(): assert masks.rle_box(ours, mask.shape) == (x, y, x + w, y + h)
    else: assert masks.rle_box(ours, mask.shape) == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.int64, np.float32])
def test_encode_takes_any_type(dtype):
    mask = np.zeros((9, 7), dtype)
    mask[2:5, 3:6] = 1
    assert masks.rle_encode(mask) == runs_brute(mask != 0)


@given(MASKS)
def test_values_above_one_are_object_too(mask):
    assert masks.rle_encode(mask * 255) == masks.rle_encode(mask)


@given(MASKS, st.randoms())
def test_unsorted_runs_are_accepted_and_sorted(mask, random):
    numbers = masks.rle_encode(mask).split()
    pairs = list(zip(numbers[::2], numbers[1::2]))
    random.shuffle(pairs)
    starts, lengths = masks.rle_runs(" ".join(f"{a} {b}" for a, b in pairs), mask.shape)
    assert (np.diff(starts) > 0).all()
    assert masks._text(starts, lengths) == masks.rle_encode(mask)


@given(st.lists(arrays(np.uint8, (7, 9), elements=st.integers(0, 1)), max_size=4))
def test_union(parts):
    union = np.any(parts, axis=0).astype(np.uint8) if parts else np.zeros((7, 9), np.uint8)
    assert masks.rle_union([masks.rle_encode(o) for o in parts], (7, 9)) == masks.rle_encode(union)


@settings(deadline=None, max_examples=300)
@given(MASKS, SIZES)
def test_coverage_is_exact(mask, size):
    got = masks.rle_coverage(masks.rle_encode(mask), mask.shape, size)
    assert got.dtype == np.float32
    assert (got == (coverage_brute(mask, size) / mask.size).astype(np.float32)).all()


@settings(deadline=None, max_examples=300)
@given(st.lists(arrays(np.uint8, (9, 8), elements=st.integers(0, 1)), max_size=3), SIZES)
def test_render_mask_is_half_coverage_and_keeps_every_ship(ships, size):
    got = masks.render_mask([masks.rle_encode(o) for o in ships], (9, 8), size)
    union = np.any(ships, axis=0).astype(np.uint8) if ships else np.zeros((9, 8), np.uint8)
    want = 2 * coverage_brute(union, size) >= union.size
    for ship in ships:
        if ship.any(): want.flat[coverage_brute(ship, size).argmax()] = True
    assert (got == want).all()


@given(MASKS)
def test_instances_are_the_8_connected_components(mask):
    labels, n = masks.label_instances(mask)
    theirs, count = ndimage.label(mask, np.ones((3, 3)))
    assert n == count
    assert len({(a, b) for a, b in zip(labels.ravel(), theirs.ravel())}) == len(np.unique(labels))


@given(arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 5)))
def test_instance_codes_and_boxes_equal_one_at_a_time(labels):
    codes, boxes = masks.encode_instances(labels), masks.label_boxes(labels)
    assert len(codes) == len(boxes) == labels.max()
    for number, (code, box) in enumerate(zip(codes, boxes), 1):
        assert code == runs_brute(labels == number)
        assert tuple(box) == masks.rle_box(code, labels.shape)
    if labels.max(): assert (masks.decode_labels(codes, labels.shape) == labels).all()


@given(arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3)), st.integers(1, 150))
def test_runs_do_not_depend_on_how_much_is_worked_on_at_a_time(labels, pixels):
    for whole, parts in zip(masks._label_runs(labels), masks._label_runs(labels, pixels)): assert np.array_equal(whole, parts)


def test_encoding_copies_no_large_image():
    labels = np.tile(np.arange(1, 41, dtype=np.int32).repeat(100), (4000, 1))      # 64 MB, full
    tracemalloc.start()
    codes = masks.encode_instances(labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(codes) == 40 and masks.rle_area(codes[7]) == 400_000 and peak < 0.5 * labels.nbytes


@given(st.text(max_size=12))
def test_any_text_is_runs_or_a_value_error(text):
    try: starts, lengths = masks.rle_runs(text, (8, 8))
    except ValueError as error: assert "run-length code" in str(error)
    else: assert (starts >= 0).all() and (lengths >= 1).all() and (starts + lengths <= 64).all()


@given(st.lists(st.integers(-3, 70), max_size=8))
def test_numbers_are_refused_exactly_when_wrong(numbers):
    pairs = sorted(zip(numbers[::2], numbers[1::2]))
    good = (len(numbers) % 2 == 0 and all(a >= 1 and n >= 1 and a + n - 1 <= 64 for a, n in pairs)
            and all(a + n <= b for (a, n), (b, _) in zip(pairs, pairs[1:])))
    if numbers == [0]: good = True   # "0" is the empty mask
    text = " ".join(map(str, numbers))
    if good: masks.rle_runs(text, (8, 8))
    else:
        with pytest.raises(ValueError): masks.rle_runs(text, (8, 8))


@pytest.mark.parametrize("value", [7, 1.5, b"1 2", ["1", "2"]])
def test_not_text_is_refused(value):
    with pytest.raises(ValueError, match="not text"): masks.rle_runs(value)


@pytest.mark.parametrize("code", ["1 99999999999999999999", "9223372036854775807 9223372036854775807", "1 9223372036854775807"])
def test_huge_numbers_are_refused(code):
    with pytest.raises(ValueError): masks.rle_runs(code, (768, 768))


def test_hostile_length_allocates_nothing():
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(ValueError, match="beyond the last pixel"): masks.rle_decode("1 1000000000000")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("call", [lambda: masks.rle_encode(np.zeros((2, 2, 1))), lambda: masks.encode_instances(np.zeros(4, int)),
                                  lambda: masks.render_mask([], (4, 4), (0, 2)), lambda: masks.encode_instances(np.array([[-1, 2]]))])
def test_wrong_shapes_and_labels_are_value_errors(call):
    with pytest.raises(ValueError): call()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (16, 1), (24, 16), (13, 7), (40, 64)])
def test_codes_do_not_depend_on_how_the_mask_lies_in_memory(dtype, shape):
    """Contiguous, Fortran order, slices, flipped and unaligned views give the code of the plain definition."""
    rng = np.random.default_rng(sum(shape))
    mask = (rng.random(shape) < 0.4).astype(dtype)
    padded = np.zeros((shape[0] + 2, shape[1] + 3), dtype)
    padded[1:-1, 1:-2] = mask
    raw = np.frombuffer(b"\0" + mask.tobytes(), np.uint8)[1:].view(dtype).reshape(shape) if mask.itemsize == 1 else mask   # one byte off every boundary
    pixels = np.concatenate([[0], mask.T.ravel() != 0, [0]]).astype(int)
    edges = np.flatnonzero(np.diff(pixels)) + 1
    want = " ".join(f"{a} {b - a}" for a, b in zip(edges[::2], edges[1::2]))
    for view in (mask, np.asfortranarray(mask), padded[1:-1, 1:-2], mask[::-1, ::-1].copy()[::-1, ::-1], raw): assert masks.rle_encode(view) == want
