"""Strata, resolution, calibration and other shares of empty images, against masks, scikit-learn, scipy and loops."""
import cv2
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage, optimize
from sklearn.calibration import calibration_curve

from shipnb.catalog import Catalog
from shipnb.masks import decode_labels, rle_decode, rle_encode
from shipnb.metrics import IOU_THRESHOLDS, object_counts, object_f2
from shipnb.strata import (LEAST_GROUPS, MIDDLES, component_calibration, component_table, expected_scores, fit_temperature, in_band, match_objects, measure_components,
                           object_table, pixel_calibration, points_at_shares, resolution_tables, stratify, stratify_images, touching_objects)
from shipnb.thresholds import Evidence, OperatingPoint, bin_levels, image_scores, keep, surface, true_labels
from shipnb.uncertainty import group_draws, score_draws, score_sums

SHAPE = (64, 64)


def codes_of(seed, overlap=True):
    """Codes of slanted ships that touch, overlap, hide each other and leave the image; the first in a third of the images."""
    rng, codes = np.random.default_rng(seed), []
    for _ in range(0 if seed % 3 == 0 else rng.integers(1, 7)):
        mask, centre = np.zeros(SHAPE, np.uint8), rng.uniform(0, 64, 2)
        box = cv2.boxPoints(((centre[0], centre[1]), (rng.uniform(3, 40), rng.uniform(2, 8)), rng.uniform(0, 180)))
        cv2.fillPoly(mask, [np.rint(box).astype(np.int32)], 1)
        if not overlap and codes: mask[np.any([rle_decode(o, SHAPE) for o in codes], axis=0)] = 0
        if mask.any(): codes.append(rle_encode(mask))
    if overlap and codes:
        y, x = np.argwhere(rle_decode(codes[0], SHAPE))[0] // 4 * 4   # two single pixels in one pixel of a coarser grid, on top of a ship or, in another order, under it
        for k in (0, 1):
            small = np.zeros(SHAPE, np.uint8)
            small[y, x + k] = 1
            codes.append(rle_encode(small))
    return codes


def logits_of(codes, seed, noise=1.5):
    rng, mask = np.random.default_rng([seed, 1]), decode_labels(codes, SHAPE) > 0
    glow = cv2.GaussianBlur(mask.astype(np.float32) * np.float32(rng.uniform(.6, 1.2)), (0, 0), 1)
    return (14 * glow - 8 + 5 * cv2.GaussianBlur(rng.normal(0, noise, SHAPE).astype(np.float32), (0, 0), 1.2)).astype(np.float32)


def world(n=24, grid=SHAPE, overlap=True, noise=1.5):
    """Catalog (in another order than the evidence, with images it lacks), evidence, logits and label images."""
    rows, objects, maps = [], [], {}
    for i in range(n + 3):
        codes = codes_of(i, overlap)
        rows.append(dict(image=f"{i:02d}.png", height=64, width=64, count=len(codes), bytes=1, group=f"s{i // 2}", split="", coast=bool(i % 4 > 1)))
        objects += [dict(image=f"{i:02d}.png", label="ship", rle=o, x0=0, y0=0, x1=1, y1=1, area=1) for o in codes]
        z = logits_of(codes, i, noise)
        maps[f"{i:02d}.png"] = cv2.resize(z, grid[::-1], interpolation=cv2.INTER_AREA), true_labels(codes, SHAPE, grid)
    order = np.random.default_rng(0).permutation(len(objects))
    catalog = Catalog(pd.DataFrame(rows[::-1]), pd.DataFrame(objects).iloc[order])
    evidence = Evidence(grid)
    for name in sorted(maps)[:n]:
        i = catalog.images["image"].tolist().index(name)
        maps[name] = maps[name][0], true_labels(catalog.rles(i), SHAPE, grid)
        evidence.add(name, *maps[name], f"s{int(name[:2]) // 2}")
    return catalog, evidence, maps


POINT = OperatingPoint(-2.5, 3)


