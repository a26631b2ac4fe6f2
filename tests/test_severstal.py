"""The steel system: masks as bits, one pass for all classes, points and predictions against the document's own post-processing, the CSV, and the whole study on real strips."""
import ast
import json
import shutil
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from shipnb.catalog import Catalog
from shipnb.choosing import choose_classes, class_mean, collect_classes, held_out_scores, image_class_scores, predict_classes
from shipnb.dataset import DecodedCache, SegmentationDataset, to_input, to_target
from shipnb.dataset_tasks import ClassMasks
from shipnb.formats import read_severstal, to_severstal_csv
from shipnb.masks import render_mask, rle_decode, rle_encode
from shipnb.metrics import mask_counts
from shipnb.runs import read_overrides, read_parameters, run_notebook
from shipnb.thresholds import EDGES, Evidence, OperatingPoint, collect_evidence, edge_index, image_logits, point_scores, surface

ROOT = Path(__file__).parents[1]
CLASSES = [f"defect_{k}" for k in range(1, 5)]
SIZE = (64, 160)


class FourMaps(torch.nn.Module):
    """Logits of four classes, of both signs: multiples of 1/16 and a bit, so that doubling the size linearly is exact and none is 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.mix = torch.nn.Conv2d(3, 4, 5, padding=2)
        torch.nn.init.normal_(self.mix.weight, std=0.35)

    def forward(self, x): return torch.round(48 * self.mix(x)) / 16 + 1 / 1024


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    """Six small strips with blobs, in the challenge's layout; some have two classes, one has none."""
    root, rows = tmp_path_factory.mktemp("plates"), []
    (root/"train_images").mkdir()
    for i in range(6):
        rng = np.random.default_rng(i)
        cv2.imwrite(str(root/"train_images"/f"p{i}.png"), cv2.GaussianBlur(rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8), (0, 0), 2) * 2)
        for k in rng.choice(4, i % 3, replace=False):
            mask = cv2.ellipse(np.zeros(SIZE, np.uint8), (int(rng.integers(20, 140)), int(rng.integers(15, 50))), (int(rng.integers(5, 25)), int(rng.integers(4, 12))), 0, 0, 360, 1, -1)
            rows.append((f"p{i}.png", k + 1, rle_encode(mask)))
    pd.DataFrame(rows, columns=["ImageId", "ClassId", "EncodedPixels"]).to_csv(root/"train.csv", index=False)
    return read_severstal(root)


@pytest.fixture(scope="module")
def found(plates): return collect_classes(FourMaps(), plates, (32, 80), CLASSES, batch_size=4)


# --- masks as bits

@pytest.mark.parametrize("size", [SIZE, (32, 80)])
def test_a_bit_for_each_class(plates, size):
    bits = ClassMasks(plates, size, CLASSES)
    for i in range(len(plates)):
        targets = to_target(torch.from_numpy(bits.mask(i))[None], classes=4)[0].numpy()
        for k, name in enumerate(CLASSES):
            codes = plates.objects.loc[(plates.objects["image"] == plates.images["image"][i]) & (plates.objects["label"] == name), "rle"].tolist()
            assert np.array_equal(targets[k], render_mask(codes, SIZE, size) if codes else np.zeros(size))
            if size == SIZE: assert np.array_equal(targets[k], sum((rle_decode(o, SIZE) for o in codes), np.zeros(SIZE, np.uint8)))


def test_with_a_cache_and_mirrored(plates, tmp_path):
    """The cache's images, the bits' masks; a mirror image and its mask turn together, the same in the same epoch."""
    cache = DecodedCache.open(plates, (32, 80), tmp_path/"cache")
    bits, some = ClassMasks(plates, (32, 80), CLASSES, cache), plates.subset([4, 5, 2])
    mirror = SegmentationDataset(some, (32, 80), ClassMasks(some, (32, 80), CLASSES, cache), transform=A.Compose([A.HorizontalFlip(p=0.5)]), seed=1)
    turned = []
    for epoch in range(4):
        mirror.set_epoch(epoch)
        batch = mirror.__getitems__([0, 1, 2])
        assert torch.equal(batch["image"], mirror.__getitems__([0, 1, 2])["image"])
        for k, i in enumerate([4, 5, 2]):
            pair = batch["image"][k].numpy(), batch["mask"][k].numpy()
            flip = not np.array_equal(pair[0], bits.image(i))
            turned.append(flip)
            for ours, plain in zip(pair, (bits.image(i), bits.mask(i))): assert np.array_equal(ours, plain[:, ::-1] if flip else plain)
    assert 0 < sum(turned) < len(turned)
    assert mirror.__getitems__([0])["has_ship"].tolist() == [plates.counts[4] > 0]


