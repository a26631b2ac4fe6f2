"""Prediction against independent oracles: windows stitched by brute force, polygons rasterised again, COCO read by pycocotools, hostile folders."""
import inspect
import json
import math
import os
import resource
import shutil
import struct
import time
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from skimage.measure import regionprops

from shipnb import inference
from shipnb.catalog import IMAGE_COLUMNS, OBJECT_COLUMNS, Catalog
from shipnb.inference import (IMAGE_SUFFIXES, VIEWS, Prediction, Predictor, apply_view, blend_weights, check_output, coco_counts, cut_window,
                              draw_overlay, image_files, kept_ships, overlay_name, pixel_polygons, predict_folder, read_ahead, ring_area,
                              undo_view, window_starts)
from shipnb.masks import decode_labels, encode_instances, label_instances, rle_area, rle_box, rle_decode, rle_encode
from shipnb.metrics import dice, iou, object_f2
from shipnb.models import build_unet, save_model
from shipnb.thresholds import collect_evidence, image_logits, image_scores, keep, sigmoid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pointwise(torch.nn.Conv2d):
    """Logit = a mix of the channels of each pixel, in units of the source image (0..255), plus a bias."""

    def __init__(self, mix=(1, 1, 1), bias=0.0):
        super().__init__(3, 1, 1)
        with torch.no_grad():
            self.weight.copy_((torch.tensor(mix, dtype=torch.float32) * 255 * torch.tensor(STD)).view(1, 3, 1, 1))
            self.bias.fill_(bias + sum(255 * m * k for m, k in zip(MEAN, mix, strict=True)))


class Blur(torch.nn.Conv2d):
    """A random 5 x 5 convolution with zero padding: what it says near a border is wrong, as a real network's is."""

    def __init__(self, seed=0):
        super().__init__(3, 1, 5, padding=2)
        with torch.no_grad():
            for p in self.parameters(): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


class Ramp(Pointwise):
    """Knows where in the window it is: a flip is not the same to it."""

    def forward(self, x):
        h, w = x.shape[-2:]
        return super().forward(x) / 255 + torch.linspace(0, 3, w) + torch.linspace(0, 1, h)[:, None]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks are faster without threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(height, width, seed=0): return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bright(window=(64, 64), logit=0.0, min_area=0, **options):
    return Predictor([Pointwise((1 / 96,) * 3, -4.0)], window, window, logit, min_area, **options)


def scene(height, width, ships=6, seed=0):
    """Dark noise with bright, separate bars."""
    rng = np.random.default_rng(seed)
    img = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    for k in range(ships):
        y, x = 3 + k * (height - 12) // ships, int(rng.integers(0, max(1, width - 12)))
        img[y:y + 4, x:x + int(rng.integers(5, 12))] = 240
    return img


# windows

@given(st.integers(1, 5000), st.integers(1, 800), st.floats(0, 0.95))
def test_windows_cover_without_hanging_over(length, window, overlap):
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, length - window)
    steps = np.diff(starts)
    assert (steps >= 0).all() and (steps <= max(1, math.floor(window * (1 - overlap)))).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(1, 30))
def test_windows_are_mirrored_outwards(height, width, h, w):
    img = noise(height, width)
    y, x = np.arange(h) % (2 * height), np.arange(w) % (2 * width)
    y, x = np.minimum(y, 2 * height - 1 - y), np.minimum(x, 2 * width - 1 - x)
    assert np.array_equal(cut_window(img, 0, 0, (h, w)), img[y][:, x])


def stitched_by_brute_force(predictor, img):
    """Every window on its own, one big float64 sum, no bands."""
    (h, w), (H, W) = predictor.window, img.shape[:2]
    total, weight = np.zeros((H + h, W + w)), np.zeros((H + h, W + w))
    bump = np.outer(blend_weights(h).astype(np.float64), blend_weights(w).astype(np.float64))
    for y in window_starts(H, h, predictor.overlap):
        for x in window_starts(W, w, predictor.overlap):
            total[y:y + h, x:x + w] += bump * predictor.window_logits([cut_window(img, y, x, (h, w))])[0]
            weight[y:y + h, x:x + w] += bump
    return total[:H, :W] / weight[:H, :W]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(16, 16), (24, 12)]), st.sampled_from([0, 0.25, 0.5, 0.7]), st.integers(0, 5))
