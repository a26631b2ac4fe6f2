"""Cleaning: every rule finds its planted fault and nothing else; tables against counting by hand; nothing is dropped unasked."""
import shutil
from functools import partial

import cv2
import numpy as np
import pandas as pd
import pytest

from shipnb import cleaning
from shipnb.catalog import read_airbus
from shipnb.fleet import make_fleet

PIXEL_RULES = ["missing", "unreadable", "bad_label", "wrong_size", "wrong_mode", "solid_colour", "mostly_border", "mostly_cloud", "noise"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet of 16 images, without those that are rim or cloud by nature."""
    root = make_fleet(tmp_path_factory.mktemp("cleaning")/"fleet", 16, seed=3)
    catalog = read_airbus(root)
    return root, catalog


def jpeg(img, quality=90):
    return cv2.imencode(".jpg", img if img.ndim == 2 else img[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def rimmed(img, colour, columns, side):
    """`img` with a rim of whole columns or rows."""
    img = img.copy()
    cut = {"left": np.s_[:, :columns], "right": np.s_[:, -columns:], "top": np.s_[:columns], "bottom": np.s_[-columns:]}[side]
    img[cut] = colour
    return img


def faults_of(img):
    """{file: (bytes, the one pixel rule that must find it)} of faults made from a good image."""
    rng, whole = np.random.default_rng(5), jpeg(img)
    grain = np.clip(rng.normal(120, 50, img.shape), 0, 255).astype(np.uint8)
    haze = cv2.resize(rng.normal(210, 12, (10, 10, 1)), (768, 768), interpolation=cv2.INTER_CUBIC)[..., None].clip(160, 250).astype(np.uint8).repeat(3, axis=2)
    return {"half.jpg": (whole[:len(whole) // 2], "unreadable"), "tail.jpg": (whole[:-40], "unreadable"), "text.jpg": (b"no image", "unreadable"), "empty.jpg": (b"", "unreadable"),
            "tall.jpg": (jpeg(img[:, :700]), "wrong_size"), "grey.jpg": (jpeg(img[..., 1]), "wrong_mode"),
            "blue.jpg": (jpeg(np.full_like(img, (0, 0, 255))), "solid_colour"), "dark.jpg": (jpeg(np.full_like(img, 1)), "solid_colour"), "bright.jpg": (jpeg(np.full_like(img, 254)), "solid_colour"),
            "blue_rim.jpg": (jpeg(rimmed(img, (0, 0, 255), 500, "right")), "mostly_border"), "black_rim.jpg": (jpeg(rimmed(img, 0, 450, "top")), "mostly_border"),
            "white_rim.jpg": (jpeg(rimmed(img, 255, 420, "left"), 75), "mostly_border"),
            "noise.jpg": (jpeg(grain), "noise"), "noise70.jpg": (jpeg(grain, 70), "noise"), "cloud.jpg": (jpeg(haze), "mostly_cloud")}


@pytest.fixture(scope="module")
def planted(fleet, tmp_path_factory):
    """(folder, {file: rule}) of the fleet's good images, one copy of a good image per fault, one missing file and one bad label."""
    root, catalog = fleet
    folder = tmp_path_factory.mktemp("planted")/"set"
    shutil.copytree(root, folder)
    faults = faults_of(catalog.read_image(int(np.argmax(catalog.counts))))
    for name, (data, _) in faults.items(): (folder/"train_v2"/name).write_bytes(data)
    shutil.copy(catalog.path(0), folder/"train_v2"/"label.jpg")
    labels = pd.read_csv(root/"train_ship_segmentations_v2.csv", dtype=str, keep_default_na=False)
    more = [(name, "5 9" if name in ("half.jpg", "noise.jpg") else "") for name in faults] + [("gone.jpg", "7 3"), ("label.jpg", "1 2 3")]
    pd.concat([labels, pd.DataFrame(more, columns=labels.columns)]).to_csv(folder/"train_ship_segmentations_v2.csv", index=False)
    return folder, {name: rule for name, (_, rule) in faults.items()} | {"gone.jpg": "missing", "label.jpg": "bad_label"}


def test_every_rule_finds_its_fault_and_nothing_else(planted):
    folder, truth = planted
    measures = cleaning.measure_images(read_airbus(folder))
    hits = cleaning.apply_rules(measures, PIXEL_RULES)
    found = {name: [o for o in PIXEL_RULES if hits[o][i]] for i, name in enumerate(measures["image"])}
    assert {name: rules for name, rules in found.items() if rules} == {name: [rule] for name, rule in truth.items()}
    assert len(found) == 16 + len(truth)                                   # the fleet's own images were seen, and none was blamed


def test_checked_or_not_the_price_is_the_same(planted):
    """`Catalog.check` sets unreadable files aside; their ships still count in the table."""
    folder, _ = planted
    plain, checked, labels = read_airbus(folder), read_airbus(folder), read_airbus(folder, images=False)
    counts = dict(zip(labels.images["image"], labels.counts.tolist()))
    checked.check()
    a, b = (cleaning.cleaning_table(o, counts=counts) for o in (plain, checked))
    same = ["images", "with_ships", "without_ships", "unknown", "ships", "only"]
    assert a[same].equals(b[same]) and a.set_aside["unreadable"] < b.set_aside["unreadable"] == b.images["unreadable"] == 4
    assert (a.with_ships["unreadable"], a.with_ships["missing"], a.unknown["bad_label"], a.with_ships["noise"]) == (1, 1, 1, 1)
    assert cleaning.cleaning_table(checked).unknown["unreadable"] == 4      # without `counts` it says that it does not know


def test_the_file_size_rule_counts_by_hand(planted):
    catalog = read_airbus(planted[0])
    for kilobytes in (52, 90):
        row = cleaning.cleaning_table(catalog, [partial(cleaning.small_file, kilobytes=kilobytes)]).iloc[0]
        sizes = {o: (catalog.root/o).stat().st_size for o in [*catalog.images["image"], *catalog.bad] if (catalog.root/o).is_file()}
        small = {o for o, size in sizes.items() if size <= kilobytes * 1024}
        ships = dict(zip(catalog.images["image"], catalog.counts))
        assert row.images == len(small) and row.with_ships == sum(ships.get(o, 0) > 0 for o in small) and row.ships == sum(ships.get(o, 0) for o in small)
        assert row.threshold == f"kilobytes {kilobytes}" and row.ship_low <= row.ship_share <= row.ship_high


def test_nothing_is_dropped_before_it_is_named(planted):
    catalog = read_airbus(planted[0])
    before, files = catalog.fingerprint(), sorted(o.name for o in catalog.root.iterdir())
    measures = cleaning.measure_images(catalog)
    cleaning.cleaning_table(catalog, measures=measures)
    kept, dropped = cleaning.clean(catalog, "unreadable, noise", measures)
    assert catalog.fingerprint() == before and sorted(o.name for o in catalog.root.iterdir()) == files
    assert set(dropped["image"]) == set(catalog.images["image"]) - set(kept.images["image"]) == {"half.jpg", "tail.jpg", "noise.jpg", "noise70.jpg"}
    assert not set(kept.objects["image"]) & set(dropped["image"]) and set(kept.bad) == set(catalog.bad)
    assert dropped.set_index("image").loc["noise.jpg", ["count", "rule"]].tolist() == [1, "noise"] and dropped["why"].str.len().gt(5).all()
    again, none = cleaning.clean(kept, "unreadable, noise")
    assert len(none) == 0 and again.fingerprint() == kept.fingerprint()


def test_wilson_against_scipy():
    from scipy.stats import binomtest
    for k, n in ((0, 5), (1, 9), (6, 193), (28, 15_455), (9, 9)):
        want = binomtest(k, n).proportion_ci(0.95, "wilson")
        assert cleaning.wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-4)


