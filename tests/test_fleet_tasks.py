"""Synthetic data for every task: the truth is what was painted, each reader takes each folder, the same seed gives the same bytes, faults are those listed."""
import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from scipy.io import loadmat

from shipnb import fleet_tasks as ft
from shipnb.catalog import read_airbus
from shipnb.fleet import make_fleet
from shipnb.formats import read, read_bounds, read_coco, read_folders, read_masks, read_severstal, read_voc
from shipnb.masks import rle_decode

BOX = ["x0", "y0", "x1", "y1"]
SIZES = {"steel": 10, "tanks": 8, "spot": 1, "cracks": 8, "chips": 12, "voc": 6, "faults": 16}


def options(kind): return dict(images=SIZES[kind]) | (dict(each=1) if kind == "faults" else dict(side=768) if kind == "spot" else {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    return {kind: ft.make_task(kind, root/kind, **options(kind)) for kind in ft.MAKERS}


def brute_boxes(labels):
    """Box of each number, pixel by pixel."""
    out = []
    for n in range(1, int(labels.max()) + 1):
        rows, columns = np.nonzero(labels == n)
        out.append([int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])
    return out


def decoded(code, shape):
    """A run-length code as a mask, by the definition: start, length, column by column from 1."""
    flat, numbers = np.zeros(shape[0] * shape[1], np.uint8), list(map(int, code.split()))
    for start, length in zip(numbers[::2], numbers[1::2]): flat[start - 1:start - 1 + length] = 1
    return flat.reshape(shape[::-1]).T


# truth

def test_steel_truth(made):
    catalog, classes = read_severstal(made["steel"]), Counter()
    table = pd.read_csv(made["steel"]/"train.csv")
    for k in range(SIZES["steel"]):
        img, truth = ft.make_strip(0, k)
        assert img.shape == truth.shape == (256, 1600) and set(np.unique(truth)) <= {0, 1, 2, 3, 4}
        name, written = f"steel_0_{k:05d}.jpg", np.zeros((256, 1600), int)
        for o in table[table["ImageId"] == name].itertuples(): written += o.ClassId * decoded(o.EncodedPixels, (256, 1600))
        assert (written == truth).all()
        mine = catalog.objects[catalog.objects["image"] == name]
        expected = {f"defect_{c}": brute_boxes(truth == c)[0] for c in (1, 2, 3, 4) if (truth == c).any()}
        assert dict(zip(mine["label"], mine[BOX].to_numpy().tolist())) == expected
        classes.update(list(expected))
        assert np.abs(catalog.read_image(k).astype(int) - img[..., None]).mean() < 4     # JPEG
    assert len(catalog) == 10 and (catalog.counts == 0).any() and catalog.counts.sum() == sum(classes.values()) > 3


def test_all_four_kinds_of_defect_occur_and_change_the_picture():
    seen = Counter()
    for k in range(30): seen.update(np.unique(ft.make_strip(1, k)[1]).tolist())
    assert set(seen) == {0, 1, 2, 3, 4} and seen[3] > seen[2]


def test_tank_truth(made):
    data = {split: json.loads((made["tanks"]/f"{split}.json").read_text()) for split in ("train", "validation")}
    assert [len(o["images"]) for o in data.values()] == [6, 2]
    total = 0
    for o in data.values():
        for image in o["images"]:
            _, labels = ft.make_site(0, image["id"] - 1)
            mine = [a for a in o["annotations"] if a["image_id"] == image["id"]]
            assert [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)] == brute_boxes(labels)
            assert [a["area"] for a in mine] == [int((labels == n).sum()) for n in range(1, len(mine) + 1)]
            total += len(mine)
    catalog = read_coco(made["tanks"])
    assert catalog.counts.sum() == total > 20 and set(catalog.images["split"]) == {"train", "validation"}


def test_a_whole_tank_is_round():
    """Area of the disc and sides of its box agree with one radius."""
    for k in range(6):
        _, labels = ft.make_site(2, k)
        for n, (x0, y0, x1, y1) in enumerate(brute_boxes(labels), 1):
            if min(x0, y0) == 0 or max(x1, y1) == 512: continue
            area, side = (labels == n).sum(), (x1 - x0 + y1 - y0) / 2
            assert abs(x1 - x0 - (y1 - y0)) <= 1 and abs(2 * np.sqrt(area / np.pi) - side) < 1.2


def test_spot_truth(made):
    catalog = read_bounds(made["spot"])
    _, labels = ft.make_site(0, 10**6, (768, 768), 5, 0.45)
    assert catalog.objects[BOX].to_numpy().tolist() == brute_boxes(labels) and len(brute_boxes(labels)) > 10
    assert set(catalog.objects["label"]) == {"oil-storage-tank"}


def test_crack_truth(made):
    catalog, widths = read_masks(made["cracks"]), []
    for k in range(SIZES["cracks"]):
        _, truth = ft.make_road(0, k)
        plane = loadmat(made["cracks"]/"groundTruth"/f"{k + 1:03d}.mat")["groundTruth"][0, 0]["Segmentation"]
        assert (plane == truth + 1).all()
        together = sum((rle_decode(o, (320, 480)).astype(int) for o in catalog.rles(k)), np.zeros((320, 480), int))
        assert (together == truth).all() and catalog.counts[k] == ndimage.label(truth, np.ones((3, 3)))[1]
        if truth.any(): widths.append(2 * ndimage.distance_transform_edt(truth).max())
    assert 0 < len(widths) and max(widths) > 1.5 * min(widths)
    assert set(catalog.objects["label"]) <= {"crack"}


def test_voc_truth(made):
    catalog, found = read_voc(made["voc"]), {}
    for k in range(SIZES["voc"]):
        kind, img, labels = ft._voc_window(0, k)
        name = f"{kind}/{kind[0]}{k:04d}.png"
        assert (catalog.read_image(catalog.images["image"].tolist().index(name)) == img).all()
        mine = catalog.objects[catalog.objects["image"] == name]
        assert mine[BOX].to_numpy().tolist() == brute_boxes(labels)
        assert mine["label"].tolist() == [brute_kind(labels == n) for n in range(1, len(mine) + 1)]
        if labels.any():
            first = ElementTree.parse(made["voc"]/f"{kind}_labels"/f"{kind[0]}{k:04d}.xml").find("object/bndbox")
            x0, y0, x1, y1 = brute_boxes(labels)[0]
            assert [int(first.findtext(o)) for o in ("xmin", "ymin", "xmax", "ymax")] == [x0 + 1, y0 + 1, x1, y1]
        found[name] = kind
        assert {"sea": 0, "coast": 0, "ship": 1}.get(kind, len(mine)) == len(mine) and (kind != "multi" or len(mine) >= 2)
    assert dict(zip(catalog.images["image"], catalog.images["category"])) == found


def brute_kind(mask):
    """The class by trying 1800 directions: the rectangle of least area has the longer side that decides."""
    spots = np.argwhere(mask)
    corners = np.concatenate([spots + (a, b) for a in (0, 1) for b in (0, 1)])
    angle = np.linspace(0, np.pi / 2, 1800, endpoint=False)
    u, v = corners @ np.stack([np.cos(angle), np.sin(angle)]), corners @ np.stack([-np.sin(angle), np.cos(angle)])
    a, b = np.ptp(u, axis=0), np.ptp(v, axis=0)
    best = (a * b).argmin()
    length = max(a[best], b[best])
    return "boat" if length < 16 else "vessel" if length < 60 else "carrier"


def test_kinds_of_ships_by_known_rectangles():
    for length, kind in ((15, "boat"), (17, "vessel"), (59, "vessel"), (61, "carrier")):
        mask = np.zeros((80, 80), np.uint8)
        mask[10:14, 5:5 + length] = 1
        assert ft.ship_kind(mask) == ft.ship_kind(mask.T) == kind


def test_chip_truth(made):
    """Ship chips have their ship in the middle, whole; the counts are those asked for."""
    catalog = read_folders(made["chips"])
    assert Counter(catalog.images["category"]) == {"ship": 4, "no-ship": 8} and Counter(catalog.images["split"]) == {"train": 11, "valid": 1}
    assert all(catalog.shape(i) == (80, 80) for i in range(12)) and (catalog.counts == (catalog.images["category"] == "ship")).all()
    img, labels = ft.make_scene(0, 5001)
    img[labels > 0] = (255, 0, 255)                                    # marks every ship
    whole, cut = ft._ship_chips(img, labels)
    for chip in whole:
        marked = (chip == (255, 0, 255)).all(2)
        assert marked[36:44, 36:44].any()
    for chip in ft._other_chips(np.random.default_rng(0), img, labels, 50): assert not (chip == (255, 0, 255)).all(2).any()


# readers, determinism

@pytest.mark.parametrize("kind", [o for o in ft.MAKERS if o != "faults"])
def test_readers_find_no_problem(made, kind):
    catalog = read(made[kind])
    assert len(catalog.check()) == 0 and len(catalog) == SIZES[kind]


@pytest.mark.parametrize("kind", ft.MAKERS)
def test_same_seed_same_bytes(made, kind, tmp_path):
    again, other = (ft.make_task(kind, tmp_path/str(seed), **options(kind), seed=seed) for seed in (0, 1))
    content = lambda root: {o.relative_to(root).as_posix(): o.read_bytes() for o in sorted(Path(root).rglob("*")) if o.is_file()}
    assert content(again) == content(made[kind])
    assert set(content(other).values()) != set(content(again).values())


# not trivial

def best_threshold_dice(pictures):
    """Mean Dice of the best single brightness, darker or brighter, chosen with the truth."""
    scores = []
    for grey, truth in pictures:
        inside, every = (np.bincount(o, minlength=256) for o in (grey[truth > 0], grey.ravel()))
        both = [(inside[::d].cumsum(), every[::d].cumsum()) for d in (1, -1)]
        scores.append([2 * i / (e + truth.sum()) for i, e in both])
    return np.mean(scores, axis=0).max()


def test_one_brightness_does_not_solve_it():
    steel = [(img, (truth > 0).astype(int)) for img, truth in (ft.make_strip(3, k) for k in range(14)) if truth.any()]
    tanks = [(cv2.cvtColor(img, cv2.COLOR_RGB2GRAY), (labels > 0).astype(int)) for img, labels in (ft.make_site(3, k) for k in range(12)) if labels.any()]
    cracks = [(cv2.cvtColor(img, cv2.COLOR_RGB2GRAY), truth.astype(int)) for img, truth in (ft.make_road(3, k) for k in range(12)) if truth.any()]
    for pictures, limit in ((steel, 0.5), (tanks, 0.6), (cracks, 0.5)): assert len(pictures) > 5 and best_threshold_dice(pictures) < limit


# faults

def test_faults_are_those_listed(made, tmp_path):
    clean, faulty = read_airbus(make_fleet(tmp_path/"clean", 16, 0)), read_airbus(made["faults"])
    listed = pd.read_csv(made["faults"]/"faults.csv")
    assert sorted(listed["fault"]) == sorted(ft.FAULTS) and listed["image"].is_unique
    fault = dict(zip(listed["image"], listed["fault"]))
    before, after = ({name: o.rles(i) for i, name in enumerate(o.images["image"])} for o in (clean, faulty))
    for name in before:
        same = (made["faults"]/"train_v2"/name).read_bytes() == (tmp_path/"clean"/"train_v2"/name).read_bytes()
        assert same == (fault.get(name) not in ("truncated", "wrong size", "blue border"))
        if fault.get(name) == "ship left out": assert len(after[name]) == len(before[name]) - 1 and set(after[name]) < set(before[name])
        elif fault.get(name) == "ship moved": assert len(after[name]) == len(before[name]) and len(set(after[name]) - set(before[name])) == 1
        elif name in after: assert after[name] == before[name]
    assert faulty.check()["image"].tolist() == [name for name in sorted(fault) if fault[name] == "truncated"]
    sizes = faulty.images.set_index("image")[["height", "width"]]
    assert sizes.index[(sizes != 768).any(axis=1)].tolist() == [name for name in sorted(fault) if fault[name] == "wrong size"]
    blue = next(name for name in fault if fault[name] == "blue border")
    column = int(listed.set_index("image")["detail"][blue].split()[-1])
    img = faulty.read_image(faulty.images["image"].tolist().index(blue)).astype(int)
    assert np.abs(img[:, column + 8:] - (0, 0, 255)).max() < 12


# errors

@pytest.mark.parametrize("kind", ft.MAKERS)
def test_makers_refuse_bad_requests_and_full_folders(kind, tmp_path):
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"): ft.make_task(kind, tmp_path/"full", images=12)
    for bad in (dict(images=0), dict(images=12, seed=-1), dict(images=2.5)):
        with pytest.raises(ValueError, match="must be a whole number"): ft.make_task(kind, tmp_path/"new", **bad)
    assert not (tmp_path/"new").exists() and [o.name for o in (tmp_path/"full").iterdir()] == ["mine.txt"]


def test_other_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown kind 'cars'"): ft.make_task("cars", tmp_path/"a")
    with pytest.raises(ValueError, match="valid must be"): ft.make_tanks(tmp_path/"a", valid=1)
    with pytest.raises(ValueError, match="each must be"): ft.make_faults(tmp_path/"a", each=0)
    with pytest.raises(ValueError, match="1..n"): ft._true_boxes(np.array([[0, 2]]))
