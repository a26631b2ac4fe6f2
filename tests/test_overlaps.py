"""Overlapping windows: the union-find, the signature, what is found on mosaics with known windows, and the leak meter, each against a plain computation of its own."""
import itertools
from types import SimpleNamespace

import cv2
import networkx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from shipnb.catalog import read_airbus
from shipnb.overlaps import (PAIR_COLUMNS, Forest, Tiles, alike_tiles, candidates, cut_tiles, fine_texture, live_blocks, make_mosaic, make_overlapping_fleet, overlap_groups, overlap_pairs, pairs_of, place_windows,
                             read_half, shared_tiles, signature, texture_correlation, tile_keys, tile_signatures, unconfirmed_pairs)
from shipnb.splits import folds, leak_meter, split
import shipnb.splits


def as_set(pairs): return set(map(tuple, pairs[PAIR_COLUMNS].to_numpy().tolist()))


# --- the plan

plans = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 6), st.integers(-3, 6)), min_size=1, max_size=30).map(
    lambda rows: pd.DataFrame([(f"{i:03d}.jpg", *o) for i, o in enumerate(rows)], columns=["image", "group", "y", "x"]))


@given(plans, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_pairs_of_a_plan_against_all_pairs(plan, reach):
    rows = plan.to_numpy().tolist()
    brute = {(a[0], b[0], b[2] - a[2], b[3] - a[3]) for i, a in enumerate(rows) for b in rows[i + 1:]
             if a[1] == b[1] and abs(b[2] - a[2]) < reach and abs(b[3] - a[3]) < reach}
    assert as_set(pairs_of(plan.sample(frac=1, random_state=0), reach)) == brute


@given(plans, st.randoms(use_true_random=False), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_groups_are_the_connected_components_and_places_are_kept(plan, random, share):
    pairs = pairs_of(plan)
    pairs = pairs.iloc[random.sample(range(len(pairs)), int(share * len(pairs)))]
    flip = np.array([random.random() < 0.5 for _ in range(len(pairs))], bool)
    turned = pairs.assign(image_a=pairs["image_b"].where(flip, pairs["image_a"]), image_b=pairs["image_a"].where(flip, pairs["image_b"]),
                          dy=pairs["dy"].where(~flip, -pairs["dy"]), dx=pairs["dx"].where(~flip, -pairs["dx"]))
    graph = networkx.Graph(pairs[["image_a", "image_b"]].to_numpy().tolist())
    graph.add_nodes_from(plan["image"])
    names = random.sample(plan["image"].tolist(), len(plan))
    placed, agrees = place_windows(names, turned)
    assert placed["image"].tolist() == names and agrees.all()
    assert {frozenset(o) for _, o in placed.groupby("group")["image"]} == {frozenset(o) for o in networkx.connected_components(graph)}
    assert (placed.groupby("group")["image"].min() == placed.groupby("group")["image"].min().index).all()
    both = placed.merge(plan, on="image", suffixes=("", "_true"))
    for axis in "yx": assert ((both[axis] - both[f"{axis}_true"]).groupby(both["group"]).nunique() == 1).all()


@given(plans, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_false_pair_is_found_by_its_loop(plan, seed):
    pairs = pairs_of(plan).astype({"dy": int, "dx": int})
    if len(pairs) < 3: return
    pairs["best"] = 0.9
    placed = place_windows(plan["image"], pairs)[0].set_index("image")
    k = seed % len(pairs)
    wrong = pairs.copy()
    wrong.loc[k, ["dy", "best"]] = [wrong["dy"][k] + 1, 0.6]      # less sure than the others
    again, agrees = place_windows(plan["image"], wrong)
    rest = networkx.Graph(pairs.drop(index=k)[["image_a", "image_b"]].to_numpy().tolist())
    loop = rest.has_node(pairs["image_a"][k]) and rest.has_node(pairs["image_b"][k]) and networkx.has_path(rest, pairs["image_a"][k], pairs["image_b"][k])
    assert agrees.sum() == len(pairs) - loop and agrees[k] != loop
    if loop: assert again.set_index("image").equals(placed)


def test_a_long_chain_is_no_deep_recursion():
    forest = Forest(50_000)
    assert all(forest.join(i + 1, i, 0, -1) for i in reversed(range(49_999)))
    assert forest.find(49_999) == (0, 0, 49_999) and not forest.join(0, 49_999, 1, 49_999)


# --- tiles

@pytest.fixture(scope="module")
def mosaic(): return make_mosaic(11, 0)[0]


def half_of(img, quality=None):
    grey = cv2.cvtColor(img, cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".png", grey)[1] if quality is None else cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cut_tiles(cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_2))


def alike(a, b):
    a, b = (signature(o, live_blocks(o))[0].astype(float) for o in (a, b))
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_the_place_in_the_window_does_not_matter(mosaic):
    """A tile's luminance is the same to the bit wherever the window was cut, at the same quality."""
    one, two = half_of(mosaic[:768, :768], 80), half_of(mosaic[256:1024, 512:1280], 80)
    assert np.array_equal(one[1:, 2:], two[:2, :1])
    for a, b in zip(signature(one[1, 2], live_blocks(one[1, 2])), signature(two[0, 0], live_blocks(two[0, 0]))): assert a.tolist() == b.tolist()
    assert texture_correlation(fine_texture(one[1, 2]), fine_texture(two[0, 0])) == pytest.approx(1)


@pytest.mark.parametrize("change,least", [(lambda o: np.clip(o * 0.7 + 20, 0, 255), 0.8), (lambda o: 255 * (o / 255)**0.8, 0.8), (lambda o: np.clip(o * np.array([1.1, 1, 0.8]), 0, 255), 0.8)])
def test_signature_and_texture_survive_another_rendering(mosaic, change, least):
    other = np.rint(change(mosaic.astype(np.float64))).astype(np.uint8)
    one, two = half_of(mosaic, 95), half_of(other, 85)
    live = [o for o in np.ndindex(one.shape[:2]) if min(live_blocks(one[o]).sum(), live_blocks(two[o]).sum()) >= 64]
    assert len(live) >= 24
    assert np.median([alike(one[o], two[o]) for o in live]) > least
    same = [texture_correlation(fine_texture(one[o]), fine_texture(two[o])) for o in live]
    strange = [texture_correlation(fine_texture(one[a]), fine_texture(two[b])) for a, b in zip(live, live[1:] + live[:1])]
    assert min(same) > 0.5 and max(strange) < 0.25


@pytest.mark.parametrize("value", [(0, 0, 0), (0, 0, 255), (255, 255, 255), (12, 30, 60)])
def test_solid_tiles_are_blank_and_their_rim_is_not_looked_at(mosaic, value):
    img = mosaic[:768, :768].copy()
    img[:, 300:] = value
    tiles = half_of(img, 75)
    assert all(live_blocks(tiles[o]).sum() == 0 for o in [(0, 2), (1, 2), (2, 2)])
    other = mosaic[768:1536, :768].copy()
    other[:, 300:] = value                     # the same rim at the same column on other ground
    strange = half_of(other, 75)
    found = [texture_correlation(fine_texture(a), fine_texture(b)) for a, b in zip(tiles.reshape(-1, 128, 128), strange.reshape(-1, 128, 128))]
    assert np.nanmax(found) < 0.25


def test_keys_are_every_two_of_the_six_strongest_terms(mosaic):
    for tile in half_of(mosaic, 90).reshape(-1, 128, 128)[::5]:
        code, words = signature(tile, live_blocks(tile))
        assert code.dtype == np.int8 and len(set(words.tolist())) == 6 and 0 <= words.min() and words.max() < 2 * 3040
        brute = {a * 8192 + b for a, b in itertools.combinations(sorted(words.tolist()), 2)}
        keys = tile_keys(words[None])[0].tolist()
        assert set(keys) == brute and len(keys) == 15
        negative, turned = signature(255 - tile, live_blocks(tile))
        assert np.abs(negative.astype(int) + code).max() <= 1 and set(turned // 2) == set(words // 2) and not set(turned) & set(words)


def test_signature_is_blind_to_solid_blocks_and_safe_when_all_are():
    tile = np.random.default_rng(0).integers(0, 255, (128, 128), np.uint8)
    code, words = signature(tile, np.zeros((32, 32), bool))
    assert not code.any() and len(set(words.tolist())) == 6


# --- mosaics with known windows

CASES = [("scenes", 5, (q, q), False) for q in (70, 80, 95)] + [("sea", 5, (q, q), True) for q in (70, 80, 95)] + [("scenes mixed", 5, (70, 95), False), ("sea mixed", 5, (70, 95), True)]


@pytest.mark.parametrize("name,mosaics,quality,sea", CASES, ids=[f"{o[0]} {o[2][0]}-{o[2][1]}" for o in CASES])
def test_pairs_of_known_windows(tmp_path, name, mosaics, quality, sea):
    truth = make_overlapping_fleet(tmp_path/"fleet", mosaics, seed=21, windows=12, quality=quality, sea=sea)
    catalog = read_airbus(tmp_path/"fleet")
    known, tiles, found = pairs_of(truth), tile_signatures(catalog), overlap_pairs(catalog)
    visible = known[shared_tiles(known, tiles) > 0]
    assert len(visible) >= 0.9 * len(known) > 150          # what is left out is little
    assert len(as_set(found) & as_set(visible)) >= 0.99 * len(visible)
    assert len(as_set(found) & as_set(known)) >= 0.99 * len(found)
    scene = truth.set_index("image")["group"]
    assert (scene[found["image_a"]].to_numpy() == scene[found["image_b"]].to_numpy()).all()
    listed = unconfirmed_pairs(catalog, found)
    assert not as_set(listed) & as_set(found) and as_set(listed) <= as_set(known)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("overlaps")/"fleet"
    truth = make_overlapping_fleet(root, 3, seed=5, windows=7)
    return read_airbus(root), truth


def test_the_order_of_rows_and_the_threads_do_not_matter(fleet):
    catalog, _ = fleet
    order = np.random.default_rng(0).permutation(len(catalog))
    found = overlap_pairs(catalog)
    assert found.equals(overlap_pairs(catalog.subset(order), threads=1)) and found.equals(overlap_pairs(catalog))
    groups = overlap_groups(catalog, found)
    mixed = overlap_groups(catalog.subset(order), found.sample(frac=1, random_state=1))
    assert mixed.tolist() == groups.to_numpy()[order].tolist()
    assert shipnb.splits.overlap_pairs is overlap_pairs and shipnb.splits.overlap_groups is overlap_groups


def test_a_fleet_is_reproducible_and_labelled(fleet, tmp_path):
    catalog, truth = fleet
    again = make_overlapping_fleet(tmp_path/"again", 3, seed=5, windows=7)
    assert again.equals(truth)
    for name in truth["image"][::5]: assert (tmp_path/"again"/"train_v2"/name).read_bytes() == catalog.path(catalog.images["image"].tolist().index(name)).read_bytes()
    assert len(catalog) == 21 and catalog.images["group"].nunique() == 3 and catalog.counts.sum() > 0
    with pytest.raises(FileExistsError): make_overlapping_fleet(tmp_path/"again", 1)


def test_groups_can_keep_what_was_known(fleet):
    catalog, _ = fleet
    none = pd.DataFrame(columns=PAIR_COLUMNS)
    assert overlap_groups(catalog, none).tolist() == catalog.images["image"].tolist()
    known = overlap_groups(catalog, none, known=True)
    assert (pd.crosstab(known, catalog.images["group"]) > 0).to_numpy().sum() == 3
    lone = SimpleNamespace(images=catalog.images.assign(group=[None, ""] + ["s"] * 19))
    assert overlap_groups(lone, none, known=True).nunique() == 3


def test_odd_images(tmp_path, mosaic):
    """Other sizes and formats, copies, an image smaller than a tile, and one that is solid: read, and matched where there is something to match."""
    (tmp_path/"train_v2").mkdir()
    images = {"a.jpg": mosaic[:768, :768], "b.png": mosaic[:600, 256:1000], "c.jpg": mosaic[:200, :200], "d.png": np.zeros((768, 768, 3), np.uint8), "e.jpg": mosaic[:768, :768]}
    for name, img in images.items(): cv2.imwrite(str(tmp_path/"train_v2"/name), img[..., ::-1])
    pd.DataFrame(dict(ImageId=list(images), EncodedPixels="")).to_csv(tmp_path/"train_ship_segmentations_v2.csv", index=False)
    catalog = read_airbus(tmp_path)
    assert as_set(overlap_pairs(catalog)) == {("a.jpg", "b.png", 0, 1), ("a.jpg", "e.jpg", 0, 0), ("b.png", "e.jpg", 0, -1)}
    meter = leak_meter(catalog, ["train", "valid", "valid", "valid", "other"], overlap_pairs(catalog))
    assert meter.loc["valid"].tolist() == [3, 1, 4 + 9, 4, 4 / 13] and meter.loc["other"].tolist() == [1, 1, 9, 9, 1]
    only = catalog.subset([2])
    assert not len(overlap_pairs(only)) and overlap_groups(only).tolist() == ["c.jpg"]
    assert np.isnan(leak_meter(only, ["valid"], overlap_pairs(only))["share"]["valid"])
    (tmp_path/"train_v2"/"a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jpg: cannot be decoded"): overlap_pairs(catalog)
    (tmp_path/"train_v2"/"a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="a.jpg"): read_half(tmp_path/"train_v2"/"a.jpg")


# --- the leak meter

@given(plans, st.lists(st.sampled_from(["train", "valid", "test"]), min_size=30, max_size=30), st.booleans())
@settings(max_examples=100, deadline=None)
def test_leak_meter_against_all_tiles(plan, parts, as_folds):
    """Chains count as well: what is joined by pairs is one scene, and its tiles are places in it."""
    size = np.random.default_rng(len(plan)).integers(1, 4, (len(plan), 2)) * 256 + 17
    catalog = SimpleNamespace(images=pd.DataFrame(dict(image=plan["image"], height=size[:, 0], width=size[:, 1])))
    pairs = pairs_of(plan)
    parts = np.array(parts[:len(plan)])
    if as_folds: parts = pd.factorize(parts)[0]
    graph = networkx.Graph(pairs[["image_a", "image_b"]].to_numpy().tolist())
    graph.add_nodes_from(plan["image"])
    scene = {name: k for k, names in enumerate(networkx.connected_components(graph)) for name in names}
    tiles = [{(scene[o.image], o.y + r, o.x + c) for r in range(size[i][0] // 256) for c in range(size[i][1] // 256)} for i, o in enumerate(plan.itertuples())]
    table = leak_meter(catalog, parts, pairs)
    assert "train" not in table.index
    for name, row in table.iterrows():
        trained = set().union(*(t for t, p in zip(tiles, parts) if (p == "train" if "train" in parts else p != name)))
        own = [t for t, p in zip(tiles, parts) if p == name]
        leaks = [len(t & trained) for t in own]
        assert row.tolist() == [len(own), sum(o > 0 for o in leaks), sum(map(len, own)), sum(leaks), sum(leaks) / sum(map(len, own))]


def test_a_split_by_group_does_not_leak_and_a_random_one_does(fleet):
    catalog, _ = fleet
    pairs = overlap_pairs(catalog)
    plain = SimpleNamespace(images=catalog.images.assign(group=""))
    grouped = SimpleNamespace(images=catalog.images.assign(group=overlap_groups(catalog, pairs)))
    assert leak_meter(plain, split(plain, 0.3), pairs)["share"]["valid"] > 0.4
    assert leak_meter(grouped, split(grouped, 0.3), pairs)["share"]["valid"] == 0
    assert (leak_meter(grouped, folds(grouped, 3), pairs)["share"] == 0).all()

def test_alike_tiles_against_all_pairs(fleet):
    """What the keys bring together is what comparing every tile with every other one would find, but for a tenth or so at mixed qualities (the plan makes up for it)."""
    catalog, _ = fleet
    tiles = tile_signatures(catalog)
    code = tiles.code.astype(np.float64)
    code /= np.linalg.norm(code, axis=1, keepdims=True)
    brute = {(int(a), int(b)) for a, b in np.argwhere(np.triu(code @ code.T, 1) >= 0.4) if tiles.image[a] != tiles.image[b]}
    found = list(map(tuple, alike_tiles(tiles).tolist()))
    assert found == sorted(set(found)) and set(found) <= brute and len(found) >= 0.8 * len(brute)


def test_a_crowd_of_equal_tiles_stays_linear():
    n = 600
    code, words = np.ones((n, 160), np.int8), np.tile(np.arange(6, dtype=np.int16), (n, 1))
    one = np.zeros(n, np.int32)
    tiles = Tiles(np.array([f"{i:05d}" for i in range(n)]), np.arange(n, dtype=np.int32), one, one, code, words, np.full((n, 2), 3, np.int32))
    pairs = alike_tiles(tiles)
    assert len(pairs) <= 16 * n and set(np.unique(pairs)) == set(range(n))


# --- real windows

def test_real_windows_against_the_public_grouping(real_data, tmp_path):
    """Aggregate numbers of 247 training windows; the public grouping is somebody else's and not the truth."""
    (tmp_path/"train_v2").mkdir()
    for folder in ("train_v2", "train_v2_boxonly"):
        for path in (real_data/"airbus"/folder).glob("*.jpg"): (tmp_path/"train_v2"/path.name).symlink_to(path)
    names = sorted(o.name for o in (tmp_path/"train_v2").iterdir())
    pd.DataFrame(dict(ImageId=names, EncodedPixels="")).to_csv(tmp_path/"train_ship_segmentations_v2.csv", index=False)
    catalog = read_airbus(tmp_path)
    found = overlap_pairs(catalog)
    scene = pd.read_csv(real_data/"airbus"/"labels"/"big_image_ids_v2.csv.gz").set_index("ImageId")["BigImageId"]
    same = scene[found["image_a"]].to_numpy() == scene[found["image_b"]].to_numpy()
    assert len(found) >= 140 and 40 <= same.sum() <= 60
    assert (found["best"] > 0.6).all()                       # nothing near the threshold
    plan, agrees = place_windows(names, found)
    assert agrees.all()                                      # every loop closes
    assert len(candidates(tile_signatures(catalog))) < 10 * len(names)
