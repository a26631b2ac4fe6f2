"""Region proposals: the grouping against one made from pixels alone, the boxes of a crack, names that hold what they say, lists that are never stale."""
import json
import os
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from shipnb.dataset import to_input
from shipnb.fleet_tasks import make_cracks, make_road
from shipnb.formats import image_files, read
from shipnb.masks import render_mask
from shipnb.metrics import box_iou
from shipnb.proposals import (TorchTransform, _texture_levels, best_ious, crack_augmentation, crack_transforms, crop_name, cut_crops, group_regions, list_files, neighbours, parse_crop_name,
                              propose, read_crops, region_features, selective_search, sliding_windows, tile_boxes, true_boxes)


@pytest.fixture(scope="module")
def roads(tmp_path_factory): return read(make_cracks(tmp_path_factory.mktemp("proposals")/"roads", images=3, seed=3))


def patchwork(seed, shape=(36, 40), regions=14):
    """An image and regions of it, numbered 0 to n - 1: each pixel belongs to the nearest of some points."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:shape[0], :shape[1]]
    spots = rng.uniform(0, shape, (regions, 2))
    labels = np.unique(np.hypot(y[..., None] - spots[:, 0], x[..., None] - spots[:, 1]).argmin(-1), return_inverse=True)[1].reshape(shape)
    img = rng.integers(0, 256, (regions, 3))[labels] + rng.normal(0, 25, (*shape, 3))
    return np.clip(img, 0, 255).astype(np.uint8), labels


def plain_similarity(img, levels, a, b):
    """The four terms of the paper for two sets of pixels (bool), counted from the pixels."""
    def shares(mask):
        colour = np.concatenate([np.bincount(img[..., c][mask].astype(int) * 25 // 256, minlength=25) for c in range(3)]) / (3 * mask.sum())
        texture = np.concatenate([np.bincount(o[mask], minlength=10) for o in levels]) / (len(levels) * mask.sum())
        return colour, texture
    (c1, t1), (c2, t2) = shares(a), shares(b)
    rows, columns = np.nonzero(a | b)
    around = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    size, fill = 1 - (a.sum() + b.sum()) / a.size, 1 - (around - a.sum() - b.sum()) / a.size
    return np.minimum(c1, c2).sum() + np.minimum(t1, t2).sum() + size + fill


def plain_groups(img, labels):
    """Boxes of all regions and groups, every similarity computed anew at each step."""
    levels, masks = _texture_levels(img), {k: labels == k for k in range(labels.max() + 1)}
    touch = {tuple(o) for o in neighbours(labels).tolist()}
    boxes = [box_of(o) for o in masks.values()]
    while touch:
        a, b = max(sorted(touch), key=lambda o: plain_similarity(img, levels, masks[o[0]], masks[o[1]]))
        new = len(boxes)
        masks[new] = masks.pop(a) | masks.pop(b)
        boxes.append(box_of(masks[new]))
        touch = {tuple(sorted({new if o in (a, b) else o for o in pair})) for pair in touch if set(pair) != {a, b}}
    return boxes


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("seed", range(6))
def test_regions_are_grouped_as_the_paper_s_sum_says(seed):
    img, labels = patchwork(seed)
    assert group_regions(*region_features(img, labels), neighbours(labels), labels.size).tolist() == plain_groups(img, labels)


def test_neighbours_touch_by_an_edge():
    labels = patchwork(1)[1]
    slow = {tuple(sorted((int(labels[y, x]), int(labels[y + dy, x + dx])))) for dy, dx in ((0, 1), (1, 0)) for y in range(labels.shape[0] - dy) for x in range(labels.shape[1] - dx) if labels[y, x] != labels[y + dy, x + dx]}
    assert {tuple(o) for o in neighbours(labels).tolist()} == slow


def test_a_flat_image_is_one_region():
    assert selective_search(np.full((64, 80, 3), 90, np.uint8)).tolist() == [[0, 0, 80, 64]]


def test_proposals_lie_in_the_image_and_the_lot_is_of_them():
    img = make_road(1, 0)[0]
    every, some = propose(img), propose(img, most=30, seed=2)
    assert (every[:, :2] >= 0).all() and (every[:, 2:] <= (480, 320)).all() and (every[:, 2:] > every[:, :2]).all()
    assert len(some) == 30 and {tuple(o) for o in some.tolist()} <= {tuple(o) for o in every.tolist()}
    assert propose(img, most=30, seed=2).tolist() == some.tolist() != propose(img, most=30, seed=3).tolist()


@pytest.mark.parametrize("shape, side, step", [((320, 480), 64, 32), ((65, 130), 64, 50), ((40, 40), 40, 7), ((33, 90), 10, 10)])
def test_windows_are_square_inside_and_reach_every_pixel(shape, side, step):
    seen, boxes = np.zeros(shape, int), sliding_windows(shape, side, step)
    for x0, y0, x1, y1 in boxes:
        assert (x1 - x0, y1 - y0) == (side, side) and min(x0, y0) >= 0 and x1 <= shape[1] and y1 <= shape[0]
        seen[y0:y1, x0:x1] += 1
    assert len(np.unique(boxes, axis=0)) == len(boxes) and (seen.all() or step > side)


@pytest.mark.parametrize("seed", range(8))
def test_squares_along_a_crack_against_a_loop_over_tiles(seed):
    rng = np.random.default_rng(seed)
    shape, side = tuple(rng.integers(40, 120, 2).tolist()), int(rng.integers(8, 40))
    mask, least = (rng.random(shape) < 0.02).astype(np.uint8), int(rng.integers(1, 6))
    slow = []
    for top in range(0, shape[0], side):
        for left in range(0, shape[1], side):
            rows, columns = np.nonzero(mask[top:top + side, left:left + side])
            if len(rows) < least: continue
            y0, x0 = (int(np.clip(np.rint(start + o.mean() + 0.5 - side / 2), 0, n - side)) for start, o, n in ((top, rows, shape[0]), (left, columns, shape[1])))
            slow.append([x0, y0, x0 + side, y0 + side])
    assert tile_boxes(mask, side, least).tolist() == slow


def test_best_iou_is_the_metrics_own():
    rng = np.random.default_rng(0)
    boxes, truth = (np.sort(rng.integers(0, 60, (n, 2, 2)), 1).reshape(n, 4) + (0, 0, 1, 1) for n in (50, 9))
    assert np.allclose(best_ious(boxes, truth), box_iou(boxes, truth).max(1), atol=1e-12, rtol=0)
    assert best_ious(boxes, np.zeros((0, 4))).tolist() == [0] * 50 and best_ious(np.zeros((0, 4)), truth).shape == (0,)


def test_true_boxes_of_objects_are_the_catalog_s(roads):
    for i in range(len(roads)):
        rows = roads.objects[roads.objects["image"] == roads.images["image"][i]]
        assert true_boxes(roads, i, "objects").tolist() == rows[["x0", "y0", "x1", "y1"]].to_numpy().tolist()


def as_the_document_reads(name):
    """IoU and label by the place of the dots."""
    parts = name.split(".")
    return float(parts[2].replace("_", ".")), int(parts[3])


@pytest.mark.parametrize("image", ["a.jpg", "010.jpg", "0.0.png", "roads.v2/0.12.png", "1.000000.jpg"])
@pytest.mark.parametrize("iou", [0, 1, 0.5, 0.500001, 0.123456])
def test_names_say_what_was_put_in(image, iou):
    name = crop_name(image, 3, iou, int(iou > 0.5))
    assert parse_crop_name(name) == as_the_document_reads(name) == (iou, int(iou > 0.5))


def test_crops_hold_the_pixels_of_their_boxes_and_the_label_of_their_iou(roads, tmp_path):
    catalog = read_crops(cut_crops(roads, tmp_path/"cut", by="windows", size=64, suffix=".png"))
    windows = sliding_windows((320, 480))
    assert len(catalog) == 3 * len(windows) and set(catalog.images["group"]) == {"001", "002", "003"}
    for row in catalog.images.sample(40, random_state=0).itertuples():
        i, k = int(row.group) - 1, int(row.image.split(".")[1])
        x0, y0, x1, y1 = windows[k]
        assert (cv2.imread(str(catalog.root/row.image))[..., ::-1] == roads.read_image(i)[y0:y1, x0:x1]).all()
        assert row.iou == round(float(box_iou([windows[k]], tile_boxes(sum_mask(roads, i)))[0].max(initial=0)), 6) and row.category == str(int(row.iou > 0.5))
    table = json.loads((tmp_path/"cut"/"recall.json").read_text())
    assert [o[4] for o in table] == [int((catalog.images["category"][catalog.images["group"] == g] == "1").sum()) for g in ("001", "002", "003")]


def sum_mask(catalog, i): return render_mask(catalog.rles(i), catalog.shape(i), catalog.shape(i))


def test_crops_are_cut_anew_for_other_images_and_settings_only(roads, tmp_path):
    first = cut_crops(roads.subset([0]), tmp_path/"cut", by="windows", size=16)
    before = os.stat(first/"crops").st_mtime_ns
    assert os.stat(cut_crops(roads.subset([0]), tmp_path/"cut", by="windows", size=16)/"crops").st_mtime_ns == before
    assert os.stat(cut_crops(roads.subset([0]), tmp_path/"cut", by="windows", size=24)/"crops").st_mtime_ns != before
    assert cv2.imread(str(next((tmp_path/"cut"/"crops").iterdir()))).shape == (24, 24, 3)


def test_two_images_with_the_same_crop_names_are_refused(roads, tmp_path):
    twins = roads.subset([0, 1])
    twins.images["image"] = ["a.b.jpg", "a-b.jpg"]
    with pytest.raises(ValueError, match="same names of crops"): cut_crops(twins, tmp_path/"cut")


# --- lists of files

def fill(folder, names):
    folder.mkdir(exist_ok=True)
    for o in names: Image.new("RGB", (4, 4)).save(folder/o)


def rest(folder): os.utime(folder, (10**9, 10**9))     # as if it had not changed for years


def test_a_list_is_used_while_the_folder_rests(tmp_path, monkeypatch):
    fill(tmp_path/"x", ["b.jpg", "a.jpg"])
    rest(tmp_path/"x")
    assert list_files(tmp_path/"x", tmp_path/"list.json") == ["a.jpg", "b.jpg"]
    monkeypatch.setattr("shipnb.proposals.image_files", lambda root: pytest.fail("listed again"))
    assert list_files(tmp_path/"x", tmp_path/"list.json") == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "folder"])
def test_a_stale_list_is_made_anew(tmp_path, change):
    folder = tmp_path/"x"
    fill(folder, ["a.jpg", "b.jpg"])
    rest(folder)
    list_files(folder, tmp_path/"list.json")
    if change == "add": fill(folder, ["c.jpg"])
    if change == "remove": (folder/"a.jpg").unlink()
    if change == "rename": (folder/"a.jpg").rename(folder/"z.jpg")
    if change == "folder": fill(folder/"sub", ["d.jpg"])
    assert list_files(folder, tmp_path/"list.json") == image_files(folder)


def test_a_list_of_a_folder_that_just_changed_is_not_trusted(tmp_path):
    fill(tmp_path/"x", ["a.jpg"])
    list_files(tmp_path/"x", tmp_path/"list.json")
    assert json.loads((tmp_path/"list.json").read_text())["state"] is None


def test_the_list_of_another_folder_is_not_taken(tmp_path):
    for name in "xy":
        fill(tmp_path/name, [f"{name}.jpg"])
        rest(tmp_path/name)
    list_files(tmp_path/"x", tmp_path/"list.json")
    assert list_files(tmp_path/"y", tmp_path/"list.json") == ["y.jpg"]


def test_a_foreign_list_is_refused(tmp_path):
    fill(tmp_path/"x", ["a.jpg"])
    (tmp_path/"list.json").write_text('["a.jpg"]')
    with pytest.raises(ValueError, match="not a list of files made here"): list_files(tmp_path/"x", tmp_path/"list.json")


# --- transforms

def test_the_document_s_normalisation_is_to_input():
    img = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    assert torch.allclose(crack_transforms(False)(Image.fromarray(img)), to_input(torch.from_numpy(img)[None])[0], atol=2e-6)


def test_the_pipeline_is_the_document_s():
    names = [type(o).__name__ for o in crack_transforms(True).transforms]
    assert names == ["Compose", "ToImage", "ToDtype", "Normalize"]
    jitter, flip, turn = crack_augmentation().transforms
    assert (jitter.brightness, flip.p, turn.degrees) == ((0.5, 1.5), 0.5, [-180.0, 180.0]) and [type(o).__name__ for o in crack_transforms(False).transforms] == names[1:]


def test_the_adapter_draws_from_its_seed_alone():
    img, adapter = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8), TorchTransform(crack_augmentation())
    adapter.set_random_seed(5)
    before = torch.get_rng_state()
    out = adapter(image=img)["image"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert (out == crack_augmentation()(torch.from_numpy(img).permute(2, 0, 1)).permute(1, 2, 0).numpy()).all()
    with pytest.raises(RuntimeError, match="broken"): TorchTransform(v2.Lambda(broken))(image=img)
    assert not torch.equal(torch.get_rng_state(), before)     # manual_seed above, not the failed call


def broken(x): raise RuntimeError("broken")


# --- real images

def test_windows_hit_the_squares_along_real_cracks(real_data):
    with pytest.warns(UserWarning, match="no mask"): catalog = read(real_data/"crackforest")
    windows, hit, boxes = sliding_windows((320, 480)), 0, 0
    for i in range(len(catalog)):
        true = true_boxes(catalog, i, "tiles")
        hit, boxes = hit + int((best_ious(true, windows) > 0.5).sum()), boxes + len(true)
    assert len(catalog) == 118 and boxes > 1000 and hit / boxes > 0.9
    start = time.process_time()
    selective_search(catalog.read_image(0))
    assert time.process_time() - start < 2
