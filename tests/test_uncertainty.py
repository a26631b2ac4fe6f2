"""Bootstrap of scores and of the operating point, optimism, paired comparison and seeds, against loops, scipy and simulation."""
import itertools

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from shipnb.catalog import Catalog
from shipnb.masks import encode_instances
from shipnb.metrics import dice, object_f2, segmentation_scores
from shipnb.thresholds import EDGES, Evidence, OperatingPoint, bootstrap_means, choose, image_scores, interval, keep, surface, true_labels
from shipnb.uncertainty import (ScoreSums, benjamini_hochberg, bootstrap_choice, changed_sides, choices, choose_rows, compare_runs, compare_sweep, crossed_bootstrap, exact,
                                fold_draws, group_draws, group_members, holm, object_ious, object_rows, optimism, plot_changed, ratio_draws, run_scores, score_draws, score_parts,
                                score_sums, score_table, signed_rank, subset_draws, sum_by_group, _draw_errors)


def image(seed, ships=None, run=0, noise=1.5, size=40):
    """True objects and logits: smooth bumps over rectangles, some weak, with correlated noise; `run` changes the noise alone."""
    rng, truth = np.random.default_rng(seed), np.zeros((size, size), np.int32)
    for k in range(rng.integers(0, 4) if ships is None else ships):
        y, x = rng.integers(0, size * 3 // 4, 2)
        truth[y:y + rng.integers(2, 8), x:x + rng.integers(4, 14)] = k + 1
    glow = cv2.GaussianBlur((truth > 0).astype(np.float32) * np.float32(rng.uniform(.5, 1.1)), (0, 0), 1.2)
    grain = np.random.default_rng([seed, run]).normal(0, noise, truth.shape).astype(np.float32)
    return (14 * glow - 8 + 5 * cv2.GaussianBlur(grain, (0, 0), 1.5)).astype(np.float32), truth


def collection(n=10, run=0, seed=0, group=2, noise=1.5):
    images = [image(100 * seed + i, 0 if i % 3 == 0 else None, run, noise) for i in range(n)]
    evidence = Evidence((40, 40), data="d", model=f"m{run}")
    for i, (logits, truth) in enumerate(images): evidence.add(f"{i}", logits, truth, f"g{i // group}" if group else None)
    return images, evidence


def values_of(evidence, objective, logit, size, truths_have):
    """Part and whole of each image at one setting, from the scores of 30_thresholds."""
    table, has = image_scores(evidence, logit, int(size)), truths_have
    if objective == "pixel_dice": return 2 * table.overlap.to_numpy(float), (table.pred_area + table.true_area).to_numpy(float)
    counts = {"dice_with": has, "dice_without": ~has}.get(objective, np.ones(len(has), bool))
    return exact(table[objective.split("_")[0]]) * counts, counts.astype(float)


def plain_rule(scores, allowed, tolerance):
    """The rule of `choose`, setting by setting, in Python: scores[k][j]."""
    edges, sizes = len(scores), len(scores[0])
    best = max(scores[k][j] for k in range(edges) for j in range(sizes) if allowed[k][j])
    good = [[allowed[k][j] and scores[k][j] >= best - tolerance for j in range(sizes)] for k in range(edges)]
    j = next(j for j in range(sizes) if any(row[j] for row in good))
    k = max((k for k in range(edges) if good[k][j]), key=lambda k: (scores[k][j], -k))
    low = high = k
    while low > 0 and good[low - 1][j]: low -= 1
    while high + 1 < edges and good[high + 1][j]: high += 1
    return (low + high) // 2, j


@pytest.mark.parametrize("objective, bound, share", [("dice", None, None), ("dice_with", .3, None), ("f2", .2, None), ("pixel_dice", None, None), ("dice", None, .8), ("iou", .5, .3)])
def test_choice_of_every_draw_equals_loops_bit_by_bit(objective, bound, share):
    """Each draw written out image by image, every setting scored by `image_scores`, the rule in plain Python: the same setting and the same bits."""
    _, evidence = collection(12)
    sizes, every, draws = [0, 3, 10], 64, 25
    has, groups = evidence.counts > 0, evidence.groups
    sums = score_sums(evidence, objective, sizes, every, bound, share)
    choice = bootstrap_choice(sums, draws, seed=3)
    logits, names = EDGES[512::every], sorted(set(groups))
    table = {(k, j): values_of(evidence, objective, logit, size, has) for k, logit in enumerate(logits) for j, size in enumerate(sizes)}
    alarm = {(k, j): (image_scores(evidence, logit, size).pred_area.to_numpy() > 0) & ~has for k, logit in enumerate(logits) for j, size in enumerate(sizes)}

    def score(images, at):
        part, whole = table[at]
        strata = [(1.0, images)] if share is None else [(share, [i for i in images if not has[i]]), (1 - share, [i for i in images if has[i]])]
        total = 0
        for weight, these in strata:
            below = sum(whole[i] for i in these)
            total = total + weight * (sum(part[i] for i in these) / below if below else 1.0 if objective == "pixel_dice" else np.nan)
        return total

    weights = np.random.default_rng(3).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    whole = np.ones((1, len(names)), int)
    for w, row in zip(np.concatenate([whole, weights]), [dict(setting=None)] + choice.draws.to_dict("records")):
        images = [i for times, name in zip(w, names) for _ in range(times) for i in np.flatnonzero(groups == name)]
        scores = [[score(images, (k, j)) for j in range(3)] for k in range(len(logits))]
        empties = [i for i in images if not has[i]]
        if np.isnan(scores).any():
            assert row["setting"] == -1 and np.isnan(row["logit"])
            continue
        rates = [[sum(alarm[k, j][i] for i in empties) / len(empties) if empties else 0 for j in range(3)] for k in range(len(logits))]
        allowed = [[bound is None or o <= max(bound, np.min(rates)) for o in line] for line in rates]
        k0, j0 = np.unravel_index(np.where(allowed, scores, -1).argmax(), (len(logits), 3))
        tolerance = plain_error(w, table[k0, j0], groups, names, has, share) / 10
        k, j = plain_rule(scores, allowed, tolerance)
        if row["setting"] is None:
            assert (choice.point.logit, choice.point.min_area, choice.point.score) == (logits[k], sizes[j], scores[k][j])
            chosen_here = k, j
            continue
        assert (row["logit"], row["min_area"], row["score"]) == (logits[k], sizes[j], scores[k][j])
        assert row["fixed"] == score(images, chosen_here)
        left = [i for times, name in zip(w, names) if not times for i in np.flatnonzero(groups == name)]
        expected = score(left, (k, j))
        assert row["left_out"] == expected or np.isnan(row["left_out"]) and (np.isnan(expected) or objective == "pixel_dice")


def plain_error(w, values, groups, names, has, share):
    """The linear approximation's standard error, group by group."""
    part, whole = values
    strata = [(1.0, np.ones(len(has), bool))] if share is None else [(share, ~has), (1 - share, has)]
    pulls = np.zeros(len(names))
    for weight, these in strata:
        a, b = (np.array([(o * these)[groups == name].sum() for name in names]) for o in (part, whole))
        pulls += weight * (a - (w * a).sum() / (w * b).sum() * b) / (w * b).sum()
    return np.sqrt((w * pulls**2).sum())


@pytest.mark.parametrize("objective, bound", [("dice", None), ("dice_with", .25), ("f2", None), ("iou", .4)])
def test_the_rule_is_that_of_choose(objective, bound):
    """At every edge, with `choose`'s own tolerance: the same point and the same plateau, for 6 sets."""
    for seed in range(6):
        evidence = collection(12, seed=seed)[1]
        whole = surface(evidence, [0, 4, 12])
        expected = choose(whole, objective, bound, 300)
        scores = getattr(whole, objective)
        allowed = np.ones(scores.shape, bool) if bound is None else whole.false_alarm <= bound
        k, j = np.unravel_index(np.where(allowed, scores, -1).argmax(), scores.shape)
        part, counts = score_parts(evidence, OperatingPoint(whole.logits[k], int(whole.min_areas[j])))[objective].T
        spread = np.nanstd(bootstrap_means(np.where(counts > 0, part, np.nan), evidence.groups, 300))
        k, j, low, high = (int(o[0]) for o in choose_rows(scores[None], allowed[None], np.array([spread / 10])))
        assert (whole.logits[k], whole.min_areas[j], (whole.logits[low], whole.logits[high])) == (expected.logit, expected.min_area, expected.plateau)


@pytest.mark.parametrize("shares", [(1.0,), (.7, .3)])
def test_the_standard_error_is_that_of_many_draws(shares):
    """Ratios over 60 unequal groups, one or two of them added: within 5 % of the spread of 20,000 draws."""
    rng = np.random.default_rng(0)
    terms = tuple((share, *(lambda whole: (whole * rng.beta(4, 3, (60, 5)), whole))(rng.integers(1, 6, (60, 1)).astype(float))) for share in shares)
    sums = ScoreSums("dice", EDGES[512:517], np.array([0]), np.arange(60).astype(str).astype(object), terms)
    error = _draw_errors(sums, np.ones((1, 60)), np.array([2]))[0]
    drawn = sum(share * ratio_draws(part[:, 2], whole[:, 0], group_draws(60, 20_000)) for share, part, whole in terms)
    assert error == pytest.approx(drawn.std(), rel=.05)


def test_every_score_of_every_draw_equals_the_metrics_of_the_drawn_images():
    images, evidence = collection(11)
    point = OperatingPoint(-2.5, 4)
    drawn = score_draws(evidence, point, 15, seed=5)
    names, member = group_members(evidence.groups)
    for w, row in zip(group_draws(len(names), 15, 5), drawn.to_dict("records")):
        chosen = [images[i] for k, times in enumerate(w) for _ in range(times) for i in np.flatnonzero(member == k)]
        expected = segmentation_scores([keep(o, -2.5, 4) for o, _ in chosen], [t for _, t in chosen])
        assert row == pytest.approx({key: expected[key] for key in row}, abs=1e-9, nan_ok=True)
    table = score_table(evidence, point, 15, 5)
    assert table.groups["false_alarm"] == len(set(evidence.groups[evidence.counts == 0])) and table.images["dice"] == 11


def test_results_do_not_depend_on_chunks_or_the_order_of_images():
    _, evidence = collection(12)
    sums = score_sums(evidence, "f2", [0, 5], 32)
    weights = group_draws(len(sums.groups), 60, 1)
    assert choices(sums, weights, 7).equals(choices(sums, weights, 64))
    order = np.random.default_rng(0).permutation(12)
    again = score_sums(evidence.subset(order), "f2", [0, 5], 32)
    assert np.array_equal(again.terms[0][1], sums.terms[0][1]) and choices(again, weights).equals(choices(sums, weights))
    part, whole = np.random.default_rng(1).random((2, 9, 4, 3))
    some = group_draws(9, 50)
    assert np.array_equal(ratio_draws(exact(part), exact(whole), some, 7), ratio_draws(exact(part), exact(whole), some, 50))


def test_intervals_equal_those_of_scipy_within_the_error_of_drawing():
    """Percentile bootstrap of a mean and of a ratio of sums, 20,000 draws each by two generators: ends within 4 standard errors of a quantile."""
    rng = np.random.default_rng(0)
    part, whole = rng.gamma(2, 10, 40), rng.gamma(3, 20, 40)
    weights = group_draws(40, 20_000, 1)
    for columns, statistic in (((part, np.ones(40)), lambda a, b, axis: np.mean(a, axis)), ((part, whole), lambda a, b, axis: np.sum(a, axis) / np.sum(b, axis))):
        mine = ratio_draws(*columns, weights)
        theirs = stats.bootstrap(columns, statistic, paired=True, vectorized=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)).confidence_interval
        for q, end in zip((.025, .975), theirs):
            near = np.quantile(mine, [q - .01, q + .01])
            error = np.sqrt(2 * q * (1 - q) / 20_000) / (.02 / np.ptp(near))
            assert abs(np.quantile(mine, q) - end) < 4 * error