def test_bands_equal_brute_force(height, width, window, overlap, seed):
    predictor = Predictor([Blur(seed)], window, (window[0] // 2, window[1] // 2), 0.0, overlap=overlap, batch_size=3)
    img = noise(height, width, seed)
    got = np.concatenate(list(predictor.bands(img)))
    assert got.dtype == np.float32 and got.shape == (height, width)
    np.testing.assert_allclose(got, stitched_by_brute_force(predictor, img), atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 250), st.sampled_from([0, 0.25, 0.6]))
def test_every_pixel_lands_where_it_was(height, width, overlap):
    """The image codes its own positions; a pixelwise network must give each pixel its own code, whatever the windows."""
    y, x = np.mgrid[:height, :width]
    img = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    predictor = Predictor([Pointwise((1, 1000, 0))], (32, 40), (32, 40), 0.0, overlap=overlap)
    np.testing.assert_allclose(np.concatenate(list(predictor.bands(img))), x + 1000 * y, rtol=2e-6, atol=0.05)


@settings(max_examples=15, deadline=None)
@given(st.integers(64, 150), st.integers(64, 150))
def test_interior_equals_the_whole_image_at_once(height, width):
    """A network with a small view, in windows: away from the windows' borders it is the network on the whole image."""
    predictor = Predictor([Blur()], (64, 64), (64, 64), 0.0, overlap=0.5)
    img = noise(height, width)
    whole = Predictor([Blur()], (height, width), (height, width), 0.0).window_logits([img])[0]
    near = np.zeros((height, width), bool)
    for axis, length in enumerate((height, width)):
        for start in window_starts(length, 64, 0.5):
            for edge in (start, start + 64): near[(slice(None),) * axis + (slice(max(0, edge - 2), edge + 2),)] = True
    got = np.concatenate(list(predictor.bands(img)))
    assert (~near).mean() > 0.5
    np.testing.assert_allclose(got[~near], whole[~near], atol=2e-4)


def test_an_image_of_one_window_gets_the_windows_own_logits_bit_for_bit():
    predictor = Predictor([Blur()], (96, 96), (32, 32), 0.0)
    img = noise(96, 96)
    assert np.array_equal(predictor.predict(img, logits=True).logits, image_logits(predictor.models[0], [img], (32, 32))[0])
    small = cv2.resize(img, (32, 32), interpolation=cv2.INTER_AREA)
    x = (torch.from_numpy(small).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad(): z = predictor.models[0](x.permute(2, 0, 1)[None])
    expected = torch.nn.functional.interpolate(z, size=(96, 96), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(predictor.window_logits([img])[0], expected, atol=1e-5)


def test_memory_does_not_grow_with_the_height():
    predictor, peaks = bright((64, 64)), []
    for height in (256, 2048):
        img = noise(height, 200)
        list(predictor.bands(img[:128]))
        tracemalloc.start()
        for _ in predictor.bands(img): pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 7), (64, 64), (65, 64), (200, 333)])
def test_any_size(shape):
    img = np.full((*shape, 3), 250, np.uint8)
    prediction = bright().predict(img)
    assert prediction.labels.shape == shape and prediction.labels.dtype == np.int32
    assert len(prediction) == 1 and (prediction.labels == 1).all() and 0.9 < prediction.scores[0] < 1
    assert len(bright().predict(img * 0)) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), max_size=7), st.integers(1, 4))
def test_many_images_equal_one_by_one(shapes, batch_size):
    predictor = bright((40, 40), batch_size=batch_size)
    images = [scene(max(h, 13), max(w, 13), seed=i) for i, (h, w) in enumerate(shapes)]
    for img, got in zip(images, predictor.predict_many(iter(images)), strict=True):
        expected = predictor.predict(img)
        assert np.array_equal(got.labels, expected.labels)
        np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-6)


# views

@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_views_are_the_symmetries_and_undo_exactly(tta):
    img = noise(5, 5)
    flips = [img, img[:, ::-1], img[::-1], img[::-1, ::-1]]
    symmetries = flips + ([np.transpose(o, (1, 0, 2)) for o in flips] if tta == "d4" else [])
    assert {str(apply_view(img, view).tolist()) for view in VIEWS[tta]} == {str(o.tolist()) for o in symmetries}
    assert all(np.array_equal(undo_view(apply_view(img, view), view), img) for view in VIEWS[tta])
    assert all(np.array_equal(undo_view(apply_view(img[..., 0], view), view), img[..., 0]) for view in VIEWS[tta])


@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_tta_is_the_mean_of_the_views(tta):
    img = noise(48, 48)
    plain = Predictor([Ramp()], (48, 48), (48, 48), 0.0)
    seen = [img, img[:, ::-1], img[::-1], img[::-1, ::-1]]
    back = [lambda z: z, lambda z: z[:, ::-1], lambda z: z[::-1], lambda z: z[::-1, ::-1]]
    if tta == "d4":
        seen += [o.swapaxes(0, 1) for o in seen]
        back += [lambda z, undo=undo: undo(z.T) for undo in back]
    mean = np.mean([undo(plain.window_logits([np.ascontiguousarray(o)])[0]) for o, undo in zip(seen, back, strict=True)], axis=0)
    got = Predictor([Ramp()], (48, 48), (48, 48), 0.0, tta=tta).window_logits([img])[0]
    assert np.abs(got - plain.window_logits([img])[0]).max() > 0.5
    np.testing.assert_allclose(got, mean, atol=1e-4)


def test_folds_are_averaged_in_their_logits():
    img = noise(32, 32)
    one, two = ([Blur(seed)] for seed in (1, 2))
    make = lambda models: Predictor(models, (32, 32), (32, 32), 0.0).window_logits([img])[0]
    np.testing.assert_allclose(make(one + two), (make(one) + make(two)) / 2, atol=1e-5)


@pytest.mark.parametrize("tta, size, words", [("turn", (8, 8), "'flips'"), ("d4", (8, 16), "square"), (3, (8, 8), "'flips'")])
def test_wrong_views_are_refused(tta, size, words):
    with pytest.raises(ValueError, match=words): Predictor([Blur()], size, size, 0.0, tta=tta)