def brute_objects(catalog, name, logits, labels):
    """What `object_table` says of one image, from masks: by scipy's dilation, OpenCV's rectangle of all pixel corners, and IoUs pair by pair."""
    i, kept, rows = catalog.images["image"].tolist().index(name), keep(logits, POINT.logit, POINT.min_area), []
    masks = [rle_decode(o, catalog.shape(i)) > 0 for o in catalog.rles(i)]
    for k, mask in enumerate(masks):
        truth = labels == k + 1
        if not truth.any(): continue
        near = ndimage.binary_dilation(mask, np.ones((3, 3)))
        y, x = np.nonzero(mask)
        corners = np.array([(a + u, b + v) for a, b in zip(x, y) for u in (0, 1) for v in (0, 1)], np.float32)
        ious = [(truth & (kept == c)).sum() / (truth | (kept == c)).sum() for c in range(1, kept.max() + 1)]
        edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        rows.append(dict(grid_area=truth.sum(), area=mask.sum(), length=max(cv2.minAreaRect(corners)[1]), touching=any((near & o).any() for j, o in enumerate(masks) if j != k),
                         at_edge=edge, iou=max([o for o in ious if o > .5], default=0), ships=len(masks)))
    return rows


@pytest.mark.parametrize("grid", [SHAPE, (16, 16), (32, 48)])
def test_objects_equal_masks_also_when_some_have_no_pixel(grid):
    catalog, evidence, maps = world(grid=grid)
    table, dropped = object_table(evidence, POINT, catalog, 2.0), 0
    for name in evidence.table().image:
        expected, mine = brute_objects(catalog, name, *maps[name]), table[table.image == name]
        assert len(expected) == len(mine)
        dropped += len(catalog.rles(catalog.images["image"].tolist().index(name))) - len(expected)
        for want, got in zip(expected, mine.to_dict("records")):
            assert got["length"] == pytest.approx(want.pop("length"), abs=.02)
            assert {key: got[key] for key in want} == want
            assert catalog.objects["image"].iat[got["row"]] == name and got["length_m"] == pytest.approx(2 * got["length"]) and got["area_m2"] == 4 * got["area"]
            assert got["hits"] == sum(want["iou"] > t for t in IOU_THRESHOLDS) and got["found"] == (want["iou"] > .5) and got["coast"] == (int(name[:2]) % 4 > 1)
    assert dropped, "the test needs an object without a pixel"
    assert table.unit.isin(evidence.groups).all() and table.touching.any() and not table.touching.all()


@pytest.mark.parametrize("grid, point", [(SHAPE, POINT), (SHAPE, OperatingPoint(-8.0, 0)), ((32, 48), OperatingPoint(-3.0, 2)), (SHAPE, OperatingPoint(15.0, 0))])
def test_components_equal_masks(grid, point):
    catalog, evidence, maps = world(grid=grid)
    table, all_found = component_table(evidence, point, catalog), 0
    for name in evidence.table().image:
        logits, labels = maps[name]
        kept = keep(logits, point.logit, point.min_area)
        expected = []
        for k in range(1, kept.max() + 1):
            ious = [((kept == k) & (labels == t)).sum() / ((kept == k) | (labels == t)).sum() for t in np.unique(labels[labels > 0])]
            expected.append(((kept == k).sum(), MIDDLES[bin_levels(logits[kept == k].max()) + 1], max([o for o in ious if o > .5], default=0)))
        mine = table[table.image == name]
        assert sorted(zip(mine.grid_area, mine.peak, mine.iou)) == sorted(expected)
        all_found += len(expected)
    assert len(table) == all_found and np.allclose(table.area, table.grid_area * 64 * 64 / (grid[0] * grid[1]))


def test_touching_equals_dilation_on_random_objects():
    rng, seen = np.random.default_rng(0), 0
    for _ in range(200):
        masks = [np.zeros((9, 9), bool) for _ in range(rng.integers(1, 5))]
        for mask in masks:
            y, x = rng.integers(0, 9, 2)
            mask[y:y + rng.integers(1, 4), x:x + rng.integers(1, 4)] = True
        expected = [any((ndimage.binary_dilation(a, np.ones((3, 3))) & b).any() for j, b in enumerate(masks) if j != i) for i, a in enumerate(masks)]
        assert touching_objects([rle_encode(o) for o in masks], (9, 9)).tolist() == expected
        seen += 0 < sum(expected) < len(expected)
    assert seen > 20