def test_intervals_cover_the_truth_when_groups_are_drawn_and_do_not_when_images_are():
    """300 data sets of 60 scenes with 4 images each that share most of their luck: the truth lies in 90 to 98 % of the intervals; drawing images, in fewer than 90 %."""
    rng, inside = np.random.default_rng(11), np.zeros(2)
    truth, groups = .6, np.arange(240) // 4
    for k in range(300):
        scores = np.clip(rng.beta(6, 4, 60)[groups] + rng.uniform(-.1, .1, 240), 0, 1)
        for j, unit in enumerate((groups, np.arange(240))):
            names, member = group_members(unit)
            low, high = interval(ratio_draws(sum_by_group(exact(scores), member, len(names)), np.bincount(member), group_draws(len(names), 500, k)))
            inside[j] += low <= truth <= high
    assert .90 <= inside[0] / 300 <= .98 and inside[1] / 300 < .85, inside / 300


def noise_sums(rng, groups=40, settings=300):
    part = exact(rng.random((groups, settings)))
    evidence = collection(3)[1]
    return ScoreSums("dice", EDGES[512:512 + settings], np.array([0]), np.arange(groups).astype(str).astype(object), ((1.0, part, np.ones((groups, 1))),), evidence=evidence)


def test_optimism_on_pure_noise_is_positive_and_what_it_is():
    """Every setting's true score is 0.5. Over 40 sets, the folds' optimism is on average the real one (score - 0.5); that of the draws is larger, and both are above 0."""
    rng, real, folds, draws = np.random.default_rng(5), [], [], []
    for k in range(40):
        choice = bootstrap_choice(noise_sums(rng), 100, seed=k)
        table = optimism(choice, 10, 2)
        real.append(choice.point.score - .5)
        draws.append(table.optimism.iloc[1])
        folds.append(table.optimism.iloc[2])
    real, folds, draws = (np.array(o) for o in (real, folds, draws))
    assert (real > 0).all() and (draws > 0).all() and (folds > 0).mean() > .95
    gap = folds - real
    assert abs(gap.mean()) < 3 * gap.std() / np.sqrt(40), gap.mean()
    assert optimism(bootstrap_choice(noise_sums(rng), 100), 10, 2).optimism_low.iloc[1:].min() > 0


