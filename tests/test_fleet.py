"""The synthetic fleet: same bytes for any number of workers, exact truth, real proportions, refusals."""
import numpy as np
import pandas as pd
import pytest

from shipnb import fleet
from shipnb.catalog import read_airbus
from shipnb.masks import decode_labels, rle_decode


@pytest.fixture(scope="module")
def root(tmp_path_factory): return fleet.make_fleet(tmp_path_factory.mktemp("fleet")/"a", images=40, seed=5, workers=2)


def test_same_seed_same_bytes_for_any_number_of_workers(root, tmp_path):
    again = fleet.make_fleet(tmp_path/"b", images=7, seed=5, workers=1)
    names = sorted(o.name for o in (again/"train_v2").iterdir())
    assert len(names) == 7 and all((again/"train_v2"/o).read_bytes() == (root/"train_v2"/o).read_bytes() for o in names)
    rows = pd.read_csv(root/"train_ship_segmentations_v2.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(pd.read_csv(again/"train_ship_segmentations_v2.csv", keep_default_na=False), rows[rows["ImageId"].isin(names)].reset_index(drop=True))


def test_another_seed_gives_other_images(root, tmp_path):
    other = fleet.make_fleet(tmp_path/"c", images=2, seed=6)
    assert not {o.name for o in (other/"train_v2").iterdir()} & {o.name for o in (root/"train_v2").iterdir()}


def test_layout_and_catalog(root):
    catalog = read_airbus(root)
    assert len(catalog) == 40 and len(catalog.check()) == 0
    assert set(zip(catalog.images["height"], catalog.images["width"])) == {(768, 768)}
    assert catalog.images["group"].value_counts().tolist() == [2] * 20
    assert catalog.images["image"].str.fullmatch(r"[0-9a-f]{9}\.jpg").all() and catalog.images["image"].is_unique


def test_truth_is_disjoint_and_has_no_empty_ship(root):
    catalog = read_airbus(root)
    for i in np.flatnonzero(catalog.counts):
        total = sum(rle_decode(o).astype(int) for o in catalog.rles(i))
        assert total.max() == 1 and (catalog.objects["area"] > 0).all()


def test_codes_are_the_painted_labels():
    """The labels a scene was painted with, window by window, are the codes that are written."""
    img, labels = fleet.make_scene(5, 3)
    for window in (0, 1):
        cut = labels[:, 768 * window:768 * (window + 1)]
        codes = [o for o in fleet.encode_instances(cut) if o]
        assert (decode_labels(codes) > 0).sum() == (cut > 0).sum() and len(codes) == len(np.unique(cut[cut > 0]))


def test_hulls_are_as_long_and_wide_as_asked():
    """Truth area against the hull polygon's own (shoelace), for ships from 6 to 380 px at random angles."""
    rng = np.random.default_rng(0)
    for length in np.geomspace(6, 380, 25):
        ship = fleet.Ship(400 + rng.random(), 400 + rng.random(), length, length / 4, rng.uniform(0, 7), False)
        *_, cover = fleet.draw_ship(rng, ship)
        x, y = ship.hull().T
        area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
        border = 2.5 * length                                       # the fine polygon includes its outline: about a third of a pixel
        assert abs(cover.sum() - area) <= 0.4 * border + 1


def test_counts_and_sizes_follow_the_label_tables():
    rng = np.random.default_rng(1)
    counts = np.array([fleet.draw_count(rng) for _ in range(20000)])
    lengths = np.array([fleet.draw_size(rng, n)[0] for n in counts for _ in range(n)])
    assert abs((counts > 0).mean() - fleet.SHIP_IMAGES) < 0.015
    assert abs((counts == 1).sum() / (counts > 0).sum() - 0.637) < 0.02
    assert abs((counts == 2).sum() / (counts > 0).sum() - 0.180) < 0.02
    for share, real in ((0.1, 10.7), (0.5, 33.5), (0.9, 138.1)): assert abs(np.log(np.quantile(lengths, share) / real)) < 0.05
    for count, quantiles in ((1, (11.2, 41.0, 190.2)), (3, (11.0, 35.6, 127.1)), (8, (10.0, 29.0, 82.1))):   # by the ships in the image
        found = np.quantile([fleet.draw_size(rng, count)[0] for _ in range(20000)], (0.1, 0.5, 0.9))
        assert (np.abs(np.log(found / quantiles)) < 0.05).all()


def test_one_brightness_does_not_find_the_ships(root):
    best = fleet.brightness_dice(read_airbus(root)).max()
    assert 0.02 < best < 0.35


def test_brightness_dice_is_brute_force(root):
    catalog = read_airbus(root).subset(np.arange(10))
    want = []
    for i in np.flatnonzero(catalog.counts):
        truth, grey = decode_labels(catalog.rles(i)) > 0, catalog.read_image(i).max(axis=2)
        want.append([2 * ((grey >= t) & truth).sum() / ((grey >= t).sum() + truth.sum()) for t in (0, 40, 200)])
    assert np.allclose(fleet.brightness_dice(catalog, levels=(0, 40, 200)), np.mean(want, axis=0))


def test_touching_ships_share_no_pixel():
    rng, look = np.random.default_rng(0), fleet.draw_look(np.random.default_rng(0))
    scene, labels = np.zeros((768, 1536, 3), np.float32), np.zeros((768, 1536), np.int32)
    water, blocked = labels == 0, labels > 0
    first = fleet.Ship(300, 300, 80, 20, 0.3, False)
    assert fleet.place_ship(rng, first, scene, labels, blocked, look, water)
    before = (labels == 1).sum()
    assert fleet.place_ship(rng, fleet._alongside(rng, first, 70, 18), scene, labels, blocked, look, water)
    assert (labels == 1).sum() == before and (labels == 2).sum() > 0.8 * 70 * 18 * 0.85
    import cv2
    assert cv2.connectedComponents((labels > 0).astype(np.uint8), connectivity=8)[0] == 2     # one component: they touch
    assert not fleet.place_ship(rng, first, scene, labels, blocked, look, water)              # no room on top of another


@pytest.mark.parametrize("kwargs,why", [(dict(images=0), "images"), (dict(images=2.5), "images"), (dict(seed=-1), "seed"), (dict(workers=-2), "workers")])
def test_wrong_arguments(tmp_path, kwargs, why):
    with pytest.raises(ValueError, match=f"{why} must be a whole number"): fleet.make_fleet(tmp_path/"x", **kwargs)
    assert not (tmp_path/"x").exists()


def test_a_folder_with_anything_in_it_is_refused(tmp_path):
    (tmp_path/"x").mkdir()
    (tmp_path/"x"/"thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="not an empty folder"): fleet.make_fleet(tmp_path/"x", images=1)
    assert [o.name for o in (tmp_path/"x").iterdir()] == ["thesis.tex"]


def test_statistics_of_known_images():
    flat = np.full((256, 256, 3), 51, np.uint8)
    assert fleet.image_statistics(flat)["brightness"] == pytest.approx(0.2) and fleet.image_statistics(flat)["gradient"] == 0
    step = np.zeros((64, 64), np.uint8)
    labels = np.zeros((64, 64), np.int32)
    labels[20:30, 20:40], step[20:30, 20:40] = 1, 100
    assert fleet.ship_contrasts(np.dstack([step] * 3), labels) == pytest.approx([100])
    noise = np.random.default_rng(0).normal(128, 20, (768, 768)).clip(0, 255).astype(np.uint8)
    assert abs(fleet.image_statistics(np.dstack([noise] * 3))["slope"]) < 0.2                 # white noise has a flat spectrum
    assert fleet.statistic_distance(np.arange(9.0) + 1, np.arange(9.0)) == pytest.approx(1 / np.std(np.arange(9)))
