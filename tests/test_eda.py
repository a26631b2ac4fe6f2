"""Measurements from run-length codes against full masks, OpenCV and counting by hand; the label tables alone."""
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shipnb import eda
from shipnb.catalog import Catalog
from shipnb.masks import rle_box, rle_decode, rle_encode

SHAPE = (40, 50)
MASKS = arrays(np.uint8, (12, 15), elements=st.integers(0, 1), fill=st.nothing()).filter(lambda o: o.any())


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


# --- areas, cut ships, touching ships, scenes, classes

def union_components(codes, shape, connectivity):
    """Components of the union of masks, by OpenCV on the decoded pixels."""
    union = np.any([rle_decode(o, shape) for o in codes], axis=0).astype(np.uint8)
    return cv2.connectedComponents(union, connectivity=connectivity)[0] - 1


def catalog_of(codes, shape):
    """A Catalog of labels only from lists of codes, one per image."""
    names = [f"{k}.jpg" for k in range(len(codes))]
    images = pd.DataFrame(dict(image=names, height=shape[0], width=shape[1], count=[len(o) for o in codes], bytes=-1, group="", split=""))
    rows = [(name, "ship", code) for name, these in zip(names, codes) for code in these]
    return Catalog(images, pd.DataFrame(rows, columns=["image", "label", "rle"]))


@settings(deadline=None)
@given(st.lists(st.lists(arrays(np.uint8, (9, 7), elements=st.integers(0, 1), fill=st.nothing()).filter(lambda o: o.any()), max_size=3), min_size=1, max_size=4), st.sampled_from([4, 8]))
def test_components_are_those_of_the_decoded_union(masks, connectivity):
    codes = [[rle_encode(o) for o in these] for these in masks]           # ships may overlap, and fill first and last rows and columns
    expected = [union_components(these, (9, 7), connectivity) if these else 0 for these in codes]
    assert eda.count_components(catalog_of(codes, (9, 7)), connectivity).tolist() == expected


def test_components_of_mixed_sizes_and_unknown_codes():
    small, large = np.eye(8, dtype=np.uint8), np.eye(30, 20, dtype=np.uint8)
    catalog = catalog_of([[rle_encode(small)], [rle_encode(large)], [""], []], (8, 8))
    catalog.images.loc[1, ["height", "width"]] = 30, 20
    assert np.array_equal(eda.count_components(catalog), [1, 1, np.nan, 0], equal_nan=True)
    assert np.array_equal(eda.count_components(catalog, 4), [8, 20, np.nan, 0], equal_nan=True)
    with pytest.raises(ValueError, match="object 0.*beyond the last pixel"): eda.count_components(catalog_of([["60 10"]], (8, 8)))


def test_touching_table_counts_by_hand():
    table = eda.touching_table([0, 1, 2, 2, 7, 3], [0, 1, 1, 2, 5, np.nan])
    assert table.loc["2"].tolist() == [2, 4, 3, 1, 0.25, 0.5]
    assert table.loc["all", ["images", "ships", "components", "merged"]].tolist() == [4, 12, 9, 3] and table.images["3 to 5"] == 0


def test_area_table_against_a_frame_grouped_by_pandas():
    rng = np.random.default_rng(0)
    geometry = pd.DataFrame(dict(area=rng.integers(1, 9000, 2000), at_edge=rng.random(2000) < 0.1))
    table, edges = eda.area_table(geometry), list(eda.AREA_BANDS)
    band = geometry.groupby(pd.cut(geometry.area, edges, right=False), observed=False)
    assert table.ships.tolist() == band.size().tolist() and table.ships.sum() == 2000
    assert np.allclose(table.cut, band.at_edge.mean(), equal_nan=True) and np.allclose(table.pixel_share, band.area.sum() / geometry.area.sum())
    assert table.below.iloc[-1] == pytest.approx(1) and table.below[table.to_px == 100].item() == pytest.approx((geometry.area < 100).mean())