# deciding

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.integers(0, 12), st.floats(0.1, 0.9))
def test_kept_ships_against_scipy(seed, height, width, min_area, share):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (height, width)).astype(np.float32)
    mask = (rng.random((height, width)) < share).astype(np.uint8)
    labels, scores = kept_ships(mask, logits[mask > 0], min_area)
    raw, count = ndimage.label(mask, np.ones((3, 3)))
    expected = {frozenset(map(tuple, np.argwhere(raw == k))) for k in range(1, count + 1) if (raw == k).sum() >= min_area}
    assert {frozenset(map(tuple, np.argwhere(labels == k))) for k in range(1, len(scores) + 1)} == expected
    assert labels.max(initial=0) == len(scores)
    for k, score in enumerate(scores, 1): assert score == pytest.approx((1 / (1 + np.exp(-logits[labels == k].astype(float)))).mean())


@pytest.mark.parametrize("img, words", [(np.zeros((4, 4), np.uint8), "uint8 .4, 4."), (np.zeros((4, 4, 3)), "float64"), (np.zeros((4, 4, 4), np.uint8), "4, 4, 4"),
                                        (np.zeros((0, 4, 3), np.uint8), "0, 4, 3"), (None, "NoneType"), ([[1]], "list")])
def test_what_is_no_image_is_refused(img, words):
    with pytest.raises(ValueError, match=words): bright().predict(img)


def test_a_ship_at_the_threshold_is_kept():
    img = np.full((64, 64, 3), 192, np.uint8)
    value = float(bright().predict(img, logits=True).logits[5, 5])
    assert len(bright(logit=value).predict(img)) == 1
    assert len(bright(logit=np.nextafter(np.float32(value), np.float32(9))).predict(img)) == 0


# ships as rows

@settings(max_examples=40, deadline=None)
@given(st.floats(0, 179), st.integers(30, 60), st.integers(6, 12))
def test_ship_rows_against_a_drawn_rectangle(heading, length, width):
    angle = heading - 90                                     # OpenCV turns clockwise from the x axis
    corners = cv2.boxPoints(((80, 70), (length, width), angle))
    mask = cv2.fillPoly(np.zeros((140, 160), np.uint8), [np.rint(corners * 16).astype(np.int32)], 1, shift=4)
    row = Prediction(mask.astype(np.int32), np.array([0.5])).ships().iloc[0]
    assert abs((row.heading - heading + 90) % 180 - 90) < 6
    assert abs(row.length - length) < 3.5 and abs(row.width - width) < 3.5
    truth = regionprops(mask.astype(int))[0]
    assert (row.area, row.y0, row.x0, row.y1, row.x1) == (truth.area, *truth.bbox)
    assert (row.y, row.x) == pytest.approx(np.add(truth.centroid, 0.5))


def test_no_ships_is_an_empty_table():
    prediction = Prediction(np.zeros((5, 5), np.int32), np.zeros(0))
    assert len(prediction.ships()) == 0 and prediction.rles() == [] and prediction.boxes.shape == (0, 4)


# polygons