# --- one pass, four Evidence

class OneMap(torch.nn.Module):
    """One channel of another model."""

    def __init__(self, model, k):
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x): return self.model(x)[:, self.k:self.k + 1]


def test_each_class_is_what_the_pass_of_that_class_alone_gives(plates, found):
    for k, name in enumerate(CLASSES):
        objects = plates.objects[plates.objects["label"] == name]
        images = plates.images.assign(count=plates.images["image"].map(objects["image"].value_counts()).fillna(0).astype(int))
        alone = collect_evidence(OneMap(FourMaps(), k), Catalog(images, objects, plates.root), (32, 80), batch_size=3)
        assert found[name].grid == alone.grid == SIZE and found[name].label == name
        for ours, theirs in zip(found[name].records, alone.records):
            for key in ("image", "group", "height", "width"): assert getattr(ours, key) == getattr(theirs, key)
            for key in ("object_areas", "object_counts", "background_counts", "parent", "level", "area", "overlap", "match", "match_overlap"):
                assert np.array_equal(getattr(ours, key), getattr(theirs, key)), (name, ours.image, key)


def test_the_pass_leaves_the_model_as_it_was(plates):
    model = FourMaps().train()
    assert next(iter(collect_classes(model, plates.subset([0]), (32, 80), CLASSES).values())).counts.tolist() == [0] and model.training
    with pytest.raises(ValueError, match="in eval mode"): image_logits(model, [plates.read_image(0)], (32, 80), classes=4)
    with pytest.raises(ValueError, match="logits of 5 classes"): image_logits(model.eval(), [plates.read_image(0)], (32, 80), classes=5)
    with pytest.raises(ValueError, match="no image to score"): collect_classes(model, plates.subset([]), (32, 80), CLASSES)


# --- the document's post-processing

def post_process(probability, threshold, min_size):
    """As the document does it, rewritten: components of p > threshold with more than `min_size` pixels."""
    count, labels = cv2.connectedComponents((probability > threshold).astype(np.uint8))
    return np.isin(labels, [k for k in range(1, count) if (labels == k).sum() > min_size])


@pytest.mark.parametrize("min_size", [0, 40, 350])
def test_prediction_is_the_documents_post_processing(plates, min_size):
    """More than n pixels is at least n + 1; no logit lies on an edge, so p > 0.5 and p >= 0.5 are one."""
    model, points = FourMaps().eval(), {name: OperatingPoint(0.0, min_size + 1, SIZE) for name in CLASSES}
    kept = predict_classes(model, plates, points, (32, 80))
    assert kept.images["image"].tolist() == plates.images["image"].tolist() and len(kept.objects) == kept.counts.sum()
    total = 0
    for i, name in enumerate(plates.images["image"]):
        x = to_input(torch.from_numpy(cv2.resize(plates.read_image(i), (80, 32), interpolation=cv2.INTER_AREA))[None])
        with torch.inference_mode(): z = torch.nn.functional.interpolate(model(x), size=SIZE, mode="bilinear")[0]
        for k, label in enumerate(CLASSES):
            expected = post_process(torch.sigmoid(z[k]).numpy(), 0.5, min_size)
            rows = kept.objects[(kept.objects["image"] == name) & (kept.objects["label"] == label)]
            assert np.array_equal(sum((rle_decode(o, SIZE) for o in rows["rle"]), np.zeros(SIZE, np.uint8)), expected)
            assert (rows["area"] > min_size).all()
            total += expected.sum()
    assert total > 0 and not (min_size == 40 and total == 0)