def test_optimism_is_nothing_where_there_is_nothing_to_choose():
    rng = np.random.default_rng(0)
    sums = noise_sums(rng)
    same = ((1.0, np.repeat(sums.terms[0][1][:, :1], 300, axis=1), sums.terms[0][2]),)
    table = optimism(bootstrap_choice(ScoreSums(**{**sums.__dict__, "terms": same}), 2000), 10, 3)
    assert table.optimism["left out of the fold"] == 0 and abs(table.optimism["left out of the draw"]) < 1e-12


def test_draws_without_an_image_that_counts_choose_nothing():
    """One of six groups has ships: a draw without it has no Dice with ships."""
    evidence = Evidence((40, 40))
    for i in range(6): evidence.add(f"{i}", *image(i, 2 if i == 0 else 0), f"g{i}")
    choice = bootstrap_choice(score_sums(evidence, "dice_with", [0], 16), 200)
    without = choice.weights[:, 0] == 0
    assert without.any() and (choice.draws.setting[without] == -1).all() and (choice.draws.setting[~without] >= 0).all()
    assert choice.draws.loc[without, ["logit", "score", "fixed", "left_out"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="nothing can be chosen without group g0"): optimism(choice, 3)


def test_a_share_of_empty_images_equal_to_the_evidence_gives_its_own_score():
    _, evidence = collection(12)
    own = (evidence.counts == 0).mean()
    for objective in ("dice", "iou", "f2"):
        plain, shared = (choices(score_sums(evidence, objective, [0, 4], 8, share_empty=o), np.ones((1, 6))).iloc[0] for o in (None, own))
        assert shared.score == pytest.approx(plain.score, abs=1e-12) and abs(shared.logit - plain.logit) <= .5
    with_ships, without = (score_sums(evidence, "dice", [0, 4], 8, share_empty=o) for o in (0, 1))
    assert len(with_ships.terms) == len(without.terms) == 1
    assert choices(with_ships, np.ones((1, 6))).equals(choices(score_sums(evidence, "dice_with", [0, 4], 8), np.ones((1, 6))))
    assert choices(without, np.ones((1, 6))).equals(choices(score_sums(evidence, "dice_without", [0, 4], 8), np.ones((1, 6))))


def test_folds_leave_each_group_out_once_a_repeat_and_subsets_have_their_size():
    folds = fold_draws(23, 5, 4, 1).reshape(4, 5, 23)
    assert ((folds == 0).sum(axis=1) == 1).all() and set((folds == 0).sum(axis=2).ravel()) == {4, 5}
    subsets = subset_draws(30, 9, 200)
    assert (subsets.sum(axis=1) == 9).all() and subsets.max() == 1 and len({o.tobytes() for o in subsets}) > 190


# --- two runs

def test_comparison_equals_loops_and_scipy():
    (one, first), (two, second) = collection(14, 0), collection(14, 1, noise=2.5)
    point, other = OperatingPoint(-2.0, 3), OperatingPoint(-1.5, 0)
    table = compare_runs((first, point), (second.subset(np.arange(14)[::-1]), other), 200, 4)
    names, member = group_members(first.groups)
    dices = [np.array([dice(keep(z, p.logit, p.min_area), t) for z, t in images]) for images, p in ((one, point), (two, other))]
    gap = exact(dices[1]) - exact(dices[0])
    drawn = [sum(gap[i] * w[member[i]] for i in range(14)) / sum(w[member[i]] for i in range(14)) for w in group_draws(len(names), 200, 4)]
    assert table.low["dice"] == pytest.approx(np.quantile(drawn, .025), abs=1e-12) and table.high["dice"] == pytest.approx(np.quantile(drawn, .975), abs=1e-12)
    means = [gap[member == k].mean() for k in range(len(names))]
    assert table.p["dice"] == pytest.approx(stats.wilcoxon(means).pvalue, abs=1e-9)
    f2 = [np.mean([object_f2(keep(z, p.logit, p.min_area), t) for z, t in images]) for images, p in ((one, point), (two, other))]
    assert table.loc["f2", ["first", "second"]].tolist() == pytest.approx(f2, abs=1e-9)


def test_signed_rank_is_the_share_of_sign_flips():
    """All 2^9 sign patterns of distinct differences, counted."""
    differences = np.array([.31, -.12, .05, .44, -.02, .23, .17, .5, -.08])
    ranks = stats.rankdata(np.abs(differences))
    flips = np.array([np.dot(signs, ranks) for signs in itertools.product((-1, 1), repeat=9)])
    p, n = signed_rank(np.append(differences, [0, np.nan]))
    assert n == 9 and p == pytest.approx((np.abs(flips) >= abs(np.dot(np.sign(differences), ranks))).mean(), abs=1e-12)
    assert signed_rank(np.zeros(4)) == (1.0, 0)


def test_paired_tests_hold_their_level():
    """400 comparisons of equal runs on 40 groups: p below 0.05 in 2 to 8 % of them."""
    rng = np.random.default_rng(3)
    below = np.mean([signed_rank(rng.normal(0, 1, 40))[0] < .05 for _ in range(400)])
    assert .02 < below < .08


def test_corrections_equal_their_definitions():
    """Holm by its step-down decisions at every level, Benjamini and Hochberg by its step-up ones, on 100 random sets of p-values with ties."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        p = np.round(rng.random(rng.integers(1, 9))**2, 2)
        order = np.argsort(p, kind="stable")
        for level in (.01, .05, .2):
            rejected = np.zeros(len(p), bool)
            for step, i in enumerate(order):
                if p[i] * (len(p) - step) > level: break
                rejected[i] = True
            assert ((holm(p) <= level) == rejected).all()
            most = max((step + 1 for step, i in enumerate(order) if p[i] * len(p) / (step + 1) <= level), default=0)
            passed = np.zeros(len(p), bool)
            passed[order[:most]] = True
            assert ((benjamini_hochberg(p) <= level) == passed).all()
    assert np.isnan(holm([np.nan]))[0] and np.isnan(benjamini_hochberg([np.nan]))[0]


def brute_ious(logits, truth, point):
    kept, numbers = keep(logits, point.logit, point.min_area), np.unique(truth[truth > 0])
    best = [max([((kept == k) & (truth == n)).sum() / ((kept == k) | (truth == n)).sum() for k in range(1, kept.max() + 1)], default=0) for n in numbers]
    return [o if o > .5 else 0.0 for o in best], kept.max()


def test_found_objects_and_changed_sides_equal_brute_force():
    (one, first), (two, second) = collection(16, 0), collection(16, 1, noise=2.5)
    runs = (first, OperatingPoint(-2.0, 3)), (second, OperatingPoint(-2.5, 6))
    table = changed_sides(*runs).set_index("image")
    assert len(table) > 3 and table.gained.map(len).sum() and table.lost.map(len).sum()
    for i in range(16):
        (a, na), (b, nb) = (brute_ious(*images[i], run[1]) for images, run in zip((one, two), runs))
        assert object_ious(*runs[0])[i].tolist() == a and object_ious(*runs[1])[i].tolist() == b
        gained, lost = (tuple(k for k in range(len(a)) if y[k] and not x[k]) for x, y in ((a, b), (b, a)))
        false = [n - sum(o > 0 for o in ious) for n, ious in ((na, a), (nb, b))]
        if gained or lost or false[0] != false[1]:
            row = table.loc[f"{i}"]
            assert (row.gained, row.lost, [row.false_first, row.false_second]) == (gained, lost, false)
        else: assert f"{i}" not in table.index
    with pytest.raises(ValueError, match="smallest is 0.5"): changed_sides(*runs, iou=.3)


def hidden_catalog():
    """An image whose second object lies wholly under the third, and whose fourth has no pixel of its own at a quarter of the size."""
    maps = [np.zeros((32, 32), np.uint8) for _ in range(5)]
    maps[0][2:8, 2:14] = maps[1][12:15, 4:9] = maps[2][11:18, 3:12] = maps[3][25, 25] = maps[4][20:30, 20:30] = 1
    codes = [encode_instances(o)[0] for o in maps]
    objects = pd.DataFrame([dict(image="a.png", label="ship", rle=o, x0=0, y0=0, x1=1, y1=1, area=1) for o in codes])
    other = pd.DataFrame([dict(image="b.png", label="ship", rle=codes[0], x0=0, y0=0, x1=1, y1=1, area=1)])
    images = pd.DataFrame(dict(image=["b.png", "a.png"], height=32, width=32, count=[1, 5], bytes=1, group="", split=""))
    return Catalog(images, pd.concat([other, objects], ignore_index=True)), codes


@pytest.mark.parametrize("grid", [(32, 32), (8, 8)])
def test_objects_without_a_pixel_keep_the_order_of_the_others(grid):
    catalog, codes = hidden_catalog()
    labels = true_labels(codes, (32, 32), grid)
    evidence = Evidence(grid)
    evidence.add("a.png", np.random.default_rng(0).normal(size=grid).astype(np.float32), labels)
    rows, = object_rows(evidence, catalog)
    assert rows.tolist() == [int(o) for o in np.unique(labels[labels > 0])] and len(rows) < 5
    assert evidence.records[0].object_areas.tolist() == [(labels == o).sum() for o in rows]
    evidence.add("c.png", np.zeros(grid, np.float32), labels)
    with pytest.raises(ValueError, match="c.png of the evidence is not in the Catalog"): object_rows(evidence, catalog)


def test_gallery_shows_each_changed_ship_once(tmp_path):
    (one, first), (_, second) = collection(16, 0), collection(16, 1, noise=2.5)
    rows, objects = [], []
    for i, (_, truth) in enumerate(one):
        (tmp_path/f"{i}").write_bytes(cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes())
        codes = [o for o in encode_instances(truth) if o]
        rows.append(dict(image=f"{i}", height=40, width=40, count=len(codes), bytes=1, group="", split=""))
        objects += [dict(image=f"{i}", label="ship", rle=o, x0=0, y0=0, x1=1, y1=1, area=1) for o in codes]
    catalog = Catalog(pd.DataFrame(rows), pd.DataFrame(objects), tmp_path)
    runs = (first, OperatingPoint(-2.0, 3)), (second, OperatingPoint(-2.5, 6))
    table = changed_sides(*runs)
    figure = plot_changed(catalog, *runs, most=100, side=32, names=("a", "b"))
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len([o for o in titles if o.endswith("b only")]) == table.gained.map(len).sum() and len([o for o in titles if o.endswith("a only")]) == table.lost.map(len).sum()
    assert plot_changed(catalog, runs[0], runs[0]) is None


def test_sweep_compares_each_run_with_the_base():
    base = collection(12, 0)[1], OperatingPoint(-2.0)
    runs = {f"r{k}": (collection(12, k, noise=1 + k)[1], OperatingPoint(-2.0)) for k in (1, 2, 3)}
    table = compare_sweep(base, runs, "dice_with", 100)
    assert table.p_holm.tolist() == holm(table.p).tolist() and (table.p_holm >= table.p_bh).all() and (table.p_bh >= table.p).all()
    assert table.difference["r2"] == compare_runs(base, runs["r2"], 100).difference["dice_with"]
    with pytest.raises(ValueError, match="pixel_dice"): compare_sweep(base, runs, "pixel_dice")


# --- seeds

def test_crossed_bootstrap_equals_loops():
    rng = np.random.default_rng(0)
    values, groups = exact(rng.random((4, 15))), np.arange(15) // 2
    values[1, 3] = values[:, 7] = np.nan
    table = crossed_bootstrap(values, groups, 60, 9)
    names, member = group_members(groups)
    g, r = group_draws(8, 60, 9), group_draws(4, 60, 10)
    for name, (groups_drawn, runs_drawn) in dict(groups=(g, np.ones_like(r)), runs=(np.ones_like(g), r), both=(g, r)).items():
        drawn = []
        for a, b in zip(groups_drawn, runs_drawn):
            cells = [(a[member[i]] * b[k], values[k, i]) for k in range(4) for i in range(15) if np.isfinite(values[k, i])]
            drawn.append(sum(w * v for w, v in cells) / sum(w for w, _ in cells))
        assert (table.low[name], table.high[name]) == interval(np.array(drawn)), name


def test_an_interval_over_images_alone_misses_the_next_seed():
    """300 recipes whose runs differ as much as their images do: over runs and images 85 to 99 % of the intervals hold the truth, over images alone fewer than 70 %."""
    rng, inside = np.random.default_rng(2), np.zeros(2)
    for k in range(300):
        values = .6 + rng.normal(0, .05, (8, 1)) + rng.normal(0, .05, 50) + rng.normal(0, .05, (8, 50))
        table = crossed_bootstrap(np.clip(values, 0, 1), np.arange(50), 300, 2 * k)
        inside += [table.low[o] <= .6 <= table.high[o] for o in ("both", "groups")]
    assert .85 <= inside[0] / 300 <= .99 and inside[1] / 300 < .7, inside / 300


def test_run_scores_are_the_images_own():
    runs = [(collection(9, k)[1], OperatingPoint(-2.0, 3)) for k in range(3)]
    values = run_scores(runs, "dice_with")
    has = runs[0][0].counts > 0
    assert np.isnan(values[:, ~has]).all() and values[1, has].tolist() == exact(image_scores(*[runs[1][0], -2.0, 3]).dice[has]).tolist()
    with pytest.raises(ValueError, match="only"): run_scores([runs[0], (runs[1][0].subset([0, 1]), runs[1][1])])
