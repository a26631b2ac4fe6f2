"""Splits: groups whole, parts alike, the same whatever the rows' order, and at least as even as scikit-learn's."""
import os
import pathlib
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from shipnb.splits import check_split, folds, split, split_table


def catalog_of(counts, groups, names=None):
    names = [f"{i:05d}.jpg" for i in range(len(counts))] if names is None else names
    return SimpleNamespace(images=pd.DataFrame(dict(image=names, count=np.asarray(counts, int), group=groups)))


def scenes(rng, images, groups, empty=0.6):
    """Images of scenes of very different size, ships clustered by scene as in a harbour."""
    scene = rng.choice(groups, images, p=rng.dirichlet(np.full(groups, 0.6)))
    level = rng.exponential(2, groups)
    counts = np.where(rng.random(images) < empty, 0, 1 + rng.poisson(level[scene]))
    return catalog_of(counts, [f"s{s}" for s in scene])


def spread(catalog, parts, shares):
    """The worst relative distance of a part's share of empty images, ship images and ships from what it should be: its own definition, in plain pandas."""
    counts = catalog.images["count"]
    quantities = pd.DataFrame(dict(images=1.0, empty=(counts == 0) * 1.0, with_ships=(counts > 0) * 1.0, ships=counts * 1.0))
    held = quantities.groupby(np.asarray(parts)).sum() / quantities.sum()
    return (held.div(pd.Series(shares), axis=0) - 1).abs().to_numpy().max()


catalogs = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b", "c", "d", "", None])), min_size=1, max_size=40).map(
    lambda rows: catalog_of([r[0] for r in rows], [r[1] for r in rows]))


