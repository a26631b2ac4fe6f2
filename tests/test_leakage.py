"""The studies of leaks: their bootstrap against plain resampling, what they plant, and what their published numbers claim."""
import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shipnb.catalog import read_airbus
from shipnb.overlaps import SIDE, TILE, make_mosaic, make_overlapping_fleet, overlap_pairs
from shipnb.splits import leak_meter
from shipnb.thresholds import interval

ROOT = Path(__file__).parents[1]


def functions(name, **given):
    """The functions that a study defines, with what they use from outside."""
    names = dict(np=np, pd=pd, interval=interval, **given)
    for cell in json.loads((ROOT/"nbs"/"studies"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        body = [o for o in ast.parse("".join(cell["source"])).body if isinstance(o, ast.FunctionDef)]
        exec(compile(ast.Module(body, []), name, "exec"), names)
    return names


leakage = functions("leakage", seed=3)


def scores(rng, own=0.0, unseen=0.0, mosaics=6, folds=3, spread=0.1):
    """Scores of windows in two sets of mosaics, paired: `own` and `unseen` are what the random split is ahead by. Every window has its own difficulty, every mosaic its own gap."""
    rows = []
    for part, ahead in (("own", own), ("unseen", unseen)):
        for m in range(mosaics):
            gap = ahead + rng.normal(0, spread)
            for w in range(rng.integers(1, 4)):
                hard, mine = rng.normal(0.5, 0.3), rng.integers(folds)
                for kind in ("random", "grouped"):
                    for k in range(folds) if part == "unseen" else [int(mine + (kind == "random")) % folds]:
                        rows.append(dict(kind=kind, part=part, fold=k, group=f"{part}{m}", image=f"{part}{m}-{w}", dice=hard + gap * (kind == "random") + rng.normal(0, spread / 4)))
    return pd.DataFrame(rows)


def test_draws_against_plain_resampling():
    """The weighted means are the means of the rows that the drawn mosaics, and for unseen windows the drawn models, would repeat."""
    rows = scores(np.random.default_rng(0), 0.3)
    found, rng = leakage["drawn_gaps"](rows, 20, seed=5), np.random.default_rng(5)
    for i in range(20):
        drawn = {part: sorted(rows["group"][rows["part"] == part].unique()) for part in ("own", "unseen")}
        drawn = {part: [names[j] for j in rng.integers(len(names), size=len(names))] for part, names in drawn.items()}
        models = rng.integers(3, size=3)
        def mean(kind, part, drawn=drawn, models=models):
            here = [rows[(rows.kind == kind) & (rows.part == part) & (rows.group == name)] for name in drawn[part]]
            return np.mean([value for o in here for value in (o["dice"] if part == "own" else [v for k in models for v in o["dice"][o["fold"] == k]])])
        claimed, real = (mean("random", part) - mean("grouped", part) for part in ("own", "unseen"))
        assert found.loc[i].tolist() == pytest.approx([claimed, real, claimed - real], abs=1e-12)


def test_a_planted_inflation_is_found_exactly():
    rows = scores(np.random.default_rng(1), 0.25, 0.1, spread=0)
    found = leakage["summary"](rows, 50, 0)["gaps"]
    for name, value in (("claimed", 0.25), ("real", 0.1), ("inflation", 0.15)): assert found[name]["mean"] == pytest.approx(value, abs=1e-12)
    # the same windows stand on both sides, so a draw of other windows changes nothing either
    for o in found.values(): assert o["low"] == pytest.approx(o["mean"], abs=1e-9) == o["high"]


def test_the_interval_covers_the_truth():
    """In 40 made-up studies the 95 % interval of the inflation holds the planted 0.2 in at least 32 (it would miss that about once in 5,000 times)."""
    hits = 0
    for k in range(40):
        o = leakage["summary"](scores(np.random.default_rng(100 + k), 0.3, 0.1, mosaics=12, folds=2), 100, k)["gaps"]["inflation"]
        hits += o["low"] <= 0.2 <= o["high"]
    assert 32 <= hits


def test_even_leaves_training_windows_out_and_nothing_else():
    both = {"random": np.array(["train"] * 9 + ["valid"] * 3, object), "grouped": np.array(["valid"] * 5 + ["train"] * 7, object)}
    before = {kind: parts.copy() for kind, parts in both.items()}
    after = leakage["even"](both, 0)
    assert [(o == "train").sum() for o in after.values()] == [7, 7]
    for kind, parts in after.items():
        changed = parts != before[kind]
        assert (before[kind][changed] == "train").all() and (parts[changed] == "left").all()
    again = leakage["even"]({kind: parts.copy() for kind, parts in before.items()}, 0)
    assert all((again[kind] == after[kind]).all() for kind in after)


# --- what the study of the pairs takes for blank

def test_blank_tiles_are_those_of_one_colour():
    painted = make_mosaic(0, 0)[0].copy()
    painted[:, 2 * TILE + 20:] = (0, 0, 255)
    painted[:TILE, :TILE] = 90
    accuracy = functions("overlap_accuracy", TILE=TILE, SIDE=SIDE, make_mosaic=lambda *o: (painted, None))
    blank = accuracy["blank_tiles"](0, 0, False)
    assert blank == {(0, 0)} | {(r, c) for r in range(6) for c in range(2, 6)}   # a strip of 20 pixels is one of 16 columns of cells and a part of the next


def test_rows_of_and_share():
    accuracy = functions("overlap_accuracy", PAIR_COLUMNS=["image_a", "image_b", "dy", "dx"], wilson=lambda k, n: (0, 1))
    assert accuracy["rows_of"](pd.DataFrame([("a", "b", 0, 1, 0.5)], columns=["image_a", "image_b", "dy", "dx", "best"])) == {("a", "b", 0, 1)}
    assert accuracy["share"](3, 4)["share"] == 0.75 and np.isnan(accuracy["share"](0, 0)["share"])


# --- the published numbers

def test_published_pairs():
    published = json.loads((ROOT/"figures"/"overlaps.json").read_text(encoding="utf-8"))
    assert len(published["scores"]) == 5 and published["mosaics_of_each_kind"] >= 12
    for kind, o in published["scores"].items():
        assert o["pairs"] > 500, kind
        for name in ("recall", "precision"): assert o[name]["low"] <= o[name]["share"] <= o[name]["high"] and o[name]["share"] >= 0.99, (kind, name)
    assert sum(o["blank_pairs"] for o in published["scores"].values()) > 0, "the rule for blank tiles was not put to use"


def test_published_leaks():
    published = json.loads((ROOT/"figures"/"leakage_mosaics.json").read_text(encoding="utf-8"))
    assert (ROOT/"figures"/"leakage_mosaics.png").stat().st_size > 10_000
    assert max(published["leaking_tiles"]["grouped"]) == 0 and min(published["leaking_tiles"]["random"]) > 0.5
    assert published["folds"] >= 4 and published["n"]["unseen_mosaics"] >= 20 and published["n"]["pool_mosaics"] >= 20
    scores, gaps = published["scores"], published["gaps"]
    for name, part in (("claimed", "own"), ("real", "unseen")): assert gaps[name]["mean"] == pytest.approx(scores["random"][part] - scores["grouped"][part], abs=1e-9)
    assert gaps["inflation"]["mean"] == pytest.approx(gaps["claimed"]["mean"] - gaps["real"]["mean"], abs=1e-9)
    for o in gaps.values(): assert o["low"] <= o["mean"] <= o["high"]


def test_unseen_mosaics_share_nothing_with_the_pool(tmp_path):
    """The study's two sets come from two seeds: no window of one overlaps a window of the other."""
    for k, seed in enumerate((500, 501)): make_overlapping_fleet(tmp_path/str(k), 2, seed, windows=6)
    (tmp_path/"both"/"train_v2").mkdir(parents=True)
    files = [o for k in "01" for o in (tmp_path/k/"train_v2").iterdir()]
    for o in files: (tmp_path/"both"/"train_v2"/o.name).symlink_to(o)
    pd.DataFrame(dict(ImageId=[o.name for o in files], EncodedPixels="")).to_csv(tmp_path/"both"/"train_ship_segmentations_v2.csv", index=False)
    catalog = read_airbus(tmp_path/"both")
    pairs, first = overlap_pairs(catalog), {o.name for o in (tmp_path/"0"/"train_v2").iterdir()}
    assert len(pairs) > 10 and (pairs["image_a"].isin(first) == pairs["image_b"].isin(first)).all()
    parts = np.where(catalog.images["image"].isin(first), "train", "valid")
    assert leak_meter(catalog, parts, pairs)["share"]["valid"] == 0