def test_matching_equals_pairs():
    rng = np.random.default_rng(1)
    for seed in range(30):
        truth = decode_labels(codes_of(seed), SHAPE)
        present = np.unique(truth[truth > 0])
        truth = np.searchsorted(np.append(0, present), truth).astype(np.int32)
        pred = keep((truth > 0) * 3 + rng.normal(0, 1, SHAPE).astype(np.float32), 1.0, 2).astype(np.int32)
        of_true, of_pred = match_objects(pred, truth)
        n_pred, n_true, hits = object_counts(pred, truth)
        assert (len(of_pred), len(of_true)) == (n_pred, n_true)
        assert [(of_true > t).sum() for t in IOU_THRESHOLDS] == hits.tolist() == [(of_pred > t).sum() for t in IOU_THRESHOLDS]
    assert [len(o) for o in match_objects(np.zeros((3, 3), int), np.zeros((3, 3), int))] == [0, 0]


def plain_scores(objects, components):
    """Recall, precision and pooled F2 of lists of rows, one IoU threshold after the other."""
    divide = lambda a, b: a / b if b else np.nan
    f2 = []
    for t in IOU_THRESHOLDS:
        hit, false = sum(o["iou"] > t for o in objects), sum(c["iou"] <= t for c in components)
        f2.append(divide(5 * hit, 5 * hit + 4 * (len(objects) - hit) + false))
    return [divide(sum(o["iou"] > .5 for o in objects), len(objects)), divide(sum(c["iou"] > .5 for c in components), len(components)), np.mean(f2)]


@pytest.mark.parametrize("column, bands", [("area", {"small": (0, 60), "large": (60, np.inf)}), ("ships", None), ("coast", None), ("unit", {"one": "group s1"})])
def test_strata_equal_loops_over_draws(column, bands):
    catalog, evidence, _ = world()
    objects, components = object_table(evidence, POINT, catalog), component_table(evidence, POINT, catalog)
    table = stratify(objects, components, column, evidence.groups, bands, draws=40, seed=2)
    names, checked = sorted(set(evidence.groups)), 0
    from shipnb.strata import STRATA
    for name, band in (bands or STRATA[column]).items():
        o, c = (t[in_band(t[column], band)].to_dict("records") for t in (objects, components))
        if not o and not c:
            assert name not in table.index
            continue
        row, checked = table.loc[name], checked + 1
        assert (row.objects, row.components) == (len(o), len(c))
        assert row[["recall", "precision", "f2"]].tolist() == pytest.approx(plain_scores(o, c), nan_ok=True, abs=1e-12)
        groups = dict(recall=o, precision=c, f2=o + c)
        drawn = [plain_scores(*([r for r in rows for _ in range(w[names.index(r["unit"])])] for rows in (o, c))) for w in group_draws(len(names), 40, 2)]
        for key, values in zip(("recall", "precision", "f2"), np.array(drawn).T):
            got = [row[f"{key}_low"], row[f"{key}_high"]]
            values = values[np.isfinite(values)]
            expected = np.quantile(values, [.025, .975]) if len({r["unit"] for r in groups[key]}) >= LEAST_GROUPS and len(values) else [np.nan] * 2
            assert got == pytest.approx(list(expected), nan_ok=True, abs=1e-12), (name, key)
    assert checked == len(table)


def test_the_whole_of_one_image_has_the_f2_of_the_metric():
    catalog, evidence, maps = world()
    for i in (1, 2, 4, 5):
        one = evidence.subset([i])
        objects, components = object_table(one, POINT, catalog).assign(all=1), component_table(one, POINT, catalog).assign(all=1)
        logits, labels = maps[one.records[0].image]
        got = stratify(objects, components, "all", one.groups, draws=5)
        assert got.f2.iloc[0] == pytest.approx(object_f2(keep(logits, -2.5, 3), labels), abs=1e-12) and got.recall_low.isna().all()


def test_true_properties_say_nothing_about_false_alarms():
    catalog, evidence, _ = world()
    objects, components = object_table(evidence, POINT, catalog), component_table(evidence, POINT, catalog)
    for column in ("touching", "at_edge", "length_m"):
        table = stratify(objects, components, column, evidence.groups, draws=20)
        assert table.objects.sum() == len(objects) and table[["precision", "f2"]].isna().all(axis=None) and (table.components == -1).all()