def inside(polygons, height, width):
    """Pixels whose centre is inside, by counting vertical sides to the left: even-odd rule, no library."""
    crossings = np.zeros((height, width + 1), int)
    for ring in (ring for polygon in polygons for ring in polygon):
        for (x0, y0), (x1, y1) in pairwise(ring):
            assert (x0 == x1) != (y0 == y1)
            if x0 == x1: crossings[min(y0, y1):max(y0, y1), x0] += 1
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 0.95))
def test_polygons_are_the_pixels(seed, height, width, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    polygons = pixel_polygons(mask)
    assert np.array_equal(inside(polygons, height, width), mask)
    assert sum(ring_area(ring[:-1]) for polygon in polygons for ring in polygon) == mask.sum()
    assert len(polygons) == ndimage.label(mask)[1]           # 4-connected parts
    for polygon in polygons:
        assert [np.sign(ring_area(ring[:-1])) for ring in polygon] == [1] + [-1] * (len(polygon) - 1)
        filled, outline = inside([polygon], height, width), inside([polygon[:1]], height, width)
        assert ndimage.label(filled)[1] == 1 and all(outline[inside([[hole]], height, width)].all() for hole in polygon[1:])
        for ring in polygon:
            assert ring[0] == ring[-1] and len({tuple(o) for o in ring}) == len(ring) - 1      # closed and simple
            turns = np.diff(np.array([*ring, ring[1]]), axis=0)
            assert all((a[0] == 0) != (b[0] == 0) for a, b in pairwise(turns))           # no corner on a straight side


def test_holes_belong_to_their_own_part():
    mask = np.zeros((12, 12), np.uint8)
    mask[0:9, 0:9] = 1
    mask[2:7, 2:7] = 0
    mask[3:6, 3:6] = 1
    mask[4, 4] = 0
    polygons = sorted(pixel_polygons(mask), key=lambda o: ring_area(o[0][:-1]))
    assert [[abs(ring_area(ring[:-1])) for ring in polygon] for polygon in polygons] == [[9, 1], [81, 25]]


# files

@pytest.fixture
def folder(tmp_path):
    """Four images, two of them with ships, in an own folder."""
    images = tmp_path/"images"
    images.mkdir()
    for k, (height, width) in enumerate([(64, 64), (50, 90), (64, 64), (30, 20)]):
        Image.fromarray(scene(height, width, ships=4 * (k % 2 == 0), seed=k)).save(images/f"{k}.png")
    return images


def read_csv(path): return pd.read_csv(path, dtype=str, keep_default_na=False)


def run(images, out, predictor=None, **options): return predict_folder(predictor or bright(min_area=3), images, out, progress=False, **options)


def test_the_signature_is_the_one_agreed_upon():
    parameters = inspect.signature(predict_folder).parameters
    assert list(parameters) == ["model", "images", "out", "format", "overlays", "tta", "strict", "sample_submission", "threshold", "min_area", "progress"]
    defaults = {name: o.default for name, o in parameters.items() if o.default is not o.empty}
    assert defaults == dict(format="csv", overlays=None, tta=False, strict=False, sample_submission=None, threshold=None, min_area=None, progress=True)


def test_csv_holds_the_labels(folder, tmp_path):
    result = run(folder, tmp_path/"out.csv")
    rows = read_csv(tmp_path/"out.csv")
    assert list(rows.columns) == ["ImageId", "EncodedPixels"] and list(rows.ImageId.unique()) == ["0.png", "1.png", "2.png", "3.png"]
    assert (result.images, len(result.bad)) == (4, 0) and result.ships == (rows.EncodedPixels != "").sum() == 8
    for name, group in rows.groupby("ImageId"):
        prediction = bright(min_area=3).predict(folder/name)
        codes = [o for o in group.EncodedPixels if o]
        assert len(group) == max(1, len(prediction)) and len(codes) == len(prediction)
        assert np.array_equal(decode_labels(codes, prediction.labels.shape), prediction.labels)
        assert sum(rle_decode(o, prediction.labels.shape).astype(int) for o in codes + [""]).max(initial=0) <= 1     # never overlap


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 0.7))
def test_codes_of_any_labels_round_trip(seed, height, width, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    labels, scores = kept_ships(mask, np.zeros(int(mask.sum()), np.float32), 2)
    codes = Prediction(labels, scores).rles()
    assert np.array_equal(decode_labels(codes, mask.shape), labels)
    for k, code in enumerate(codes, 1):
        assert code == rle_encode(labels == k)
        counts = coco_counts(code, mask.shape)
        assert sum(counts) == height * width
        flat = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(flat.reshape(width, height).T, labels == k)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")     # of pycocotools with numpy 2
def test_coco_is_read_by_pycocotools_and_scores_one_against_itself(folder, tmp_path, capsys):
    result = run(folder, tmp_path/"out.json", format="coco")
    truth = COCO(str(tmp_path/"out.json"))
    assert len(truth.getAnnIds()) == result.ships == 8 and len(truth.getImgIds()) == 4
    for entry in truth.loadImgs(truth.getImgIds()):
        prediction = bright(min_area=3).predict(folder/entry["file_name"])
        assert (entry["height"], entry["width"]) == prediction.labels.shape
        for k, found in enumerate(truth.loadAnns(truth.getAnnIds(entry["id"])), 1):
            assert np.array_equal(truth.annToMask(found), prediction.labels == k) and found["area"] == (prediction.labels == k).sum()
            assert found["score"] == pytest.approx(prediction.scores[k - 1])
    results = truth.loadRes(json.loads((tmp_path/"out.json").read_text())["annotations"])
    for kind in ("segm", "bbox"):
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


def test_geojson_areas_are_pixel_counts(folder, tmp_path):
    run(folder, tmp_path/"out.geojson", format="geojson")
    value = json.loads((tmp_path/"out.geojson").read_text())
    assert value["type"] == "FeatureCollection" and len(value["features"]) == 8 and [o["image"] for o in value["images"]] == [f"{k}.png" for k in range(4)]
    for name, shape in (("0.png", (64, 64)), ("2.png", (64, 64))):
        prediction = bright(min_area=3).predict(folder/name)
        found = [o for o in value["features"] if o["properties"]["image"] == name]
        for k, feature in enumerate(found, 1):
            kind, coordinates = feature["geometry"]["type"], feature["geometry"]["coordinates"]
            polygons = [coordinates] if kind == "Polygon" else coordinates
            assert feature["type"] == "Feature" and kind in ("Polygon", "MultiPolygon")
            assert np.array_equal(inside(polygons, *shape), prediction.labels == k)
            assert sum(ring_area(ring[:-1]) for polygon in polygons for ring in polygon) == feature["properties"]["area"]


def test_ship_table_file(folder, tmp_path):
    run(folder, tmp_path/"ships.csv", format="ships")
    table = pd.read_csv(tmp_path/"ships.csv")
    expected = bright(min_area=3).predict(folder/"2.png").ships()
    got = table[table.image == "2.png"].drop(columns="image").reset_index(drop=True)
    pd.testing.assert_frame_equal(got, expected.reset_index(drop=True), atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("format", ["csv", "coco", "geojson", "ships"])
def test_no_ship_anywhere(folder, tmp_path, format):
    result = run(folder, tmp_path/"out", bright(logit=50.0), format=format)
    assert (result.images, result.ships) == (4, 0)
    text = (tmp_path/"out").read_text()
    if format == "csv": assert text == "ImageId,EncodedPixels\n" + "".join(f"{k}.png,\n" for k in range(4))
    if format == "ships": assert text.count("\n") == 1 and text.startswith("image,ship,x,y,length,width,heading,area,score")
    if format == "coco": assert len(json.loads(text)["images"]) == 4
    if format == "geojson": assert json.loads(text)["features"] == []


# a sample submission

def test_sample_submission_orders_and_completes(folder, tmp_path):
    (tmp_path/"sample.csv").write_text("ImageId,EncodedPixels\n2.png,1 2\nmissing.png,1 2\n1.png,1 2\n2.png,5 1\n")
    result = run(folder, tmp_path/"out.csv", sample_submission=tmp_path/"sample.csv")
    rows = read_csv(tmp_path/"out.csv")
    assert list(rows.ImageId.unique()) == ["2.png", "missing.png", "1.png"] and list(rows[rows.ImageId == "missing.png"].EncodedPixels) == [""]
    assert (result.images, result.ships, list(result.bad.image), list(result.bad.action)) == (3, 4, ["missing.png"], ["empty row"])
    with pytest.raises(ValueError, match="missing.png.*sample.csv lists it"): run(folder, tmp_path/"o.csv", sample_submission=tmp_path/"sample.csv", strict=True)


@pytest.mark.parametrize("text, words", [("Id,Code\na,b\n", "lacks the column ImageId"), ("", "not a readable CSV"), ("ImageId\n", "lists no image"),
                                         ("ImageId\nother.jpg\n", "no image of .* is among the 4")])
def test_wrong_sample_submissions(folder, tmp_path, text, words):
    (tmp_path/"sample.csv").write_text(text)
    with pytest.raises(ValueError, match=words): run(folder, tmp_path/"out.csv", sample_submission=tmp_path/"sample.csv")
    with pytest.raises(FileNotFoundError, match="sample submission"): run(folder, tmp_path/"out.csv", sample_submission=tmp_path/"none.csv")
    assert not (tmp_path/"out.csv").exists()


# hostile input

def png_that_claims(height, width):
    """A PNG of a few bytes whose header claims a size."""
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


@pytest.fixture
def hostile(folder):
    """The good folder with every kind of bad file in it."""
    (folder/"text.jpg").write_text("this is no image")
    (folder/"zero.png").write_bytes(b"")
    (folder/"folder.jpg").mkdir()
    cv2.imwrite(str(folder/"cut.jpg"), noise(64, 64))
    (folder/"cut.jpg").write_bytes((folder/"cut.jpg").read_bytes()[:900])
    (folder/"bomb.png").write_bytes(png_that_claims(100_000, 100_000))
    (folder/"gone.jpg").symlink_to(folder/"nowhere.jpg")
    Image.fromarray(noise(1, 1)).save(folder/"pixel.png")
    (folder/"notes.txt").write_text("ignored")
    return folder


BAD = ["bomb.png", "cut.jpg", "folder.jpg", "gone.jpg", "text.jpg", "zero.png"]


@pytest.mark.parametrize("format", ["csv", "coco", "geojson", "ships"])
def test_bad_images_cost_only_themselves(hostile, tmp_path, format):
    result = run(hostile, tmp_path/"out", format=format)
    assert list(result.bad.image) == BAD and (result.images, result.ships) == (11, 8)
    assert list(result.bad.columns) == ["image", "problem", "action"] and all(0 < len(o) < 200 and "\n" not in o for o in result.bad.problem)
    text = (tmp_path/"out").read_text()
    if format == "csv":
        rows = read_csv(tmp_path/"out")
        assert list(rows[rows.ImageId.isin(BAD)].EncodedPixels) == [""] * 6 and len(rows) == 8 + 6 + 3
    if format == "coco": assert json.loads(text)["info"]["unreadable"] == BAD and len(json.loads(text)["images"]) == 5
    if format == "geojson": assert [o["image"] for o in json.loads(text)["images"] if o["height"] is None] == BAD


def test_strict_stops_at_the_first_and_leaves_nothing(hostile, tmp_path):
    (tmp_path/"out.csv").write_text("earlier")
    with pytest.raises(ValueError, match="1 bad image .bomb.png: 100000 x 100000 pixels"): run(hostile, tmp_path/"out.csv", strict=True)
    assert (tmp_path/"out.csv").read_text() == "earlier" and sorted(o.name for o in tmp_path.iterdir()) == ["images", "out.csv"]


def test_nothing_usable_is_an_error(hostile, tmp_path):
    with pytest.raises(ValueError, match="6 bad images .*; ..."): run([hostile/name for name in BAD], tmp_path/"out.csv")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match="no image files .jpg"): run(tmp_path/"empty", tmp_path/"out.csv")
    with pytest.raises(FileNotFoundError, match="no such file or folder"): run(tmp_path/"nowhere", tmp_path/"out.csv")
    with pytest.raises(ValueError, match="no image files"): run([], tmp_path/"out.csv")
    assert not (tmp_path/"out.csv").exists()


def test_which_images(folder, tmp_path):
    names = lambda images: [o.name for o in image_files(images)]
    (folder/"deep").mkdir()
    shutil.copy(folder/"0.png", folder/"deep"/"x.png")
    for suffix in IMAGE_SUFFIXES: (folder/f"z{suffix.upper()}").write_text("")
    assert names(folder) == [f"{k}.png" for k in range(4)] + sorted(f"z{o.upper()}" for o in IMAGE_SUFFIXES)
    assert names(str(folder/"[01].png")) == ["0.png", "1.png"] and names(folder/"3.png") == ["3.png"] and names(str(folder/"*"/"*.png")) == ["x.png"]
    assert names([folder/"3.png", str(folder/"0.png")]) == ["0.png", "3.png"]
    with pytest.raises(ValueError, match="same name"): image_files([folder/"0.png", folder/"0.png"])


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path/"a[1]").mkdir()
    Image.fromarray(noise(8, 8)).save(tmp_path/"a[1]"/"x.png")
    assert [o.name for o in image_files(tmp_path/"a[1]")] == ["x.png"]