@given(catalogs, st.floats(0.01, 0.99), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_groups_stay_whole_and_parts_are_not_empty(catalog, valid, seed):
    images = catalog.images
    own = images["group"].isna() | (images["group"] == "")
    groups = images["group"].where(~own, "alone " + images["image"])
    if groups.nunique() < 2:
        with pytest.raises(ValueError, match="one group"): split(catalog, valid, seed)
        return
    parts = split(catalog, valid, seed)
    assert parts.index.equals(images.index) and set(parts) == {"train", "valid"}
    assert (parts.groupby(groups).nunique() == 1).all()
    check_split(catalog, parts)
    k = min(4, groups.nunique())
    numbers = folds(catalog, k, seed)
    assert numbers.dtype == np.int64 and set(numbers) == set(range(k))
    assert (pd.Series(numbers).groupby(groups).nunique() == 1).all()


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(0)
    catalog = scenes(rng, 200, 60)
    by_name = dict(zip(catalog.images["image"], split(catalog, 0.3, seed=4)))
    fold_by_name = dict(zip(catalog.images["image"], folds(catalog, 5, seed=4)))
    order = rng.permutation(200)
    mixed = SimpleNamespace(images=catalog.images.iloc[order])                     # keeps the old index: it must be returned
    parts = split(mixed, 0.3, seed=4)
    assert parts.index.tolist() == order.tolist()
    assert dict(zip(mixed.images["image"], parts)) == by_name
    assert dict(zip(mixed.images["image"], folds(mixed, 5, seed=4))) == fold_by_name
    assert split(catalog, 0.3, seed=4).equals(split(catalog, 0.3, seed=4))
    assert len({tuple(folds(catalog, 5, seed=s)) for s in range(4)}) == 4


def test_an_image_named_like_a_scene_is_not_of_it():
    catalog = catalog_of([1, 1, 0], ["x", "x", None], ["a", "b", "x"])
    assert split(catalog, 0.34).nunique() == 2 and len(set(folds(catalog, 2))) == 2
    with pytest.raises(ValueError, match="there are 2"): folds(catalog, 3)


@pytest.mark.parametrize("missing", ["", None, np.nan, "  "])
def test_missing_groups_are_groups_of_one(missing):
    catalog = catalog_of(np.tile([0, 1, 3, 7], 20), [missing] * 80)
    parts = split(catalog, 0.25)
    assert catalog.images["count"][parts == "valid"].value_counts().to_dict() == {0: 5, 1: 5, 3: 5, 7: 5}
    del catalog.images["group"]
    assert split(catalog, 0.25).tolist() == parts.tolist()


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("seed", range(6))
def test_at_least_as_even_as_scikit_learn(seed):
    rng = np.random.default_rng(100 + seed)
    catalog = scenes(rng, 240, 40)
    counts = catalog.images["count"].to_numpy()
    peer = np.empty(len(counts), int)
    kfold = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    for fold, (_, held) in enumerate(kfold.split(counts, np.digitize(counts, [1, 2, 5]), catalog.images["group"])): peer[held] = fold
    shares = dict.fromkeys(range(5), 0.2)
    assert spread(catalog, folds(catalog, 5, seed=seed), shares) <= spread(catalog, peer, shares)


@pytest.mark.parametrize("valid", [0.1, 0.2, 0.37, 0.5, 0.9])
def test_shares_are_met_with_many_small_scenes(valid):
    catalog = scenes(np.random.default_rng(5), 2000, 700)
    parts = split(catalog, valid)
    assert spread(catalog, parts, {"train": 1 - valid, "valid": valid}) < 0.02


def test_table_counts_what_is_there():
    catalog = catalog_of([0, 2, 3, 0], ["a", "a", "b", None])
    table = split_table(catalog, ["train", "train", "valid", "valid"])
    assert table.loc["train"].tolist() == [2, 1, 1, 2, 1, 0.5, 0.4]
    assert table.loc["valid"].tolist() == [2, 1, 1, 3, 2, 0.5, 0.6]
    assert table.loc["all"].tolist() == [4, 2, 2, 5, 3, 1, 1]
    assert split_table(catalog_of([0, 0], [None, None]), [0, 1])["ships_share"].tolist() == [0, 0, 0]


def test_a_divided_group_is_found():
    catalog = scenes(np.random.default_rng(2), 60, 9)
    parts = split(catalog, 0.3)
    for i in range(60):
        if (catalog.images["group"] == catalog.images["group"][i]).sum() == 1: continue
        wrong = parts.copy()
        wrong[i] = "train" if parts[i] == "valid" else "valid"
        with pytest.raises(ValueError, match=f"group {catalog.images['group'][i]} is divided"): check_split(catalog, wrong)
    with pytest.raises(ValueError, match="index"): check_split(catalog, parts.iloc[::-1])


@pytest.mark.parametrize("call,message", [
    (lambda c: split(c, 0), "valid must be above 0"), (lambda c: split(c, 1.0), "not 1.0"), (lambda c: split(c, float("nan")), "nan"),
    (lambda c: folds(c, 1), "k must be"), (lambda c: folds(c, 2.5), "not 2.5"), (lambda c: folds(c, 9), "9 folds need 9 groups"),
    (lambda c: split(catalog_of([], [])), "no images"), (lambda c: folds(catalog_of([], [])), "no images"),
    (lambda c: split(catalog_of([0, 1, 2], ["s"] * 3)), "one group"), (lambda c: check_split(c, ["train"]), "1 values and the Catalog 3 images")])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message): call(catalog_of([0, 1, 4], [None, None, None]))


@pytest.mark.skipif(not os.environ.get("SHIPNB_REAL_DATA"), reason="SHIPNB_REAL_DATA is not set: the real label tables are not at hand")
def test_all_real_labels_by_scene():
    labels = pathlib.Path(os.environ["SHIPNB_REAL_DATA"])/"airbus"/"labels"
    counts = pd.read_csv(labels/"train_image_counts.csv.gz")
    scene = pd.read_csv(labels/"big_image_ids_v2.csv.gz").set_index("ImageId")["BigImageId"]
    catalog = catalog_of(counts["ships"], counts["ImageId"].map(scene), counts["ImageId"])
    start = time.perf_counter()
    numbers = folds(catalog, 5)
    assert time.perf_counter() - start < 60
    check_split(catalog, numbers)
    assert spread(catalog, numbers, dict.fromkeys(range(5), 0.2)) < 0.002
