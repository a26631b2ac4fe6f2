"""ShipSegmenter: scikit-learn's own checks, equality with a training by hand, scores by brute force, copies, folds, errors."""
import dataclasses
import json
import os
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score

from shipnb.catalog import read_airbus
from shipnb.dataset import DecodedCache
from shipnb.estimator import ShipSegmenter, load_pairs
from shipnb.inference import Predictor
from shipnb.masks import encode_instances, label_instances, rle_decode
from shipnb.training import Recipe, train_model

EXPECTED_FAILED_CHECKS = {}      # check: reason
SMALL = dict(size=32, epochs=4, batch_size=4, decoder=(16, 16, 8, 8, 8), lr=0.01, precision="32-true", device="cpu")
CHECKS = f"""
import json
from sklearn.utils.estimator_checks import check_estimator
from shipnb.estimator import ShipSegmenter
found = check_estimator(ShipSegmenter(**{SMALL | dict(epochs=1)}), expected_failed_checks={EXPECTED_FAILED_CHECKS}, on_fail=None, on_skip=None)
print(json.dumps([(o["check_name"], o["status"], str(o["exception"])) for o in found]))
"""


def chips(n, seed, side=40):
    """Images with a dot of 2 x 3 pixels and, in two of three, one or two bars; masks of the bars; scenes of four."""
    rng = np.random.default_rng(seed)
    X, y = rng.integers(20, 70, (n, side, side, 3), dtype=np.uint8), np.zeros((n, side, side), bool)
    for i in range(n):
        left = rng.integers(2, side - 16)
        for top in (4, 22)[:i % 3]: y[i, top:top + 5, left:left + 14] = True
    X[y] += 120
    return X, y, np.arange(n) // 4


@pytest.fixture(scope="module")
def data(): return chips(24, 0)