ODD = ['a,b".png', "line\nbreak.png", " leading.png", "=1+1.png", "-rf.png", ".hidden.png", "船.png", "%2e%2e.png", "..\\..\\x.png", "x" * 200 + ".png"]


def test_odd_names(tmp_path):
    images = tmp_path/"images"
    images.mkdir()
    for name in ODD: Image.fromarray(scene(40, 40)).save(images/name)
    shutil.copy(images/"船.png", os.fsencode(images) + b"/\xff\xfe.png")
    run(images, tmp_path/"out.csv", overlays=tmp_path/"pictures")
    rows = read_csv(tmp_path/"out.csv")
    assert set(ODD) | {"\\udcff\\udcfe.png"} == set(rows.ImageId)
    pictures = sorted(o.name for o in (tmp_path/"pictures").iterdir())
    assert len(pictures) == len(ODD) + 1 and all(name.isascii() and name.isprintable() and not set(name) & set("/\\:*?\"<>| ") for name in pictures)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["images", "out.csv", "pictures"]
    for format in ("coco", "geojson", "ships"): run(images, tmp_path/"out2", format=format)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=120), st.text(min_size=1, max_size=120))
def test_overlay_names_are_safe_and_differ(one, two):
    for name in (one, two):
        made = overlay_name(name)
        assert made.isascii() and made.endswith(".png") and len(made) < 150 and "/" not in made and "\0" not in made and not made.startswith(".")
    assert one == two or overlay_name(one) != overlay_name(two)