def test_evidence_promises_what_prediction_gives(plates, found, tmp_path):
    """The points chosen from Evidence, with both sizes: the score they promise is that of the masks written to the CSV."""
    points = choose_classes(found, total_areas=(0, 100, 400), min_areas=(0, 30, 200), draws=100)
    to_severstal_csv(predict_classes(FourMaps(), plates, points, (32, 80)), tmp_path/"submission.csv", CLASSES)
    rows = pd.read_csv(tmp_path/"submission.csv", dtype=str, keep_default_na=False)
    assert rows["ImageId_ClassId"].tolist() == [f"{name}_{k}" for name in plates.images["image"] for k in range(1, 5)]
    by_hand = []
    for key, code in rows.to_numpy().tolist():
        image, label = key[:-2], f"defect_{key[-1]}"
        true = sum((rle_decode(o.rle, SIZE) for o in plates.objects.itertuples() if (o.image, o.label) == (image, label)), np.zeros(SIZE, np.uint8))
        overlap, pred_area, true_area = (int(o[0]) for o in mask_counts(rle_decode(code, SIZE)[None], true[None]))
        by_hand.append(2 * overlap / (pred_area + true_area) if pred_area + true_area else 1.0)
    assert class_mean(found, points) == pytest.approx(np.mean(by_hand), abs=1e-12)
    again = read_severstal(plates.root, labels=tmp_path/"submission.csv", images=plates.root)
    assert len(again) == len(plates) and set(again.objects["rle"]) == set(rows["EncodedPixels"]) - {""}