@pytest.fixture(scope="module")
def fitted(data): return ShipSegmenter(**SMALL).fit(*data[:2])


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_scikit_learns_checks_all_pass():
    """In a process of its own: one check is skipped unless SciPy was told of other arrays before it was imported."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECKS], env=os.environ | {"SCIPY_ARRAY_API": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [o for o in found if o[1] not in ("passed", "xfail")] == []
    assert len(found) >= 40 and sum(o[1] == "passed" for o in found) == len(found) - len(EXPECTED_FAILED_CHECKS)
    assert {"check_estimators_pickle", "check_fit_idempotent", "check_methods_subset_invariance", "check_estimators_nan_inf", "check_array_api_input"} <= {o[0] for o in found}


def test_parameters_are_those_of_the_recipe():
    mine, recipe = ShipSegmenter().get_params(), {o.name for o in dataclasses.fields(Recipe)}
    assert recipe - set(mine) == {"seed", "patience", "sync_batchnorm"}
    assert set(mine) - recipe == {"random_state", "threshold", "min_area", "device", "verbose"}
    assert ShipSegmenter()._recipe() == Recipe() and ShipSegmenter().set_params(lr=1, random_state=5)._recipe() == Recipe(lr=1, seed=5)


# --- the same as everything else

def airbus_folder(folder, X, y):
    (folder/"train_v2").mkdir(parents=True)
    rows = []
    for i, (img, mask) in enumerate(zip(X, y)):
        cv2.imwrite(str(folder/"train_v2"/f"{i:03d}.png"), img[..., ::-1])
        rows += [(f"{i:03d}.png", code) for code in encode_instances(label_instances(mask)[0]) or [""]]
    pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"]).to_csv(folder/"train_ship_segmentations_v2.csv", index=False)
    return read_airbus(folder)


@pytest.mark.parametrize("more", [{}, dict(size=64, crop=32, preset="source", ema=0.5, accumulate=2, precision="bf16-mixed", zero_ships_ratio=0.25, multiple_ships_ratio=0.5, random_state=3, loss="focal")],
                         ids=["plain", "everything"])
def test_fit_is_the_learners_training_bit_by_bit(more, data, tmp_path, monkeypatch):
    (tmp_path/"settings.ini").touch()
    monkeypatch.chdir(tmp_path)
    X, y, _ = data
    catalog = airbus_folder(tmp_path/"set", np.concatenate([X, X[:4]]), np.concatenate([y, y[:4]]))
    asked = SMALL | dict(epochs=2) | more
    names = {o.name for o in dataclasses.fields(Recipe)}
    recipe = Recipe(**{name: o for name, o in asked.items() if name in names} | dict(decoder=list(asked["decoder"]), seed=asked.get("random_state", 0)))
    learner = train_model(catalog, np.array(["train"] * len(X) + ["valid"] * 4), recipe, tmp_path/"run", device="cpu", progress=False)
    mine = ShipSegmenter(**asked).fit(X, y)
    assert same_weights(mine.model_, learner.trained)
    assert [o["loss"] for o in mine.history_] == [o["loss"] for o in learner.history] and len(mine.history_) == 2
    # another seed is another training: the equality above is not of two untrained networks
    assert not same_weights(mine.model_, clone(mine).set_params(random_state=9).fit(X, y).model_)


def test_memory_holds_what_the_disk_cache_holds(data, tmp_path):
    X, y, _ = data
    catalog = airbus_folder(tmp_path/"set", X, y)
    disk = DecodedCache.open(catalog, (32, 32), folder=tmp_path/"cache")
    mine, memory = load_pairs(X, y, (32, 32))
    assert mine.counts.tolist() == catalog.counts.tolist() and set(mine.counts) == {0, 1, 2}
    for column in ("rle", "x0", "y0", "x1", "y1", "area"): assert mine.objects[column].tolist() == catalog.objects[column].tolist()
    for i in range(len(X)): assert np.array_equal(memory.image(i), disk.image(i)) and np.array_equal(memory.mask(i), disk.mask(i))


def test_predict_is_the_predictors_from_an_exported_folder(fitted, tmp_path):
    X = chips(6, 5)[0]
    fitted.export(tmp_path/"model")
    predictor = Predictor.load(tmp_path/"model", device="cpu")
    assert [predictor.predict(o).mask.tolist() for o in X] == fitted.predict(X).tolist()
    large = np.concatenate([np.concatenate(X[:3], 1), np.concatenate(X[3:], 1)])[None]       # windows
    assert np.array_equal(fitted.predict(large)[0], predictor.predict(large[0]).mask) and fitted.predict(large).shape == (1, 80, 120)


# --- scores, by other ways

def test_score_is_the_mean_dice_by_brute_force(fitted):
    X, y, _ = chips(9, 3)
    y[4] = False                                   # found, but not there
    found, dices = fitted.predict(X), []
    for p, t in zip(found.tolist(), y.tolist()):
        pixels = [set((r, c) for r, row in enumerate(o) for c, v in enumerate(row) if v) for o in (p, t)]
        total = len(pixels[0]) + len(pixels[1])
        dices.append(2 * len(pixels[0] & pixels[1]) / total if total else 1.0)
    assert 0 in dices and max(dices) > 0.5 and len(set(dices)) > 3
    assert fitted.score(X, y) == pytest.approx(sum(dices) / 9, abs=1e-12)
    weights = [3, 0, 1, 1, 1, 0, 2, 1, 1]
    assert fitted.score(X, y, weights) == pytest.approx(sum(d * w for d, w in zip(dices, weights)) / 10, abs=1e-12)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"): fitted.score(X, y, weights[:4])


def test_threshold_and_min_area_decide_what_is_kept(fitted):
    X = chips(9, 3)[0]
    p = fitted.predict_proba(X)
    assert p.dtype == np.float64 and p.min() >= 0 and p.max() <= 1 and p.shape == (9, 40, 40)
    z, kept = np.log(p / (1 - p)), []
    areas = sorted({int(o) for one in z for o in np.bincount(ndimage.label(one >= -1 - 1e-9, np.ones((3, 3)))[0].ravel())[1:]})
    for edge, least in ((0.0, 0), (-1.0, 0), (-1.0, areas[-1])):      # all, all, the largest only
        masks = clone(fitted).set_params(threshold=1 / (1 + np.exp(-edge)), min_area=least)
        masks.__dict__.update({k: v for k, v in vars(fitted).items() if k.endswith("_")})
        for got, prob in zip(masks.predict(X), p):
            labels, n = ndimage.label(np.log(prob / (1 - prob)) >= edge - 1e-9, np.ones((3, 3)))
            want = sum(((labels == k) for k in range(1, n + 1) if (labels == k).sum() >= least), np.zeros((40, 40), bool))
            assert np.array_equal(got, want)
        kept.append(masks.predict(X).sum())
    assert len(areas) > 1 and kept[1] > kept[2] > 0 and kept[1] >= kept[0] > 0


# --- copies

def test_fit_gives_the_same_bits_and_leaves_the_random_states_alone(fitted, data):
    torch.manual_seed(5), np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = clone(fitted).fit(*data[:2])
    pickle.loads(pickle.dumps(again))
    assert same_weights(again.model_, fitted.model_)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])
    strict = clone(fitted).set_params(deterministic=True, epochs=1).fit(*data[:2])
    assert strict.card_["training"]["deterministic"] and not torch.are_deterministic_algorithms_enabled()
    draws = [clone(fitted).set_params(random_state=o, epochs=1).fit(*data[:2]) for o in (np.random.RandomState(1), np.random.RandomState(1), None)]
    assert same_weights(draws[0].model_, draws[1].model_) and not same_weights(draws[0].model_, draws[2].model_)


def test_pickle_in_another_process(fitted, data, tmp_path):
    X = data[0][:5]
    (tmp_path/"model.pickle").write_bytes(pickle.dumps(fitted))
    np.save(tmp_path/"x.npy", X)
    code = ("import pickle, numpy as np; m = pickle.load(open('model.pickle', 'rb'))\n"
            "np.save('p.npy', m.predict_proba(np.load('x.npy'))); assert m.set_params(lr=1).lr == 1")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300, capture_output=True)
    assert np.allclose(np.load(tmp_path/"p.npy"), fitted.predict_proba(X), rtol=1e-5, atol=0)     # the weights are equal, below; another process may sum in another order
    assert b"torch" not in pickle.dumps(fitted).replace(b'"torch"', b"").split(b"model_")[0]
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fitted))))
    assert same_weights(again.model_, fitted.model_) and again.get_params() == fitted.get_params() and again.history_ == fitted.history_


def test_clone_takes_parameters_only(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params() and not [o for o in vars(copy) if o.endswith("_")]
    assert "epochs=4" in repr(copy)


# --- folds, searches

@pytest.fixture
def one_thread():
    """scikit-learn's workers compute with one thread each; so that sums are made in the same order here, so does this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_folds_by_group_in_two_processes(data, one_thread):
    X, y, scenes = data
    model, folds = ShipSegmenter(**SMALL | dict(epochs=3)), GroupKFold(2)
    by_hand = [clone(model).fit(X[a], y[a]).score(X[b], y[b]) for a, b in folds.split(X, y, scenes)]
    assert all(not set(scenes[a]) & set(scenes[b]) for a, b in folds.split(X, y, scenes))
    assert cross_val_score(model, X, y, groups=scenes, cv=folds, n_jobs=2).tolist() == by_hand
    out_of_fold = cross_val_predict(model, X, y, groups=scenes, cv=folds)
    a, b = next(folds.split(X, y, scenes))
    assert out_of_fold.shape == y.shape and np.array_equal(out_of_fold[b], clone(model).fit(X[a], y[a]).predict(X[b]))