@pytest.mark.parametrize("workers, pixels, most", [(2, 10**9, 3), (4, 1, 1), (4, 64 * 64 + 50 * 90, 2)])
def test_files_are_read_in_order_and_not_too_far_ahead(folder, monkeypatch, workers, pixels, most):
    started = []
    monkeypatch.setattr(inference, "_image_or_error", lambda path, size: started.append(path) or size)
    paths = [folder/f"{k}.png" for k in (2, 1, 0, 3, 1)]
    waiting = []
    for done, got in enumerate(read_ahead(paths, workers, pixels), 1):
        time.sleep(0.02)
        waiting.append(len(started) - done + 1)
        assert got == (paths[done - 1], {0: (64, 64), 1: (50, 90), 2: (64, 64), 3: (30, 20)}[int(paths[done - 1].stem)])
    assert max(waiting) == most


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("RGBA", "png"), ("P", "png"), ("I;16", "png"), ("1", "tif"), ("RGB", "bmp"), ("RGB", "tiff"), ("CMYK", "jpg")])
def test_image_kinds(tmp_path, mode, suffix):
    grey = np.full((20, 20), 255, np.uint8)
    img = Image.fromarray(np.full((20, 20), 65535, np.uint16)) if mode == "I;16" else Image.fromarray(grey).convert("RGB").convert(mode)
    img.save(tmp_path/f"x.{suffix}")
    result = run(tmp_path/f"x.{suffix}", tmp_path/"out.csv")
    assert (result.ships, len(result.bad)) == (1, 0)


# outputs

def test_output_places(folder, tmp_path):
    run(folder, tmp_path/"new"/"out.csv")
    assert (tmp_path/"new"/"out.csv").is_file()
    with pytest.raises(FileNotFoundError, match="does not exist; make it"): run(folder, tmp_path/"far"/"away"/"out.csv")
    with pytest.raises(ValueError, match="is a folder; name the file"): run(folder, tmp_path)
    with pytest.raises(ValueError, match="is not a folder"): run(folder, tmp_path/"new"/"out.csv"/"x.csv")
    with pytest.raises(ValueError, match="one of the images"): run(folder, folder/"0.png")
    with pytest.raises(OSError, match="cannot write /proc/out.csv"): run(folder, "/proc/out.csv")
    assert not (tmp_path/"far").exists()


def test_a_failed_check_makes_no_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="xml"): run(folder, tmp_path/"new"/"out.csv", format="xml")
    with pytest.raises(ValueError): run([folder/"nothing.png"], tmp_path/"new"/"out.csv")
    assert check_output(tmp_path/"new"/"out.csv") == tmp_path/"new"/"out.csv" and not (tmp_path/"new").exists()