class Brightness(torch.nn.Module):
    """Class 1 is what is bright, 2 what is dark, 3 never, 4 everything."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            for k, (weight, bias) in enumerate(((3, 0), (-3, 0), (0, -5), (0, 5))): self.mix.weight[k], self.mix.bias[k] = weight, bias

    def forward(self, x): return self.mix(x)


def test_the_rows_handed_in_by_hand(tmp_path):
    """16 rows x 20 columns, one bright pixel in row 3, column 2: counted down the columns from 1 it is number 2 x 16 + 3 + 1."""
    img = np.zeros((16, 20, 3), np.uint8)
    cv2.imwrite(str(tmp_path/"a.png"), img)
    img[3, 2] = 255
    cv2.imwrite(str(tmp_path/"b.png"), img)
    (tmp_path/"labels.csv").write_text("ImageId_ClassId,EncodedPixels\n" + "".join(f"{o}.png_{k},\n" for o in "ba" for k in range(1, 5)))
    strips = read_severstal(tmp_path, labels=tmp_path/"labels.csv", images=tmp_path)
    points = {name: OperatingPoint(0.0, 1, (16, 20)) for name in reversed(CLASSES)}                    # in no order
    to_severstal_csv(predict_classes(Brightness().eval(), strips, points, (16, 20), classes=CLASSES), tmp_path/"out.csv", CLASSES)
    rows = ["ImageId_ClassId,EncodedPixels", "a.png_1,", "a.png_2,1 320", "a.png_3,", "a.png_4,1 320", "b.png_1,36 1", "b.png_2,1 35 37 284", "b.png_3,", "b.png_4,1 320"]
    assert (tmp_path/"out.csv").read_text().splitlines() == rows
    with pytest.raises(ValueError, match="the channels are defect_1"): predict_classes(Brightness(), strips, points, (16, 20), classes=CLASSES[:3])


def test_what_cannot_be_predicted(plates):
    with pytest.raises(ValueError, match="'defect_2' needs a gate's score"):
        predict_classes(FourMaps(), plates, {name: OperatingPoint(0.0, gate=1.0 if name == "defect_2" else None) for name in CLASSES}, (32, 80))
    with pytest.raises(ValueError, match=r"counts pixels of \(256, 1600\)"):
        predict_classes(FourMaps(), plates, {name: OperatingPoint(0.0, 3501, (256, 1600)) for name in CLASSES}, (32, 80))


# --- the choice, by brute force

def planted(label, seed, images=7, shape=(16, 20)):
    """Maps of one class, multiples of 1/4, with a true blob in most and specks in all, and its Evidence; two images a group."""
    rng, maps = np.random.default_rng(seed), []
    for i in range(images):
        z, true = np.round(4 * cv2.GaussianBlur(rng.normal(0, 5, shape).astype(np.float32), (0, 0), 1)) / 4, np.zeros(shape, np.int32)
        if i % 4: cv2.ellipse(true, (int(rng.integers(4, 16)), int(rng.integers(4, 12))), (4, 3), 0, 0, 360, 1, -1)
        maps.append((np.clip(z + 2 * true, -3.75, 3.75).astype(np.float32), true))
    found = Evidence(shape, -1.0, "d", "m", label=label)
    for i, (z, true) in enumerate(maps): found.add(f"{i}", z, true, group=str(i // 2))
    return maps, found


def dice_of(z, true, logit, min_area, total_area):
    """Dice of one strip and class at one setting, from the definitions."""
    labels, _ = ndimage.label(z >= logit, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    kept = (labels > 0) & (areas[labels] >= min_area) & ((labels > 0).sum() >= total_area)
    return 2 * (kept & (true > 0)).sum() / (kept.sum() + (true > 0).sum()) if kept.any() or (true > 0).any() else 1.0


def test_the_point_of_each_class_is_the_best_of_all_thresholds_and_sizes():
    """Every threshold at which something changes x every smallest component x every smallest mask, one by one."""
    sizes, totals, both = (0, 4, 12), (0, 20, 45), {name: planted(name, seed) for seed, name in enumerate(("a", "b"))}
    points = choose_classes({name: found for name, (_, found) in both.items()}, total_areas=totals, min_areas=sizes, draws=500)
    edges = np.arange(-1, 4.25, .25)
    for name, (maps, found) in both.items():
        every = np.array([[[[dice_of(*o, e, s, t) for o in maps] for s in sizes] for e in edges] for t in totals])
        means, o = every.mean(-1), points[name]
        place = np.searchsorted(edges, np.minimum(EDGES[edge_index(-1.0):], 4))
        for k, t in enumerate(totals): assert np.allclose(surface(found, sizes, total_area=t).dice, means[k][place], atol=1e-12, rtol=0)
        mine = totals.index(o.total_area), np.searchsorted(edges, min(o.logit, 4)), sizes.index(o.min_area)
        best = np.unravel_index(means.argmax(), means.shape)
        groups = np.array([every[best][i:i + 2].sum() for i in range(0, len(maps), 2)])
        error = np.sqrt(((groups - means.max() * np.array([2, 2, 2, 1])) ** 2).sum()) / len(maps)      # of a mean over groups
        assert o.score == pytest.approx(means[mine], abs=1e-12) and means.max() - o.score <= error / 4     # twice a tenth, and the bootstrap's own noise
        assert (means[:mine[0]].max(initial=0) < means.max()), "no simpler rule is as good"
    assert class_mean({name: found for name, (_, found) in both.items()}, points) == pytest.approx(np.mean([o.score for o in points.values()]), abs=1e-12)


def test_what_is_scored_chose_nothing():
    """Spoil the images of a group: the points it is scored at stay, those of the others move."""
    names, options = ("a", "b"), dict(min_areas=(0, 4), draws=50)
    both = {name: planted(name, seed, images=8) for seed, name in enumerate(names)}
    whole, spoilt = {name: found for name, (_, found) in both.items()}, {}
    for name, (maps, found) in both.items():
        spoilt[name] = Evidence(found.grid, -1.0, "d", "m", label=name)
        for i, (z, true) in enumerate(maps): spoilt[name].add(f"{i}", -z if i < 2 else z, 1 - true if i < 2 else true, group=str(i // 2))
    apart = held_out_scores(spoilt, folds=4, seed=1, **options)
    others = choose_classes({name: o.subset(np.arange(8) >= 2) for name, o in whole.items()}, seed=1, **options)
    assert np.array_equal(apart[:2], image_class_scores({name: o.subset(np.arange(8) < 2) for name, o in spoilt.items()}, others))
    assert not np.array_equal(apart[2:], held_out_scores(whole, folds=4, seed=1, **options)[2:])


# --- what choosing flatters

def test_held_out_scores_by_hand():
    rng, steel = np.random.default_rng(0), {}
    for name in ("a", "b"):
        steel[name] = Evidence((20, 24), data="d", model="m", label=name)
        for i in range(10): steel[name].add(f"{i}", cv2.GaussianBlur(rng.normal(0, 6, (20, 24)).astype(np.float32), (0, 0), 1), (cv2.GaussianBlur(rng.random((20, 24)), (0, 0), 2) > .55).astype(np.int32), group=str(i // 2))
    options = dict(min_areas=(0, 4), total_areas=(0, 30), draws=50)
    apart = held_out_scores(steel, folds=5, seed=3, **options)
    names = np.unique(steel["a"].groups.astype(str))
    part = dict(zip(names, np.random.default_rng(3).permutation(np.arange(5) % 5)))
    for fold in range(5):
        mine = np.array([part[o] == fold for o in steel["a"].groups])
        assert mine.sum() == 2, "the two images of a group are left out together"
        points = choose_classes({k: o.subset(~mine) for k, o in steel.items()}, seed=3, **options)
        for c, (name, o) in enumerate(steel.items()): assert apart[mine, c].tolist() == point_scores(o.subset(mine), points[name]).dice.tolist()
    together = image_class_scores(steel, choose_classes(steel, seed=3, **options))
    assert together.shape == apart.shape == (10, 2) and together.mean() >= apart.mean() - .02
    with pytest.raises(ValueError, match="6 folds of 5 groups"): held_out_scores(steel, folds=6)
    with pytest.raises(ValueError, match="1 folds"): held_out_scores(steel, folds=1)


# --- the study

NOTEBOOK = ROOT/"nbs"/"studies"/"severstal.ipynb"


def test_the_documents_numbers_are_in_its_parameter_file():
    values = {name: o.default for name, o in read_parameters(NOTEBOOK).items()} | read_overrides(ROOT/"nbs"/"params"/"severstal-source.yaml", "severstal")
    document = dict(seed=69, valid=0.2, size=[256, 1600], crop=0, encoder="resnet18", encoder_weights="imagenet", epochs=20, batch_size=4, effective_batch=32, lr=5e-4, patience=3, precision="32-true", evaluate_every=1)
    assert {name: values[name] for name in document} == document and 3501 in values["min_areas"] and values["data"]


def study_cell(name):
    """The definition of a class or function of the study, as source."""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        for node in ast.parse("".join(cell["source"])).body if cell["cell_type"] == "code" else ():
            if getattr(node, "name", "") == name: return ast.unparse(node)
    raise AssertionError(f"the study has no {name}")


def test_the_meter_after_each_epoch_is_the_documents():
    """On probabilities, in two batches, against its definition written out."""
    from shipnb import metrics, tasks
    names = dict(ChannelMetric=tasks.ChannelMetric, Meter=metrics.Meter, to_target=to_target, torch=torch, classes=CLASSES)
    exec(study_cell("SteelMetric"), names)
    metric, rng = names["SteelMetric"](), np.random.default_rng(1)
    z, masks = rng.normal(-1, 2, (6, 4, 8, 12)), (1 << rng.integers(0, 4, (6, 8, 12))).astype(np.uint8) * (rng.random((6, 8, 12)) < .2).astype(np.uint8)
    masks[4:], z[5] = 0, -9
    y, p = np.stack([masks >> k & 1 for k in range(4)], 1), z > 0
    other = names["SteelMetric"]()
    for o, rows in ((metric, slice(0, 2)), (other, slice(2, 6))): o.update(torch.sigmoid(torch.from_numpy(z[rows])), dict(mask=torch.from_numpy(masks[rows])))
    metric.merge(other)
    both, sums = (p & (y > 0)).reshape(6, -1).sum(1), p.reshape(6, -1).sum(1) + y.reshape(6, -1).sum(1)
    dices = np.where(y.reshape(6, -1).any(1), 2 * both / np.maximum(sums, 1), p.reshape(6, -1).sum(1) == 0)
    ious = both[:4] / (sums[:4] - both[:4])
    got = metric.compute()
    assert [got[o] for o in ("meter_dice", "meter_dice_pos", "meter_dice_neg", "meter_iou")] == pytest.approx([dices.mean(), dices[:4].mean(), .5, np.mean([ious[:2].mean(), ious[2:].mean()])])
    pairs = [[2 * (p[i, c] & (y[i, c] > 0)).sum() / s if (s := p[i, c].sum() + y[i, c].sum()) else 1 for c in range(4)] for i in range(6)]
    assert got["dice"] == pytest.approx(np.mean(pairs)) and got["dice_2"] == pytest.approx(np.mean([o[1] for o in pairs]))


def test_the_studys_intervals_draw_strips_of_a_group_and_seeds_together():
    """Against a bootstrap written out: groups and trainings drawn anew, the same for both sides of a difference."""
    from shipnb import thresholds, uncertainty
    names = dict(crossed_draws=uncertainty.crossed_draws, interval=thresholds.interval, np=np, draws=4000, seed=0)
    exec(study_cell("estimate"), names)
    rng, groups = np.random.default_rng(1), np.repeat([f"g{k}" for k in range(10)], 2)
    ours = rng.random((3, 20)) * .3 + np.repeat(rng.random(10), 2) * .5 + np.array([[0], [.05], [.1]])
    other = ours - .1 + rng.normal(0, .05, (3, 20))
    picked, runs = rng.integers(0, 10, (8000, 1, 10)), rng.integers(0, 3, (8000, 3, 1))
    draws, theirs = (o.reshape(3, 10, 2).mean(2)[runs, picked].mean((1, 2)) for o in (ours, other))
    gaps = draws - theirs
    for found, drawn, value in ((names["estimate"](ours, groups), draws, ours.mean()), (names["estimate"](ours, groups, other), gaps, (ours - other).mean())):
        assert found[0] == pytest.approx(value) and found[1:] == pytest.approx(np.quantile(drawn, [.025, .975]), abs=.1 * np.ptp(np.quantile(drawn, [.025, .975])))


def plant(path, number, rng):
    """A real strip with a mark of class 1 to 4 painted on: a small or a large spot, dark or bright; every fourth strip is left as it is. The image and rows of the label table."""
    img, kind = cv2.imread(str(path)), number % 4 + 1
    if number // 4 % 4 == 3: return img, []
    radius = (int(rng.integers(10, 16)), int(rng.integers(32, 50)))[kind > 2]
    mask = cv2.ellipse(np.zeros(img.shape[:2], np.uint8), (int(rng.integers(60, 1540)), int(rng.integers(55, 200))), (radius, radius), 0, 0, 360, 1, -1)
    img[mask > 0] = img[mask > 0] // 3 if kind % 2 else 255 - (255 - img[mask > 0]) // 3
    return img, [(path.name, kind, rle_encode(mask))]


def planted_set(source, root, count, tests):
    """`count` real strips with planted marks in the challenge's layout, and `tests` of the unlabelled ones to hand in."""
    strips, rng, rows = sorted(source.glob("*defect*/*.jpg")), np.random.default_rng(0), []
    for folder in ("train_images", "test_images"): (root/folder).mkdir(parents=True)
    for number, path in enumerate(strips[::len(strips) // count][:count]):
        img, found = plant(path, number, rng)
        cv2.imwrite(str(root/"train_images"/path.name), img)
        rows += found
    for path in sorted((source/"test_images").glob("*.jpg"))[:tests]: shutil.copy(path, root/"test_images")
    pd.DataFrame(rows, columns=["ImageId", "ClassId", "EncodedPixels"]).to_csv(root/"train.csv", index=False)
    return root


def test_the_whole_study_on_real_strips_with_planted_labels(real_data, tmp_path, monkeypatch):
    """With a strip to hand in that cannot be read, and one that is asked for and missing: their rows are there, and empty."""
    monkeypatch.chdir(tmp_path)
    root = planted_set(real_data/"severstal", tmp_path/"steel", 16, 4)
    tests = sorted(o.name for o in (root/"test_images").iterdir())
    (root/"test_images"/tests[1]).write_bytes((root/"test_images"/tests[1]).read_bytes()[:3000])
    asked = [f"{name}_{k}" for name in ["missing.jpg", *reversed(tests)] for k in range(1, 5)]
    pd.DataFrame(dict(ImageId_ClassId=asked, EncodedPixels="1 1")).to_csv(root/"sample_submission.csv", index=False)
    given = dict(data=str(root), size=[32, 192], crop=32, epochs=1, effective_batch=4, folds=2, draws=50, min_areas=[0, 3501], total_areas=[0], floor=-5.0)
    run_notebook(NOTEBOOK, given, tmp_path/"run")
    results = json.loads((tmp_path/"run"/"results.json").read_text())
    rows = pd.read_csv(tmp_path/"run"/"submission.csv", dtype=str, keep_default_na=False)
    assert rows["ImageId_ClassId"].tolist() == asked and not rows["EncodedPixels"][rows["ImageId_ClassId"].str.startswith(("missing", tests[1]))].any()
    for code in rows["EncodedPixels"]: assert rle_encode(rle_decode(code, (256, 1600))) == code
    assert results["real"] and results["test"] == {} and results["submission_rows"] == 20 and results["n"]["train"] + results["n"]["valid"] == len(list((root/"train_images").iterdir()))
    assert set(results["bad_test_images"]) == {"missing.jpg", tests[1]} and not results["bad_images"]
    card = json.loads((tmp_path/"run"/"seed0"/"model"/"card.json").read_text())
    assert set(card["operating_points"]) == set(CLASSES) and card["classes"] == 4


def test_the_published_run_is_that_of_its_parameter_file():
    """What the results say of the run, against the file; and the numbers in the study's text, against the results."""
    found, values = json.loads((ROOT/"figures"/"severstal_fleet.json").read_text(encoding="utf-8")), read_overrides(ROOT/"nbs"/"params"/"severstal-fleet.yaml", "severstal")
    assert all(found[o] == values[o] for o in ("seeds", "size", "crop", "effective_batch")) and found["n"]["train"] + found["n"]["valid"] == values["strips"] and found["n"]["test"] == values["test_strips"]
    assert {o["epoch"] for o in found["epochs"]} == set(range(values["epochs"])) and [o["epoch"] % values["evaluate_every"] for o in found["epochs"] if o["valid_loss"] is not None] == [values["evaluate_every"] - 1] * 16
    for points in found["points"]: assert all(o["min_area"] in values["min_areas"] and o["total_area"] in values["total_areas"] and o["logit"] >= values["floor"] for o in points.values())
    text = "".join(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"][1]["source"])
    show = lambda o: "{:.3f} [{:.3f}, {:.3f}]".format(*o)
    apparent = found["valid"]["a point for each class"][0] - found["valid"]["the document's: 0.5, more than 3,500 px"][0]
    for said in (f"{show(found['flattered'])} of {apparent:.3f} Dice", f"the gain is {show(found['test_gain'])}", f"{found['n']['test']} strips that chose nothing", f"the same {found['n']['valid']} strips"): assert said in text
    reached = {k: [o[f"defect_{k}"]["dice_with"] for o in found["by_class"]] for k in range(1, 5)}
    assert [round(o, 2) for o in reached[4]] == [.54, .35] and {round(o, 2) for o in reached[3]} == {.26} and max(reached[1] + reached[2]) < .015
    assert round(found["nothing"], 2) == round(found["nothing_test"], 2) == .69 and round(found["training_minutes"]) == 27 and round(found["minutes"] - found["training_minutes"]) == 15


def test_published_run():
    found = json.loads((ROOT/"figures"/"severstal_fleet.json").read_text(encoding="utf-8"))
    for name in ("severstal_fleet.png", "severstal_fleet_points.png"): assert (ROOT/"figures"/name).stat().st_size > 10_000
    assert found["seeds"] == len(found["points"]) >= 2 and not found["real"] and found["draws"] == 2000 and found["submission_rows"] == 4 * found["n"]["test"]
    for value, low, high in [*found["valid"].values(), *found["test"].values(), found["flattered"], found["gain_left_out"], found["test_gain"]]: assert low <= value <= high
    chosen, document, apart = (found["valid"][o][0] for o in ("a point for each class", "the document's: 0.5, more than 3,500 px", "a point for each class, left out"))
    assert found["flattered"][0] == pytest.approx(chosen - apart) and found["flattered"][1] > 0, "choosing flatters, and the interval says so"
    assert found["flattered"][0] > (chosen - document) / 2, "most of the apparent gain is luck of the choice"
    assert found["test_gain"][1] < 0 < found["test_gain"][2], "on new strips the gain is undecided"