def test_grid_search_finds_the_rate_that_learns(data):
    X, y, scenes = data
    search = GridSearchCV(ShipSegmenter(**SMALL | dict(epochs=6)), dict(lr=[1e-6, 1e-2], loss=["bce", {"bce": 1.0, "dice_with": 1.0}]), cv=GroupKFold(2), error_score="raise").fit(X, y, groups=scenes)
    table = pd.DataFrame(search.cv_results_)
    assert search.best_params_["lr"] == 1e-2 and len(table) == 4
    assert table[table["param_lr"] == 1e-6]["mean_test_score"].max() < table["mean_test_score"].max() - 0.1
    assert search.best_estimator_.predict(X).shape == y.shape


# --- other forms of X and y

def test_paths_of_any_size_with_codes(tmp_path, fitted):
    sizes, rng, masks, paths = [(40, 40), (40, 56), (64, 40)] * 2, np.random.default_rng(0), [], []
    for i, (h, w) in enumerate(sizes):
        masks.append(np.zeros((h, w), bool))
        masks[-1][4:9, 6:20] = i != 3
        img = rng.integers(20, 70, (h, w, 3), dtype=np.uint8)
        img[masks[-1]] += 120
        paths.append(str(tmp_path/f"{i}.png"))
        cv2.imwrite(paths[-1], img[..., ::-1])
    codes = [encode_instances(label_instances(o)[0]) for o in masks]
    y = [codes[0][0], codes[1], masks[2], None, masks[4].astype(float), codes[5]]        # every form of a label
    model = clone(fitted).fit(paths, y)
    found = model.predict(np.array(paths))
    assert [o.shape for o in found] == sizes and [o.shape for o in model.predict_proba(paths)] == sizes
    area = lambda p, t: 2 * (p & t).sum() / (p.sum() + t.sum()) if (p | t).any() else 1.0
    assert model.score(paths, y) == pytest.approx(np.mean([area(p > 0, t) for p, t in zip(found, masks)]))
    assert same_weights(model.model_, clone(fitted).fit(paths, masks).model_)
    assert same_weights(model.model_, clone(fitted).fit(pd.Series(paths), y).model_)
    assert rle_decode(codes[0][0], (40, 40)).sum() == 70