def test_a_disk_that_fills_leaves_the_earlier_file(folder, tmp_path):
    out = tmp_path/"out.csv"
    out.write_text("earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="cannot write .*out.csv: .*free space"): run(folder, out)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_text() == "earlier" and sorted(o.name for o in tmp_path.iterdir()) == ["images", "out.csv"]


def test_overlays(folder, tmp_path):
    run(folder, tmp_path/"out.csv", overlays=tmp_path/"pictures")
    assert sorted(o.name for o in (tmp_path/"pictures").iterdir()) == [f"{k}.png.png" for k in range(4)]
    for k in range(4):
        before, after = (np.asarray(Image.open(o)).astype(int) for o in (folder/f"{k}.png", tmp_path/"pictures"/f"{k}.png.png"))
        changed = np.abs(after - before).sum(-1) > 0
        assert changed.any() == (k % 2 == 0) and changed.mean() < 0.7
    with pytest.raises(ValueError, match="folder of their own"): run(folder, tmp_path/"out.csv", overlays=folder)


def test_overlay_outlines_lie_outside_the_ship():
    img = np.zeros((60, 160, 3), np.uint8)
    labels = np.zeros((60, 160), np.int32)
    labels[30:34, 10:20] = 1
    shown = draw_overlay(img, Prediction(labels, np.array([0.9])))
    assert not shown[labels > 0].any() and shown[29, 10:20].any(-1).all() and shown[34, 10:20].any(-1).all() and shown[30:34, 9].any(-1).all()


def test_large_overlays_are_shrunk():
    img, labels = np.zeros((300, 5000, 3), np.uint8), np.zeros((300, 5000), np.int32)
    labels[100:200, 2000:3000] = 1
    shown = draw_overlay(img, Prediction(labels, np.array([0.9])), longest=1000)
    assert shown.shape == (60, 1000, 3)
    rows, columns = np.nonzero(shown.any(-1)[:, :620])
    assert abs(columns.min() - 400) <= 1 and abs(rows.max() - 40) <= 1


# model folders

def point(**changes):
    return dict(logit=0.5, threshold=float(sigmoid(0.5)), min_area=7, grid=[64, 64], objective="dice_with") | changes


def card(**changes):
    return dict(architecture="unet", encoder="resnet18", classes=1, in_channels=3, size=[32, 32], window=[64, 64], operating_point=point()) | changes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A function that gives a model folder with a card of its own and the same weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    save_model(root/"weights", build_unet("resnet18"), card())

    def make(name, **changes):
        (root/name).mkdir(exist_ok=True)
        shutil.rmtree(root/name)
        (root/name).mkdir()
        (root/name/"model.safetensors").hardlink_to(root/"weights"/"model.safetensors")
        (root/name/"card.json").write_text(json.dumps(card(**changes)))
        return root/name
    return make


def test_load(model_folder):
    a = model_folder("a")
    predictor = Predictor.load(a, device="cpu")
    assert (predictor.logit, predictor.min_area, predictor.window, predictor.size) == (0.5, 7, (64, 64), (32, 32))
    assert not predictor.models[0].training and next(predictor.models[0].parameters()).dtype == torch.float32
    changed = Predictor.load(str(a), threshold=0.5, min_area=3)
    assert (changed.logit, changed.min_area) == (0, 3)
    img = noise(64, 64)
    one, views = (Predictor.load(a, device="cpu", tta=tta).predict(img, logits=True).logits for tta in (False, "d4"))
    twice = Predictor.load([a, a], device="cpu").predict(img, logits=True).logits
    assert np.allclose(one, twice, atol=1e-6) and not np.allclose(one, views, atol=1e-3)


def test_folds_must_agree(model_folder):
    a, b = model_folder("a"), model_folder("b", operating_point=point(logit=1.0, threshold=float(sigmoid(1.0)), min_area=10))
    both = Predictor.load([a, b])
    assert (both.logit, both.min_area) == (0.75, 9)
    for changes in (dict(window=[96, 96]), dict(size=[64, 64])):
        with pytest.raises(ValueError, match=f"c has {next(iter(changes))}"): Predictor.load([a, model_folder("c", **changes)])
    with pytest.raises(ValueError, match="at least one"): Predictor.load([])


def test_an_operating_point_of_another_grid_is_refused(model_folder):
    a = model_folder("a", operating_point=point(grid=[32, 32]))
    with pytest.raises(ValueError, match=r"a: the operating point .* \(32, 32\), but predictions are made on \(64, 64\)"): Predictor.load(a)
    assert Predictor.load(a, threshold=0.5, min_area=0).logit == 0
    with pytest.raises(ValueError, match="many sizes"): Predictor.load(model_folder("a", operating_point=point(grid=None)))


def test_a_model_that_gives_nan_is_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match="not finite"): run(folder, tmp_path/"out.csv", Predictor([Pointwise(bias=math.nan)], (64, 64), (64, 64), 0.0))
    assert not (tmp_path/"out.csv").exists()


