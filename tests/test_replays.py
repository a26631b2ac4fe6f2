"""The replays of the sources: their published tables, every fault on examples checked by hand, the statistics behind the verdicts, and what the published runs claim."""
import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from shipnb.catalog import read_airbus
from shipnb.fleet import make_fleet
from shipnb.losses import make_loss
from shipnb.masks import rle_decode, rle_encode
from shipnb.thresholds import EDGES, Evidence, image_scores

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT/"nbs"/"studies"/"reference"


def definitions(name, constants, **given):
    """Imports, functions and classes of a study, and the named constants; its run is left out."""
    names = dict(given, __name__=name)
    for cell in json.loads((ROOT/"nbs"/"studies"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        kept = [o for o in ast.parse("".join(cell["source"])).body if isinstance(o, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                or isinstance(o, ast.Assign) and {t.id for target in o.targets for t in ast.walk(target) if isinstance(t, ast.Name)} <= set(constants)]
        exec(compile(ast.Module(kept, []), name, "exec"), names)
    assert set(constants) <= set(names)
    return SimpleNamespace(**names)


airbus = definitions("replay_airbus_unet", ["QUOTA", "BASE", "LOSSES", "MODEL1", "MODEL2", "FAULTS", "ALONE", "STAGES", "claims"], draws=200, seeds=1)
steel = definitions("replay_severstal", [], draws=200, crop=64)


# --- the published tables, as the sources print them

PRINTED = {
    "airbus_unet_zero_ratio": (["zero_ships_ratio_per_batch", "dice", "loss"], "0.25 0.474 0.989 | 0.15 0.490 0.987 | 0.10 0.537 0.986 | 0.00 0.539 0.985"),
    "airbus_unet_losses": (["loss_function", "dice", "loss"], "dice 0.539 0.985 | focal 0.759 0.172 | lovasz 0.001 1.000 | bce 0.821 0.691"),
    "airbus_unet_batch": (["batch_size", "dice", "loss"], "9 0.762 0.172 | 16 0.759 0.172 | 25 0.739 0.172"),
    "airbus_unet_model1_stages": (["lr", "epochs", "dice", "loss"], "1e-4 5 0.75926 0.17284 | 1e-5 5 0.81629 0.17279 | 1e-5 5 0.83660 0.17277 | 1e-10 1 0.841535 0.172753 | 1e-10 1 0.841536 0.172753 | 1e-10 1 0.841536 0.172753 | "
                                  "1e-10 1 0.841536 0.172753 | 1e-10 1 0.841536 0.172753 | 1e-9 1 0.841539 0.172753 | 1e-8 1 0.841661 0.172753 | 1e-7 2 0.84222 0.17274 | 1e-8 1 0.84252 0.17275 | 1e-9 1 0.84251 0.17275"),
    "airbus_unet_model2_stages": (["lr", "epochs", "dice", "loss"], "1e-4 5 0.77497 0.17282 | 1e-5 5 0.82578 0.17277 | 1e-5 5 0.84657 0.17276 | 1e-10 5 0.84761 0.17276 | 1e-10 5 0.84761 0.17276"),
    "airbus_unet_thresholds": (["dice", "loss", "best_threshold"], "0.84251 0.17275 1e-2 | 0.84761 0.17276 4e-4"),
    "severstal_epochs": (["epoch", "phase", "loss", "iou", "dice", "dice_neg", "dice_pos"], "0 train 0.0386 0.1436 0.3747 0.5761 0.1963 | 0 val 0.0205 0.3210 0.5299 0.6596 0.4149 | 1 train 0.0196 0.2905 0.5555 0.7579 0.3763 | 1 val 0.0166 0.2829 0.6151 0.9035 0.3596"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_reference_tables_are_as_printed(name):
    columns, rows = PRINTED[name]
    table = pd.read_csv(REFERENCE/f"{name}.csv", dtype=str)
    assert [" ".join(o) for o in table[columns].to_numpy().tolist()] == rows.split(" | ")
    assert table["source"].str.len().min() > 20 and table["source"].nunique() == 1


def test_first_stage_has_no_scheduler():
    for name in ("model1", "model2"):
        table = pd.read_csv(REFERENCE/f"airbus_unet_{name}_stages.csv", dtype=str, keep_default_na=False)
        assert table["scheduler"].tolist() == ["none"] + ["plateau(max; 0.1; 1)"] * (len(table) - 1) and set(table["batch_size"]) == {"16"}


# --- (a) a second sigmoid

@pytest.mark.parametrize("loss", ["bce", "focal", "dice", "lovasz"])
def test_a_second_sigmoid(loss):
    """The loss is that of the probabilities taken for logits, and so is its gradient; without the fault it is the Task's own."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 1, 1)
    batch = dict(image=torch.randint(0, 255, (2, 8, 8, 3), dtype=torch.uint8), mask=(torch.rand(2, 8, 8) < 0.3).to(torch.uint8), index=torch.arange(2))
    from shipnb.dataset import to_input
    z, y = model(to_input(batch["image"])), batch["mask"][:, None].float()
    for twice, said in ((True, 1 / (1 + torch.exp(-z))), (False, z)):
        value = sum(airbus.replay_task(loss, twice).loss(model, batch).values())
        expected = sum(make_loss(loss)(said, y).values())
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)
        for a, b in zip(torch.autograd.grad(value, model.parameters()), torch.autograd.grad(expected, model.parameters(), retain_graph=True)): assert torch.allclose(a, b, atol=1e-6)


# --- (b) resize

def test_linear_at_one_third_is_the_centre_pixel():
    rng = np.random.default_rng(0)
    img, mask = rng.integers(0, 256, (96, 96, 3), np.uint8), rng.integers(0, 2, (96, 96), np.uint8)
    small, small_mask = airbus.source_resize(img, mask, 32)
    for y, x in ((0, 0), (5, 9), (31, 31)):
        assert small[y, x].tolist() == img[3 * y + 1, 3 * x + 1].tolist() and small_mask[y, x] == mask[3 * y, 3 * x]


def test_resize_is_what_albumentations_does():
    import albumentations as A
    img, mask = np.random.default_rng(1).integers(0, 256, (96, 96, 3), np.uint8), np.random.default_rng(2).integers(0, 2, (96, 96), np.uint8)
    out, (small, small_mask) = A.Resize(32, 32)(image=img, mask=mask), airbus.source_resize(img, mask, 32)
    assert (out["image"] == small).all() and (out["mask"] == small_mask).all()


# --- (d, e, f) the sampler

COUNTS = np.repeat([0, 1, 2], [40, 50, 30])


def epoch(sampler, number): return [sampler.batch(number, k) for k in range(len(sampler))]


def test_the_same_batches_every_epoch():
    right, repeat, replace, source = (airbus.FaultyBatches(COUNTS, 16, 0.25, seed=3, order=o) for o in ("streams", "repeat", "replace", "source"))
    from shipnb.sampler import ShipStratifiedSampler
    assert epoch(right, 2) == epoch(ShipStratifiedSampler(COUNTS, 16, 0.25, seed=3), 2)
    assert epoch(repeat, 0) == epoch(repeat, 5) == epoch(right, 0) and epoch(right, 0) != epoch(right, 1)
    assert epoch(source, 0) == epoch(source, 5) == epoch(replace, 0) and epoch(replace, 0) != epoch(replace, 1)


def test_drawing_with_replacement():
    """Every batch has the asked composition and no image twice; over an epoch images repeat, and about 1/e of them are never shown."""
    counts = np.repeat([1, 2], [3000, 1800])
    sampler = airbus.FaultyBatches(counts, 16, 0, 0.375, order="replace")
    batches = epoch(sampler, 0)
    for b in batches: assert len(set(b)) == 16 and (counts[b] > 1).sum() == 6
    drawn = np.concatenate(batches)
    assert abs(1 - len(set(drawn.tolist())) / len(counts) - math.exp(-len(drawn) / len(counts))) < 0.03
    right = np.concatenate(epoch(airbus.FaultyBatches(counts, 16, 0, 0.375), 0))
    assert len(set(right.tolist())) == len(right)


def test_truncated_shares():
    assert int(16 * 0.3629) == 5 and airbus.truncated(16, 0.3629) == 5 / 16 and airbus.truncated(16, 0.10) == 1 / 16 and airbus.truncated(16, 0.15) == 2 / 16
    sampler = airbus.FaultyBatches(COUNTS, 16, 0, airbus.truncated(16, 0.3629))
    assert {int((COUNTS[b] > 1).sum()) for b in epoch(sampler, 0)} == {5}


# --- (h) the scheduler

def test_a_scheduler_per_call_never_acts():
    falling = np.linspace(0.9, 0.1, 12)
    assert airbus.plateau_reductions(falling, 1, True) == 1 and airbus.plateau_reductions(falling, 3, True) == 3
    for calls in (1, 3, 12): assert airbus.plateau_reductions(falling, calls, False) == 0
    assert airbus.plateau_reductions(np.linspace(0.1, 0.9, 12), 3, True) == 0


# --- windows

def test_windows_tile_the_images_and_keep_scenes(tmp_path):
    fleet = read_airbus(make_fleet(tmp_path/"fleet", 4, 5))
    airbus.cut_windows(fleet, tmp_path/"set", 384)
    windows = read_airbus(tmp_path/"set")
    assert len(windows) == 16 and set(windows.images["group"]) == set(fleet.images["group"])
    lost = 0
    for i, name in enumerate(fleet.images["image"]):
        whole = np.zeros((768, 768), np.uint8)
        for code in fleet.rles(i): whole |= rle_decode(code)
        for y in (0, 384):
            for x in (0, 384):
                k = windows.images["image"].tolist().index(f"{Path(name).stem}-{y}-{x}.png")
                assert (windows.read_image(k) == fleet.read_image(i)[y:y + 384, x:x + 384]).all()
                part = np.zeros((384, 384), np.uint8)
                for code in windows.rles(k): part |= rle_decode(code, (384, 384))
                rest = whole[y:y + 384, x:x + 384] - part       # never negative: nothing is added
                assert rest.max(initial=0) <= 1
                lost += int(rest.sum())
    assert fleet.objects["area"].sum() > 0 and lost < 9 * 4 * len(fleet.objects)     # slivers of fewer than 9 pixels only
    train, held = airbus.pick_windows(windows, 8, 8, 0)
    assert not set(train.images["group"]) & set(held.images["group"])


# --- the statistics

def test_verdicts():
    assert [airbus.verdict(*o) for o in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1), (math.nan, 0.1))] == ["holds", "does not hold", "undecided at this size", "undecided at this size", "not measured in this run"]
    assert airbus.verdict(0.1, 0.2, -1) == "does not hold" and airbus.verdict(-0.2, -0.1, -1) == "holds"


def test_paired_interval_against_plain_resampling():
    """The weighted means are the means of the rows that drawn scenes and seeds would repeat."""
    rng = np.random.default_rng(0)
    difference, groups = rng.normal(0, 1, (3, 20)), rng.integers(0, 6, 20)
    difference[:, ::4] = np.nan
    found = airbus.paired_interval(difference, groups, 40, seed=9)
    rng, names, means = np.random.default_rng(9), np.unique(groups.astype(str)), []
    scenes, seeds = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), 40), rng.multinomial(3, np.full(3, 1 / 3), 40)
    for scene, seed in zip(scenes, seeds):
        rows = [difference[s, i] for s in range(3) for _ in range(seed[s]) for g, name in enumerate(names) for _ in range(scene[g]) for i in np.flatnonzero(groups.astype(str) == name)]
        means.append(np.nanmean(rows))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=1e-12)
    assert found["mean"] == pytest.approx(np.nanmean(difference))


def test_paired_interval_covers_the_truth():
    hits = 0
    for k in range(40):
        rng = np.random.default_rng(k)
        scene, seed = rng.normal(0.2, 0.2, 30), rng.normal(0, 0.02, (3, 1))
        o = airbus.paired_interval(np.repeat(scene, 2) + seed + rng.normal(0, 0.1, (3, 60)), np.repeat(np.arange(30), 2), 200, k)
        hits += o["low"] <= 0.2 <= o["high"]
    assert 32 <= hits


def evidence_of(rng, images=12):
    found = Evidence((16, 16), data="x")
    for k in range(images):
        labels = np.zeros((16, 16), np.int32)
        for n in range(k % 3): labels[3 + 6 * n:6 + 6 * n, 4:10] = n + 1
        found.add(f"{k}", (rng.normal(-3, 2, (16, 16)) + 4 * (labels > 0)).astype(np.float32), labels, f"{k // 2}")
    return found


def test_dice_at_every_edge():
    found = evidence_of(np.random.default_rng(0))
    matrix = airbus.dice_matrix(found)
    for k in (600, 1000, 1024, 1100, 1300): assert matrix[:, k] == pytest.approx(image_scores(found, EDGES[k])["dice"].to_numpy(), abs=1e-12)


def test_nine_images():
    """A model whose best threshold is the same on every image loses nothing by nine; one whose best threshold is chance does."""
    counts, groups = np.tile([0, 1, 2], 20), np.repeat(np.arange(30), 2)
    sure = np.tile(np.exp(-np.linspace(-3, 3, len(EDGES)) ** 2), (60, 1))
    rows = airbus.nine_images(sure, counts, groups, 30)
    assert len(rows) == 30 and (rows["nine"] == rows["half"]).all() and (rows["dice_nine"] == rows["dice_half"]).all()
    chance = np.random.default_rng(0).random((60, len(EDGES)))
    rows = airbus.nine_images(chance, counts, groups, 30)
    assert rows["nine"].nunique() > 5 and abs((rows["dice_half"] - rows["dice_nine"]).mean()) < 0.1


def test_greedy_keeps_the_best_of_each_stage():
    asked = []
    def score(o):
        asked.append(dict(o))
        return {"dice": 1, "bce": 3, "focal": 2}[o["loss"]] + (o.get("batch") == 9)
    rows, best = airbus.greedy(score, {"loss": "dice"}, {"loss": ("dice", "focal", "bce"), "batch": (16, 9)})
    assert best == {"loss": "bce", "batch": 9} and asked[-1] == best and asked[3] == {"loss": "bce", "batch": 16} and [o["score"] for o in rows] == [1, 2, 3, 3, 4]


def test_rank_correlation_against_scipy():
    from scipy.stats import spearmanr
    a, b = np.random.default_rng(0).normal(size=(2, 15)).round(1)
    assert airbus.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert math.isnan(airbus.rank_correlation([1, 2], [2, 1])) and math.isnan(airbus.rank_correlation([1, 1, 1], [1, 2, 3]))


def test_settings_change_what_they_say():
    assert airbus.label(airbus.setting()) == "base" and airbus.label(airbus.setting(data="real", seed=2)) == "base"
    assert airbus.label(airbus.setting(loss="focal", twice=True)) == "loss focal, twice"
    with pytest.raises(ValueError, match="a setting has no 'rate'"): airbus.setting(rate=1)
    for name, pair in airbus.FAULTS.items():
        assert airbus.setting(**pair[0]) != airbus.setting(**pair[1]), name
        assert len([k for k in airbus.BASE if airbus.setting(**pair[0])[k] != airbus.setting(**pair[1])[k]]) == 1, f"{name} changes more than one thing"
    wanted = airbus.all_settings(["fleet", "real"], list(airbus.FAULTS), list(airbus.ALONE), 3)
    assert len({json.dumps(o, sort_keys=True) for o in wanted}) == len(wanted) and {o["seed"] for o in wanted} == {0, 1, 2}


def test_the_same_start_and_the_same_order():
    """Base and a fault that leaves the order draw the same images."""
    a, b = (airbus.FaultyBatches(COUNTS, 16, 0.25, seed=1, order="streams") for _ in range(2))
    assert epoch(a, 3) == epoch(b, 3)


# --- the steel document

def test_one_based_starts_as_positions():
    assert np.flatnonzero(steel.source_mask("1 3 10 5").ravel(order="F")).tolist() == [1, 2, 3, 10, 11, 12, 13, 14]
    square = np.zeros((256, 1600), np.uint8)
    square[20:24, 30:36] = 1
    low = steel.source_mask(rle_encode(square))
    assert (low == np.roll(square, 1, 0)).all()
    assert steel.shift_cost(rle_encode(square)) == dict(area=24, runs=6, dice=0.75)
    last = np.zeros((256, 1600), np.uint8)
    last[255, 1599] = 1
    assert steel.source_mask(rle_encode(last)).sum() == 0     # beyond the last pixel a slice writes nothing


def test_cost_of_the_shift_by_the_formula():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = cv2.blur(rng.random((64, 64)), (5, 5)) > 0.5
        mask[-1] = 0                                           # no run over the foot of a column
        o = steel.shift_cost(rle_encode(mask.astype(np.uint8)), (64, 64))
        runs = sum(int(a and not b) for column in mask.T for a, b in zip(column, [False, *column[:-1]]))
        assert o["runs"] == runs and o["dice"] == pytest.approx(1 - runs / mask.sum(), abs=1e-12)


def document_metric(probability, truth, threshold=0.5):
    """The steel document's `metric`, as printed there."""
    batch_size = len(truth)
    probability, truth = probability.view(batch_size, -1), truth.view(batch_size, -1)
    p, t = (probability > threshold).float(), (truth > 0.5).float()
    t_sum, p_sum = t.sum(-1), p.sum(-1)
    neg_index, pos_index = torch.nonzero(t_sum == 0), torch.nonzero(t_sum >= 1)
    dice_neg, dice_pos = (p_sum == 0).float(), 2 * (p * t).sum(-1) / ((p + t).sum(-1))
    return dice_neg[neg_index], dice_pos[pos_index]


def document_iou(pred, label):
    """The mean of the document's `compute_ious` over a batch, for class 1."""
    ious = []
    for p, c in zip(pred, label):
        if c.sum() == 0: ious.append(np.nan)
        else: ious.append(np.logical_and(p == 1, c == 1).sum() / np.logical_or(p == 1, c == 1).sum())
    return np.nanmean(ious)


def test_the_documents_metric():
    rng = np.random.default_rng(0)
    p, y = rng.random((10, 4, 8, 8)).astype(np.float32), (rng.random((10, 4, 8, 8)) < 0.1).astype(np.float32)
    y[6:], p[8:] = 0, 0
    dice, has = steel.source_metric(p, y)
    neg, pos = document_metric(torch.from_numpy(p), torch.from_numpy(y))
    assert sorted(dice[has]) == pytest.approx(sorted(pos.flatten().tolist()), abs=1e-6) and sorted(dice[~has]) == sorted(neg.flatten().tolist())
    assert steel.source_iou(p, y) == pytest.approx(document_iou((p > 0.5).astype(int), y.astype(int)))
    assert math.isnan(steel.source_iou(p[6:], y[6:]))


def test_the_last_group_is_dropped():
    for batches, accumulate in ((20, 8), (16, 8), (5, 8), (7, 1)):
        used = sum(steel.source_steps(batches, accumulate), [])
        assert used == list(range(batches - batches % accumulate))
        assert batches - len(used) == steel.dropped_batches(batches * 4, 4, accumulate)


def test_crops_flip_image_and_mask_together():
    images = np.random.default_rng(0).integers(0, 255, (8, 6, 6, 3), np.uint8)
    data = steel.Crops(images, images[..., 0].copy(), flip=True, seed=1)
    batch = data.__getitems__(list(range(8)))
    assert (batch["image"][..., 0] == batch["mask"]).all()
    flipped = [bool((batch["mask"][i].numpy() == images[i, :, ::-1, 0]).all()) for i in range(8)]
    assert 0 < sum(flipped) < 8
    data.set_epoch(1)
    assert not torch.equal(data.__getitems__(list(range(8)))["mask"], batch["mask"])


def test_real_strips_are_grey(real_data):
    """Why reading them as BGR costs nothing."""
    paths = sorted((real_data/"severstal").rglob("*.jpg"))[::10]
    assert len(paths) >= 10
    for path in paths: assert np.abs(steel.source_input(path) - steel.right_input(path)).max() == 0


# --- the published runs

def test_published_airbus():
    found = json.loads((ROOT/"figures"/"replay_airbus.json").read_text(encoding="utf-8"))
    assert (ROOT/"figures"/"replay_airbus.png").stat().st_size > 10_000
    assert found["seeds"] >= 3 and found["epochs"] >= 10 and found["trainings"] <= found["planned"] and found["core_minutes"] <= 60
    assert found["core_minutes"] + found["beyond_list"]["core_minutes"] <= 90      # all of it, with the greedy order
    measured = [o for row in found["costs"].values() for kind in row.values() for o in (kind["at_half"], kind["at_best"]) if o["mean"] is not None]
    assert measured and all(o["low"] <= o["mean"] <= o["high"] for o in measured)
    for name, row in found["costs"].items():
        for kind in row.values():
            if kind["at_half"]["mean"] is not None: assert kind["at_half"]["mean"] == pytest.approx(kind["with_fault"] - kind["without"], abs=1e-9), name
    assert {o["verdict"] for o in found["claims"]} <= {"holds", "does not hold", "does not hold as built", "holds behind a second sigmoid", "undecided at this size", "costs", "helps here", "not measured in this run"}
    for o in found["flagged"]: assert o["share"] == float(o["twice"]), "the doctor flags a second sigmoid, and only that"


def test_published_steel():
    found = json.loads((ROOT/"figures"/"replay_steel.json").read_text(encoding="utf-8"))
    assert found["shift"]["masks"] >= 50 and found["shift"]["interval"][0] <= found["shift"]["dice"] <= found["shift"]["interval"][1]
    assert all(o["largest_difference"] == 0 for o in found["inputs"].values()) and found["dropped"] == dict(batches=2514, dropped=2)
    for o in found["offsets"]: assert abs(o["down"] - (o["reading"] != "right")) < 0.5 and abs(o["right"]) < 0.5