def test_expected_cuts_is_what_an_even_spread_gives():
    """Boxes at random places of a plane of windows: whole ones alone foretell how many are cut."""
    rng, side, cut, whole = np.random.default_rng(0), 100, 0, []
    for _ in range(40_000):
        w, h = rng.integers(2, 40, 2)
        x, y = rng.integers(-w + 1, side), rng.integers(-h + 1, side)         # every place with a pixel inside, equally often
        if x <= 0 or y <= 0 or x + w >= side or y + h >= side:
            if rng.random() < (side + w - 1) * (side + h - 1) / 140 ** 2: cut += 1   # larger boxes have more places: keep the density even
        elif rng.random() < (side + w - 1) * (side + h - 1) / 140 ** 2: whole.append((x, y, x + w, y + h))
    geometry = pd.DataFrame(whole, columns=["x0", "y0", "x1", "y1"]).assign(at_edge=False)
    geometry = pd.concat([geometry, pd.DataFrame(dict(x0=0, y0=0, x1=1, y1=1, at_edge=True), index=range(cut))], ignore_index=True)
    found = eda.expected_cuts(geometry, (side, side))
    assert found["cut"] == cut and found["found"] == pytest.approx(1, abs=0.03)


def test_scene_summary_against_groups_and_a_drawn_split():
    rng = np.random.default_rng(0)
    images = pd.DataFrame(dict(group=rng.integers(0, 900, 4000).astype(str), count=rng.poisson(0.3, 4000)))
    images.loc[:9, "group"] = ""
    got, known = eda.scene_summary(images), images[images.group != ""]
    by_scene = known.groupby("group")["count"]
    assert (got.images, got.scenes, got.largest) == (3990, by_scene.ngroups, by_scene.size().max())
    assert got.empty_beside_ships == pytest.approx((by_scene.transform("sum") > 0)[known["count"] == 0].mean())
    leaks = []
    for _ in range(60):
        held = rng.random(len(known)) < 0.2
        leaks.append(known.group[held].isin(set(known.group[~held])).mean())
    assert got.leak == pytest.approx(np.mean(leaks), abs=0.005)


def test_scenes_are_optional():
    got = eda.scene_summary(pd.DataFrame(dict(group=["", ""], count=[0, 2])))
    assert (got.images, got.scenes) == (0, 0) and np.isnan(got.leak)


def test_class_table_and_box_sides_by_hand():
    objects = pd.DataFrame(dict(image=["a", "a", "b"], label=["x", "x", "y"], rle="", x0=[0, 0, 2], y0=0, x1=[3, 4, 10], y1=[3, 9, 2], area=[9.0, 36, 16]))
    catalog = Catalog(pd.DataFrame(dict(image=["a", "b", "c"], height=10, width=20, count=[2, 1, 0], bytes=-1, group="", split="")), objects)
    table = eda.class_table(catalog)
    assert table.loc["x"].tolist() == [1, pytest.approx(1 / 3), 2, pytest.approx(2 / 3), 22.5, pytest.approx(45 / 600)]
    assert eda.box_sides(catalog).tolist() == [3, 6, 4]


def test_scenes_of_a_table(tmp_path):
    (tmp_path/"counts.csv").write_text("ImageId,ships\na.jpg,1\nb.jpg,0\n")
    (tmp_path/"scenes.csv").write_text("ImageId,Scene\nb.jpg,s1\n")
    catalog = eda.read_labels(counts_table=tmp_path/"counts.csv", scenes_table=tmp_path/"scenes.csv")
    assert catalog.images["group"].tolist() == ["", "s1"]
    (tmp_path/"scenes.csv").write_text("ImageId\nb.jpg\n")
    with pytest.raises(ValueError, match="scenes.csv: lacks a second column"): eda.read_labels(counts_table=tmp_path/"counts.csv", scenes_table=tmp_path/"scenes.csv")


def test_real_boxes_are_the_components_of_the_real_codes(real_data):
    """Two independent sources: boxes that somebody else computed, and our components of the codes, image by image."""
    folder = real_data/"airbus"/"labels"
    catalog = eda.read_labels(folder/"train_ship_segmentations_v2_partial.csv.gz")
    boxes = eda.read_boxes(folder/"train_ship_boxes.csv.gz").image.value_counts()
    theirs = catalog.images.image.map(boxes).fillna(0).to_numpy()
    some = np.flatnonzero(catalog.counts > 0)
    agree = (eda.count_components(catalog)[some] == theirs[some]).mean()
    four = (eda.count_components(catalog, 4)[some] == theirs[some]).mean()
    assert len(some) == 19_539 and agree == 1 and 0.9 < four < 0.99          # theirs are 8-connected


# --- the figure of the whole set