def test_a_card_without_operating_point(model_folder, folder, tmp_path):
    a = model_folder("a", operating_point=None)
    with pytest.raises(ValueError, match="run 30_thresholds .* or give threshold"): Predictor.load(a)
    assert run(folder, tmp_path/"out.csv", a, threshold=0.5).images == 4
    for threshold in (0, 1, 50, -1):
        with pytest.raises(ValueError, match="between 0 and 1"): Predictor.load(a, threshold=threshold)
    for min_area in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="min_area"): Predictor.load(a, threshold=0.5, min_area=min_area)
    with pytest.raises(FileNotFoundError, match="not a model folder"): Predictor.load(a.parent/"nowhere")


def test_a_predictor_keeps_its_own_settings(folder, tmp_path):
    for options in (dict(tta="flips"), dict(threshold=0.5), dict(min_area=1)):
        with pytest.raises(ValueError, match="its own tta"): run(folder, tmp_path/"out.csv", bright(), **options)


# real images

real = Path(os.environ.get("SHIPNB_REAL_DATA", ""))/"airbus"


@pytest.mark.skipif(not os.environ.get("SHIPNB_REAL_DATA"), reason="SHIPNB_REAL_DATA is not set: no real images")
def test_a_submission_for_the_real_test_images(tmp_path):
    predictor = Predictor([Pointwise((1 / 40, 1 / 40, -1 / 40), -4.0)], (768, 768), (256, 256), 0.0, min_area=30)
    names, sample = sorted(o.name for o in (real/"test_v2").iterdir()), read_csv(real/"sample_submission_v2.csv")
    result = run(real/"test_v2", tmp_path/"out.csv", predictor, sample_submission=real/"sample_submission_v2.csv")
    rows = read_csv(tmp_path/"out.csv")
    assert list(rows.columns) == list(sample.columns) and list(rows.ImageId.unique()) == list(sample.ImageId.unique()) and result.images == 15606
    assert len(result.bad) == 15606 - len(names) and set(result.bad.image).isdisjoint(names)
    ships = rows[rows.EncodedPixels != ""]
    assert 0 < result.ships == len(ships) and set(ships.ImageId) <= set(names)
    assert (rows[rows.EncodedPixels == ""].ImageId.value_counts() == 1).all() and not set(rows[rows.EncodedPixels == ""].ImageId) & set(ships.ImageId)
    for _, group in ships.groupby("ImageId"): assert sum(rle_decode(o).astype(int) for o in group.EncodedPixels).max() == 1


# prediction and analysis agree

@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A random U-Net whose logits spread around 0, six labelled images of its window, and the Evidence of the pair."""
    root = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(1)
    model = build_unet("resnet18").eval()
    rows, objects = [], []
    for k in range(6):
        img = scene(96, 96, ships=k, seed=k)
        Image.fromarray(img).save(root/f"{k}.png")
        codes = encode_instances(label_instances(cv2.erode((img.min(-1) > 200).astype(np.uint8), np.ones((2, 2))))[0])
        rows.append((f"{k}.png", 96, 96, len(codes), 1, "", ""))
        objects += [(f"{k}.png", "ship", code, *rle_box(code, (96, 96)), rle_area(code)) for code in codes]
    catalog = Catalog(pd.DataFrame(rows, columns=IMAGE_COLUMNS), pd.DataFrame(objects, columns=OBJECT_COLUMNS), root)
    with torch.no_grad():
        z = np.stack(image_logits(model, [catalog.read_image(i) for i in range(6)], (64, 64)))
        for p in model.segmentation_head.parameters(): p.mul_(4 / float(z.std()))
        model.segmentation_head[0].bias -= 4 / float(z.std()) * float(z.mean())
    return model, catalog, collect_evidence(model, catalog, (64, 64), batch_size=4)


@pytest.mark.parametrize("logit, min_area", [(-2.0, 0), (-0.5, 5), (0.0, 0), (0.015625, 12), (1.5, 3), (3.0, 60), (-7.0, 0)])
def test_prediction_and_evidence_agree_bit_for_bit(evaluated, tmp_path, logit, min_area):
    """Scores of the written file, decoded again, are those that Evidence promised for the operating point."""
    model, catalog, evidence = evaluated
    predictor = Predictor([model], (96, 96), (64, 64), logit, min_area, batch_size=5)
    run(catalog.root, tmp_path/"out.csv", predictor)
    rows = read_csv(tmp_path/"out.csv")
    promised = image_scores(evidence, logit, min_area)
    truths = [decode_labels(catalog.rles(i), (96, 96)) for i in range(6)]
    found = [decode_labels([o for o in rows[rows.ImageId == f"{i}.png"].EncodedPixels if o], (96, 96)) for i in range(6)]
    assert (promised.n_pred.tolist(), promised.pred_area.tolist()) == ([o.max() for o in found], [(o > 0).sum() for o in found])
    assert promised.dice.tolist() == [dice(*pair) for pair in zip(found, truths, strict=True)]
    assert promised.iou.tolist() == [iou(*pair) for pair in zip(found, truths, strict=True)]
    assert promised.f2.tolist() == [object_f2(*pair) for pair in zip(found, truths, strict=True)]
    assert logit > 2 or max(o.max() for o in found) > 1
    for img in (catalog.read_image(i) for i in range(6)):
        z = image_logits(model, [img], (64, 64))[0]
        prediction = predictor.predict(img, logits=True)
        assert np.array_equal(prediction.logits, z) and np.array_equal(prediction.labels, keep(z, logit, min_area))