def test_a_fit_on_images_forgets_the_table(data):
    model = ShipSegmenter(**SMALL | dict(epochs=1)).fit(np.arange(20.).reshape(4, 5), [0, 1, 1, 0])
    assert model.n_features_in_ == 5 and model.predict(np.zeros((2, 5))).shape == (2, 5)
    assert model.score(np.arange(20.).reshape(4, 5), [0, 1, 1, 0]) <= 1
    with pytest.raises(ValueError, match="fitted on a table"): model.predict(data[0])
    model.fit(*data[:2])
    assert not hasattr(model, "n_features_in_") and model.predict(data[0][:2]).shape == (2, 40, 40)
    with pytest.raises(ValueError, match="fitted on images"): model.predict(np.zeros((2, 5)))


# --- errors

@pytest.mark.parametrize("change, why", [
    (lambda X, y: (X[0], y), r"not of shape \(40, 40, 3\)"), (lambda X, y: (X[..., :2], y), r"not of shape \(24, 40, 40, 2\)"), (lambda X, y: (X[:0], y[:0]), "n at least 1"),
    (lambda X, y: (X / 255.0, y), "must be uint8"), (lambda X, y: (np.full(X.shape, np.nan), y), "must be uint8"),
    (lambda X, y: (X, y[:5]), "24 images and y 5 labels"), (lambda X, y: (X, y[:, :, :39]), r"y\[0\] has the shape \(40, 39\), its image \(40, 40\)"),
    (lambda X, y: (X, y & False), "no image has a ship"), (lambda X, y: (X, [None] * 24), "no image has a ship"), (lambda X, y: (X, None), "requires y to be passed"),
    (lambda X, y: (X, np.where(y, np.nan, 0)), r"y\[1\] holds values other than 0 and 1"), (lambda X, y: (X, y * 0.5), "values other than 0 and 1"),
    (lambda X, y: (X, ["1600 2"] * 24), r"y\[0\]: "), (lambda X, y: (["none.png"] * 2, ["1 1"] * 2), "none.png: no such file"),
    (lambda X, y: (np.full((4, 3), np.nan), [0, 1, 1, 0]), "NaN")])
def test_data_that_cannot_be_used(change, why, data):
    with pytest.raises((ValueError, FileNotFoundError), match=why) as error: ShipSegmenter(**SMALL).fit(*change(*data[:2]))
    if why != "NaN": assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong, why", [
    (dict(loss="bc"), "unknown loss 'bc'"), (dict(size=48), "size must be a multiple of 32, not 48"), (dict(crop=20), "crop must be a multiple of 32"), (dict(epochs=0), "epochs must be a whole number >= 1, not 0"),
    (dict(epochs=2.5), "epochs must be a whole number"), (dict(batch_size=0), "batch_size"), (dict(threshold=0), "between 0 and 1, not 0"), (dict(min_area=-3), "not -3"), (dict(random_state=-1), "seed must be a whole number >= 0, not -1"),
    (dict(augment="d5"), "unknown augment 'd5'"), (dict(encoder="resnet19"), "resnet19"), (dict(optimiser="adan"), "adan"), (dict(schedule="plateau"), "validation part"), (dict(preset="x"), "x")])
def test_parameters_that_cannot_be_used(wrong, why, data):
    model = ShipSegmenter(**SMALL | wrong)          # stored, not looked at
    with pytest.raises(ValueError, match=why): model.fit(*data[:2])
    assert not [o for o in vars(model) if o.endswith("_")]