def test_image_strata_equal_the_scores_of_their_images():
    catalog, evidence, _ = world()
    table, scores = stratify_images(evidence, POINT, "coast", catalog, draws=30, seed=4), image_scores(evidence, POINT.logit, POINT.min_area)
    coast = np.array([int(o[:2]) % 4 > 1 for o in scores.image])
    for name, here in (("coast", coast), ("open sea", ~coast)):
        part = evidence.subset(here)
        assert table.loc[name, ["dice", "f2"]].tolist() == pytest.approx([scores.dice[here].mean(), scores.f2[here].mean()], abs=1e-9)
        assert table.false_alarm[name] == pytest.approx((scores.pred_area[here & (scores["count"] == 0)] > 0).mean())
        assert table.images[name] == len(part)
    with pytest.raises(ValueError, match="no column 'harbour'"): stratify_images(evidence, POINT, "harbour", catalog)


def test_label_images_give_what_evidence_gives_and_lengths_besides():
    catalog, evidence, maps = world(overlap=False)
    masks = {name: keep(maps[name][0], POINT.logit, POINT.min_area) for name in evidence.table().image}
    measured, components = measure_components(catalog, masks), component_table(evidence, POINT, catalog)
    assert sorted(zip(measured.image, measured.area, measured.iou, measured.unit, measured.ships)) == sorted(zip(components.image, components.area, components.iou, components.unit, components.ships))
    for name, mask in list(masks.items())[:8]:
        lengths = []
        for k in range(1, mask.max() + 1):
            y, x = np.nonzero(mask == k)
            lengths.append(max(cv2.minAreaRect(np.array([(a + u, b + v) for a, b in zip(x, y) for u in (0, 1) for v in (0, 1)], np.float32))[1]))
        assert sorted(measured.length[measured.image == name]) == pytest.approx(sorted(lengths), abs=.02)
    table = stratify(object_table(evidence, POINT, catalog), measured, "length_m", evidence.groups, draws=20)
    assert table.components.sum() == in_band(measured.length_m, (0, np.inf)).sum() and table.f2.notna().any()


# --- resolution

def pictures(folder, n=6):
    """Bright ships on dark water, and their Catalog."""
    rows, objects = [], []
    for i in range(n):
        codes = codes_of(i + 1, overlap=False)
        (folder/f"{i}.png").write_bytes(cv2.imencode(".png", np.repeat((40 + 180 * (decode_labels(codes, SHAPE) > 0)[..., None]).astype(np.uint8), 3, 2))[1].tobytes())
        rows.append(dict(image=f"{i}.png", height=64, width=64, count=len(codes), bytes=1, group="", split=""))
        objects += [dict(image=f"{i}.png", label="ship", rle=o, x0=0, y0=0, x1=1, y1=1, area=1) for o in codes]
    return Catalog(pd.DataFrame(rows), pd.DataFrame(objects), folder)


def stand_in(img):
    return keep(img[..., 0].astype(np.float32) / 20 - 6.5, 0.0, 0)