def label_set(seed=0, images=400):
    """Images in scenes, ships with areas and lengths, components: tables of the size and shape that a real set has."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"count": np.where(rng.random(images) < 0.7, 0, rng.integers(1, 16, images)), "group": rng.integers(0, images // 3, images).astype(str)})
    ships = int(table["count"].sum())
    geometry = pd.DataFrame(dict(area=np.exp(rng.normal(5.9, 1.6, ships)).round().clip(2), length_m=np.exp(rng.normal(4, 0.8, ships)), at_edge=rng.random(ships) < 0.1))
    components = np.where(table["count"] > 2, table["count"] - 1, table["count"])
    return table, geometry, eda.touching_table(table["count"], components)


def heights(ax):
    """Heights of the bars of an Axes, one array per series."""
    return [np.array([bar.get_height() for bar in series]) for series in ax.containers]


def test_the_panels_say_what_counting_says():
    eda.look()
    images, geometry, touching = label_set()
    counts, scene = images["count"], images.groupby("group")["group"].transform("size")
    titles = [ax.get_title(loc="left") for ax in eda.plot_label_set(images, geometry, touching).axes]
    assert titles[0] == f"{100 * (counts == 0).mean():.0f} % of the images show no ship"
    assert titles[1] == f"{100 * counts[counts > 1].sum() / counts.sum():.0f} % of the ships share an image"
    assert titles[2] == f"{100 * (geometry.area < 100).mean():.0f} % of the ships have under 100 px"
    assert titles[4] == f"{100 * (counts > 2).sum() / counts.sum():.0f} % fewer components than ships"
    assert titles[5] == f"{100 * (scene > 1).mean():.0f} % of the images share a scene"
    plt.close("all")


def drawn_texts(figure):
    """(text, rotation, box in pixels) of every text that is drawn; matplotlib also keeps ticks beyond an axis's ends, which are not."""
    figure.canvas.draw()
    ticks = {label: low <= tick.get_loc() <= high for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)
             for low, high in [sorted(axis.get_view_interval())] for tick in axis.get_major_ticks() + axis.get_minor_ticks() for label in (tick.label1, tick.label2)}
    texts = [o for o in figure.findobj(plt.Text) if o.get_visible() and o.get_text().strip() and ticks.get(o, True)]
    return [(o.get_text(), o.get_rotation(), o.get_window_extent()) for o in texts]


@pytest.mark.parametrize("images", [400, 40_000])
def test_no_text_of_the_figure_is_cut_or_covers_another(images):
    eda.look()
    figure = eda.plot_label_set(*label_set(images=images), source="Airbus Ship Detection Challenge (Kaggle, 2018), label tables of the training set")
    texts, size = drawn_texts(figure), figure.bbox
    assert len(texts) > 60
    for text, _, box in texts: assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= size.x1 + 1 and box.y1 <= size.y1 + 1, f"{text!r} leaves the figure"
    level = [(text, box) for text, rotation, box in texts if rotation in (0, 90)]   # the boxes of slanted ticks overlap where the words do not
    for k, (text, box) in enumerate(level):
        covered = [o for o, other in level[k + 1:] if min(box.x1, other.x1) - max(box.x0, other.x0) > 1 and min(box.y1, other.y1) - max(box.y0, other.y0) > 1]
        assert not covered, f"{text!r} covers {covered}"
    plt.close(figure)


def test_panels_without_data_stay_empty():
    images = pd.DataFrame({"count": [0, 0, 1], "group": ""})
    figure = eda.plot_label_set(images, eda.ship_geometry([]), eda.touching_table(images["count"], [0, 0, np.nan]))
    assert [ax.axison for ax in figure.axes] == [True, True, False, False, False, False]
    plt.close(figure)


def test_bars_of_scenes_and_shares_by_hand():
    images = pd.DataFrame({"count": [0, 3, 0, 1, 0, 0, 0, 9], "group": ["a", "b", "b", "c", "c", "c", "c", ""]})
    empty, ships = heights(eda.plot_scenes(images))                       # scenes of 1, 2 and 4 of the 7 images in a known scene
    assert np.allclose(empty, np.array([1, 1, 3]) / 7 * 100) and np.allclose(ships, np.array([0, 1, 1]) / 7 * 100)
    [shares] = heights(eda.plot_ship_shares(images.iloc[:7]))
    assert np.allclose(shares, [25, 0, 75])
    plt.close("all")