@pytest.mark.parametrize("text", ["a.jpg\n\n# no\nb.jpg\na.jpg\n", "\ufeffa.jpg\r\nb.jpg\r\n", "ImageId,why\na.jpg,cloud\nb.jpg,\n", "n,image\n1,a.jpg\n2,b.jpg\n"])
def test_lists_to_leave_out(tmp_path, text):
    (tmp_path/"list.txt").write_text(text, encoding="utf-8")
    assert cleaning.read_exclude(tmp_path/"list.txt") == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("data, says", [(b"", "names no image"), (b"# a\n", "names no image"), (b"\xff\xfe\x00", "no UTF-8 text"), (b"image,why\n", "names no image")])
def test_bad_lists_are_one_sentence(tmp_path, data, says):
    (tmp_path/"list.txt").write_bytes(data)
    with pytest.raises(ValueError, match=says): cleaning.read_exclude(tmp_path/"list.txt")


def test_a_name_outside_the_folder_is_never_opened(tmp_path, fleet):
    (tmp_path/"set"/"train_v2").mkdir(parents=True)
    root, catalog = fleet
    shutil.copy(catalog.path(0), tmp_path/"set"/"train_v2"/"a.jpg")
    shutil.copy(catalog.path(1), tmp_path/"secret.jpg")
    (tmp_path/"set"/"train_ship_segmentations_v2.csv").write_text("ImageId,EncodedPixels\na.jpg,\n../../secret.jpg,\n")
    measures = cleaning.measure_images(read_airbus(tmp_path/"set")).set_index("image")
    assert measures.state["../../secret.jpg"] == "label" and measures.bytes["../../secret.jpg"] == -1


def test_labels_alone_know_file_sizes_only():
    images = pd.DataFrame(dict(image=["a", "b", "c"], height=768, width=768, count=[1, 0, 0], bytes=[40_000, 90_000, -1], group="", split=""))
    from shipnb.catalog import Catalog
    table = cleaning.cleaning_table(Catalog(images, pd.DataFrame(columns=["image", "label", "rle"])))
    assert table.images["small_file"] == 1 and table.ships["small_file"] == 1 and (table.images.drop(["small_file", "any of these"]) == 0).all()


def test_real_images_with_ships_are_not_blamed(real_data):
    """On the real windows at hand no rule that looks at pixels drops an image with a ship, and the blank ones are found."""
    catalog = read_airbus(real_data/"airbus")
    measures = cleaning.measure_images(catalog)
    table = cleaning.cleaning_table(catalog, PIXEL_RULES, measures)
    assert len(measures) == 163 and table.with_ships["any of these"] == 0 and table.images["solid_colour"] >= 3