@pytest.mark.parametrize("output", ["resize", "small"])
def test_resolution_equals_the_steps_by_hand(tmp_path, output):
    catalog = pictures(tmp_path)
    objects, components = resolution_tables(stand_in, catalog, (1, 2, 4), 1.5, output)
    for i in range(len(catalog)):
        img = catalog.read_image(i)
        for factor in (1, 2, 4):
            small = cv2.resize(img, (64 // factor, 64 // factor), interpolation=cv2.INTER_AREA)
            truth = true_labels(catalog.rles(i), SHAPE, small.shape[:2]) if output == "small" else decode_labels(catalog.rles(i), SHAPE)
            if output == "resize": small = cv2.resize(small, (64, 64), interpolation=cv2.INTER_LINEAR)
            n_pred, n_true, hits = object_counts(stand_in(small), truth)
            mine, theirs = (t[(t.image == f"{i}.png") & (t.factor == factor)] for t in (objects, components))
            assert (len(mine), len(theirs), mine.found.sum(), theirs.matched.sum()) == (n_true, n_pred, hits[0], hits[0])
            assert np.allclose(mine.pixels * factor * 1.5, mine.length_m) and (mine.ground == 1.5 * factor).all()
    whole = objects[objects.factor == 1]
    assert whole.found.mean() > objects[objects.factor == 4].found.mean() and components.unit.nunique() == (components.image.nunique())


# --- calibration

def scored(n=12, scale=1.0, snap=False, shape=(40, 40)):
    """Evidence of random true probabilities; `snap` puts every logit at the middle of its bin."""
    rng, evidence, maps = np.random.default_rng(3), Evidence(shape), []
    for i in range(n):
        z = rng.normal(-1 + .3 * rng.normal(), 2, shape)
        y = (rng.random(shape) < 1 / (1 + np.exp(-z))).astype(int)
        z = (scale * z).astype(np.float32)
        if snap: z = MIDDLES[np.clip(bin_levels(z), 0, 2047) + 1].astype(np.float32)
        evidence.add(f"{i}", z, y, f"g{i // 2}")
        maps.append((z, y))
    return evidence, *(np.concatenate([o[k].ravel() for o in maps]) for k in (0, 1))


@pytest.mark.parametrize("bins", [5, 10, 15])
def test_pixel_calibration_equals_scikit_learn(bins):
    """Exactly for logits at the bins' middles; for any logits up to pixels whose bin straddles a border."""
    evidence, z, y = scored(snap=True)
    got = pixel_calibration(evidence, bins, draws=50)
    share, given = calibration_curve(y, 1 / (1 + np.exp(-z.astype(np.float64))), n_bins=bins)
    assert got.table.share.tolist() == pytest.approx(share.tolist(), abs=1e-12) and got.table.p.tolist() == pytest.approx(given.tolist(), abs=1e-12)
    assert got.table.n.sum() == len(y)
    p, error = 1 / (1 + np.exp(-z.astype(np.float64))), 0
    for b in range(bins):
        inside = (p > b / bins if b else p >= 0) & (p <= (b + 1) / bins)
        if inside.any(): error += inside.mean() * abs(y[inside].mean() - p[inside].mean())
    assert got.error == pytest.approx(error, abs=1e-12)
    raw, z, y = scored()
    share, given = calibration_curve(y, 1 / (1 + np.exp(-z.astype(np.float64))), n_bins=bins)
    assert np.abs(pixel_calibration(raw, bins, draws=50).table.share - share).max() < .02


def test_calibration_intervals_equal_loops_and_the_sea_can_be_left_out():
    evidence, z, y = scored()
    got = pixel_calibration(evidence, 4, draws=30, seed=1)
    groups = np.repeat(np.arange(6), 2 * 1600)
    p = 1 / (1 + np.exp(-MIDDLES[bin_levels(z) + 1]))
    cell, names = np.minimum((p * 4).astype(int), 3), sorted({f"g{k}" for k in range(6)})
    assert names == [f"g{k}" for k in range(6)]
    drawn, errors = [], []
    for w in group_draws(6, 30, 1)[:, :]:
        times = w[groups].astype(float)
        n, s, q = (np.bincount(cell, times * o, 4) for o in (np.ones(len(y)), y, p))
        drawn.append(s / n)
        errors.append(np.abs(s - q).sum() / n.sum())
    assert np.allclose(got.table[["share_low", "share_high"]].T, np.quantile(drawn, [.025, .975], axis=0), atol=1e-12)
    assert got.interval == pytest.approx(tuple(np.quantile(errors, [.025, .975])), abs=1e-12)
    part = pixel_calibration(evidence, 4, least=.3, draws=5)
    assert part.table.n.sum() == (p >= .3).sum() and pixel_calibration(evidence, 4, least=1, draws=5).table.empty


def test_component_calibration_equals_scikit_learn():
    catalog, evidence, _ = world()
    components = component_table(evidence, OperatingPoint(-4.0, 2), catalog)
    got = component_calibration(components, evidence.groups, 8, draws=20)
    share, given = calibration_curve(components.matched, components.score, n_bins=8)
    assert got.table.share.tolist() == pytest.approx(share.tolist(), abs=1e-12) and got.table.p.tolist() == pytest.approx(given.tolist(), abs=1e-12)
    assert len(share) > 4 and got.what == "components"


@pytest.mark.parametrize("scale", [.4, 1.0, 2.5])
def test_temperature_equals_a_fit_on_the_logits_themselves(scale):
    """Within the error of the bins, by scipy's minimiser on raw logits; and the planted scale lies in the interval."""
    evidence, z, y = scored(scale=scale)
    z = np.clip(z.astype(np.float64), -16, 16)
    likelihood = lambda log_t: np.mean(np.logaddexp(0, z / np.exp(log_t)) - y * z / np.exp(log_t))
    raw = np.exp(optimize.minimize_scalar(likelihood, bounds=(-3, 3), method="bounded", options=dict(xatol=1e-9)).x)
    got = fit_temperature(evidence, 200)
    assert got.value == pytest.approx(raw, abs=1e-3) and got.interval[0] <= scale <= got.interval[1]
    assert got.before == pytest.approx(likelihood(0), abs=1e-3) and got.after <= got.before
    flat = fit_temperature(evidence, 1).after
    assert all(flat <= np.mean(np.logaddexp(0, MIDDLES[bin_levels(z.astype(np.float32)) + 1] * b) - y * MIDDLES[bin_levels(z.astype(np.float32)) + 1] * b) + 1e-9 for b in (.9 / raw, 1.1 / raw))


def test_temperature_beyond_its_bounds_is_the_bound():
    evidence = Evidence((8, 8))
    y = (np.arange(64) % 3 == 0).astype(int).reshape(8, 8)
    evidence.add("separable", np.where(y, 2, -2).astype(np.float32), y)
    assert fit_temperature(evidence, 2).value == pytest.approx(1 / 64)
    evidence = Evidence((8, 8))
    evidence.add("backwards", np.where(y, -2, 2).astype(np.float32), y)
    assert fit_temperature(evidence, 2).value == pytest.approx(64)


# --- another share of empty images

def repeated(evidence, times):
    """The evidence with each empty image `times` times over."""
    import dataclasses
    records = [dataclasses.replace(o, image=f"{o.image} {k}") for o in evidence.records for k in range(1 if len(o.object_areas) else times)]
    return Evidence(evidence.grid, evidence.floor, records=records)


def test_a_share_is_the_score_of_a_set_with_that_share():
    """Empty images written three and nine times over: the same scores, everywhere on the surface."""
    _, evidence, _ = world(18)
    for times in (3, 9):
        many = repeated(evidence, times)
        share = (many.counts == 0).mean()
        row = expected_scores(evidence, POINT, [share], 20).iloc[0]
        scores = image_scores(many, POINT.logit, POINT.min_area)
        assert [row.dice, row.iou, row.f2, row.nothing] == pytest.approx([scores.dice.mean(), scores.iou.mean(), scores.f2.mean(), share], abs=1e-9)
        whole = surface(many, [0, 3, 20])
        for objective in ("dice", "f2"):
            terms = score_sums(evidence, objective, [0, 3, 20], 1, share_empty=share).terms
            assert np.allclose(sum(s * a.sum(axis=0) / n.sum() for s, a, n in terms), getattr(whole, objective).ravel(), atol=1e-9)


def test_the_interval_at_a_share_keeps_the_share_in_every_draw():
    _, evidence, _ = world(18)
    drawn = score_draws(evidence, POINT, 300, 5)
    row = expected_scores(evidence, POINT, [.9], 300, 5).iloc[0]
    assert (row.dice_low, row.dice_high) == pytest.approx(tuple(np.quantile(.9 * drawn.dice_without + .1 * drawn.dice_with, [.025, .975])), abs=1e-12)


def test_more_empty_sea_allows_fewer_false_ships():
    _, evidence, _ = world(24, noise=4)
    chosen = points_at_shares(evidence, (0, .9, 1), min_areas=[0, 10, 60], draws=20, every=16)
    alarms = [chosen[o].point.false_alarm for o in (0, .9, 1)]
    assert alarms[0] > alarms[1] >= alarms[2] == 0 and chosen[.9].point.baseline == .9
    assert chosen[.9].point.objective == "dice with 0.9 of the images empty" and OperatingPoint.from_dict(chosen[.9].point.to_dict()) == chosen[.9].point
