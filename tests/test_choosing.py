"""Size rules, gates and classes against brute force, and prediction with them against what Evidence promised."""
import json

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from shipnb.catalog import IMAGE_COLUMNS, OBJECT_COLUMNS, Catalog
from shipnb.choosing import (GateSurface, change_gates, check_classes, choose_among, choose_classes, choose_gated, class_mean, gate_surface, load_classes, save_classes,
                             size_surfaces)
from shipnb.inference import Predictor
from shipnb.masks import label_instances
from shipnb.metrics import dice, object_f2, segmentation_scores
from shipnb.models import save_model
from shipnb.thresholds import SCORES, Evidence, OperatingPoint, choose, collect_evidence, image_logits, load_point, point_scores, save_point, surface

SIZE = (32, 40)


def scene(i):
    """A map with up to two ships and bright specks, float32, and its truth."""
    rng, truth = np.random.default_rng(i), np.zeros(SIZE, np.int32)
    for k in range(i % 3): truth[4 + 12 * k:8 + 12 * k, 5:5 + rng.integers(4, 20)] = k + 1
    glow = cv2.GaussianBlur((truth > 0).astype(np.float32), (0, 0), 1)
    logits = 9 * glow - 5 + cv2.GaussianBlur(rng.normal(0, 1, SIZE).astype(np.float32), (0, 0), 1.5) * 8
    return logits.astype(np.float32), truth


MAPS = [scene(i) for i in range(9)]
GATES = np.array([-3.2, .5, 1.25, -.015625, 2., 70., 0., -40., 1.3])


def evidence(label=""):
    out = Evidence(SIZE, data="d", model="m", label=label)
    for i, pair in enumerate(MAPS): out.add(f"{i}.png", *pair, group=str(i // 2))
    return out


GATED = evidence().with_gates(GATES, "g")


def by_hand(i, logit, min_area, total_area=0, gate=None, slope=0.0):
    """The mask of one image by the definitions, with OpenCV and NumPy alone."""
    logits, score = MAPS[i][0], GATES[i]
    if gate is not None and score < gate: return np.zeros(SIZE, np.int32)
    edge = min(max(logit - np.rint(slope * score * 64) / 64, -8.0), 16.0)
    mask = logits >= np.float32(edge)
    if mask.sum() < total_area: return np.zeros(SIZE, np.int32)
    labels, n = label_instances(mask)
    for k in range(1, n + 1):
        if (labels == k).sum() < min_area: labels[labels == k] = 0
    return labels


RULES = [dict(), dict(total_area=60), dict(gate=0.5), dict(gate=0.0, total_area=45), dict(gate_slope=0.5), dict(gate_slope=-1.3), dict(gate=-0.03125, gate_slope=0.77, total_area=30)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_surface_scores_and_points_equal_brute_force(rule):
    whole = surface(GATED, (0, 5, 20), **rule)
    for logit in (-8, -6.5, -3, -1.015625, 0, 2.5, 9, 16):
        for size in (0, 5, 20):
            masks = [by_hand(i, logit, size, rule.get("total_area", 0), rule.get("gate"), rule.get("gate_slope", 0)) for i in range(9)]
            expected = segmentation_scores(masks, [t for _, t in MAPS])
            assert whole.at(logit, size) == pytest.approx({key: expected[key] for key in SCORES}, abs=1e-12)
            point = OperatingPoint(float(logit), size, SIZE, floor=-8.0, **rule)
            table = point_scores(GATED, point)
            assert table.dice.tolist() == [dice(p > 0, t > 0) for p, (_, t) in zip(masks, MAPS)] and table.f2.tolist() == [object_f2(p, t) for p, (_, t) in zip(masks, MAPS)]
            for i, mask in enumerate(masks): assert np.array_equal(point.keep(MAPS[i][0], GATES[i]) > 0, mask > 0)


@pytest.mark.parametrize("slope, total_area", [(0.0, 0), (0.5, 0), (0.25, 40)])
def test_the_surface_of_every_gate_is_each_gates_surface_bit_for_bit(slope, total_area):
    found = gate_surface(GATED, "every", (0, 5, 20), total_area, slope)
    assert found.gates.tolist() == sorted({*np.clip(np.floor(GATES * 64) / 64, -16, 16)}) == change_gates(GATED).tolist()
    for gate, one, skipped in zip(found.gates, found.surfaces, found.skipped):
        alone = surface(GATED, (0, 5, 20), gate=gate, gate_slope=slope, total_area=total_area)
        assert one.rule == alone.rule and all(np.array_equal(one.sums[key], alone.sums[key]) for key in alone.sums)
        assert skipped == (GATES < gate).mean()
    assert (np.diff(found.skipped) >= 0).all() and found.score("dice").shape == (len(found.gates), len(found.surfaces[0].logits), 3)
    some = gate_surface(GATED, [0.0, 1.25], "every")
    assert np.array_equal(some.surfaces[1].dice, surface(GATED, "every", gate=1.25).dice) and isinstance(some, GateSurface)


def test_a_gate_is_chosen_when_it_helps_and_not_otherwise():
    """Scores that know the ships but for noise; the same scores dealt out at random; no scores."""
    has, rng = np.array([i % 3 > 0 for i in range(9)]), np.random.default_rng(0)
    knowing = evidence().with_gates(np.where(has, 3., -3.) + rng.normal(0, .3, 9))
    point = choose_gated(knowing, min_areas=(0, 5), slopes=(0.0, 1.0), draws=200)
    assert point.needs_gate and point.score > choose(surface(knowing, (0, 5)), draws=200).score
    constant = evidence().with_gates(np.zeros(9))
    assert not choose_gated(constant, min_areas=(0, 5), slopes=(0.5,), draws=200).needs_gate
    with pytest.raises(ValueError, match="has no gate score"): choose_gated(evidence())


def test_choose_among_takes_the_first_that_is_as_good():
    surfaces = size_surfaces(GATED, (0, 1, 40, 10**6), (0, 5))
    points = [choose(o, "dice", draws=300) for o in surfaces]
    taken, best = choose_among(surfaces, "dice", draws=300), max(o.score for o in points)
    first = next(o for o in points if o.score >= taken.score - 1e-12)
    assert taken == first and best - taken.score < .02
    assert choose_among(surfaces[::-1] + surfaces[:1], "dice_without", draws=100).score == 1
    price = choose_among(surfaces, "cost", draws=100, prices=(1, 2))
    assert price.score <= min(choose(o, "cost", draws=100, prices=(1, 2)).score for o in surfaces) + .1
    loud = size_surfaces(GATED, (0, 10**6), (0,))
    assert choose_among(loud, "dice", draws=100, max_false_alarm=0.0).false_alarm == 0


def test_points_survive_a_card_and_old_cards_load(tmp_path):
    model = torch.nn.Conv2d(3, 1, 1)
    save_model(tmp_path/"m", model, dict(architecture="unet", encoder="none", classes=1, in_channels=3, size=list(SIZE), window=list(SIZE)))
    point = choose(surface(GATED, (0, 5), gate=0.5, total_area=12), "dice", draws=100)
    assert (point.gate, point.total_area, point.gate_model, point.skipped) == (0.5, 12, "g", (GATES < .5).mean())
    save_point(tmp_path/"m", point)
    assert load_point(tmp_path/"m") == point
    soft = choose(surface(GATED, (0, 5), gate_slope=.5), "dice", draws=100)
    assert soft.floor == -8 and OperatingPoint.from_dict(json.loads(json.dumps(soft.to_dict()))) == soft
    old = dict(logit=-1.5, min_area=3, grid=[32, 40], objective="dice", score=.5, interval=[.4, .6], baseline=.3, false_alarm=.1, max_false_alarm=None, plateau=[-2., -1.],
               n=9, n_with=6, unit="group", draws=2000, seed=0, data="d", model="m", threshold=1 / (1 + np.exp(1.5)))
    card = json.loads((tmp_path/"m"/"card.json").read_text()) | dict(operating_point=old)
    (tmp_path/"m"/"card.json").write_text(json.dumps(card))
    assert load_point(tmp_path/"m") == OperatingPoint(-1.5, 3, SIZE, "dice", .5, (.4, .6), .3, .1, None, (-2., -1.), 9, 6, "group", 2000, 0, "d", "m")


def test_classes(tmp_path):
    steel = {name: evidence(name) for name in ("a", "b c")}
    points = choose_classes(steel, min_areas={"a": (0,), "b c": (0, 5)}, total_areas={"a": (0,), "b c": (0, 40)}, draws=100)
    assert points["a"].min_area == 0 and points["a"].label == "a" and choose(surface(steel["b c"], (0, 5)), draws=100).score <= points["b c"].score + .02
    masks = {name: [by_hand(i, o.logit, o.min_area, o.total_area) for i in range(9)] for name, o in points.items()}
    assert class_mean(steel, points) == pytest.approx(np.mean([[dice(p > 0, t > 0) for p, (_, t) in zip(group, MAPS)] for group in masks.values()]))
    save_classes(tmp_path/"e", steel)
    again = load_classes(tmp_path/"e")
    assert list(again) == ["a", "b c"] and class_mean(again, points) == class_mean(steel, points)
    (tmp_path/"e"/"a.npz").rename(tmp_path/"e"/"z.npz")
    with pytest.raises(ValueError, match="'z' is labelled 'a'"): load_classes(tmp_path/"e")
    with pytest.raises(ValueError, match="same images in the same order"): check_classes(steel | {"b c": steel["b c"].subset(np.arange(8, -1, -1))})
    with pytest.raises(ValueError, match="cannot be a file name"): save_classes(tmp_path, {"../a": evidence("../a")})


# prediction and analysis agree

class Red(torch.nn.Module):
    """The red channel as a logit; counts the images it saw."""
    def __init__(self):
        super().__init__()
        self.scale, self.seen = torch.nn.Parameter(torch.tensor(4.)), 0

    def forward(self, x):
        self.seen += len(x)
        return self.scale * x[:, :1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Eight images of noise with a bright part, a model, the Evidence of both with gate scores, and the gate."""
    root, rows = tmp_path_factory.mktemp("gated"), []
    for i in range(8):
        rng = np.random.default_rng(i)
        img = cv2.GaussianBlur(rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8), (0, 0), 1.2)
        if i % 2: img[6:14, 5:25] = np.clip(img[6:14, 5:25].astype(int) + 70, 0, 255)
        cv2.imwrite(str(root/f"{i}.png"), img)
        rows.append((f"{i}.png", *SIZE, 0, 1, "", ""))
    catalog = Catalog(pd.DataFrame(rows, columns=IMAGE_COLUMNS), pd.DataFrame([], columns=OBJECT_COLUMNS), root)
    gate = lambda img: float(img.std()) / 8 - 3.0
    model = Red()
    scores = [gate(catalog.read_image(i)) for i in range(8)]
    return model, catalog, collect_evidence(model, catalog, (16, 20)).with_gates(scores, "std"), gate


@pytest.mark.parametrize("rule", [dict(total_area=560), dict(gate="median"), dict(gate_slope=0.8), dict(gate="median", gate_slope=-0.6, total_area=300)], ids=str)
def test_prediction_applies_exactly_what_was_chosen(pair, tmp_path, rule):
    model, catalog, found, gate = pair
    if rule.get("gate"): rule = rule | dict(gate=float(np.floor(np.median(found.gates) * 64) / 64))
    point = OperatingPoint(0.5, 6, SIZE, floor=-8.0, **rule)
    predictor = Predictor([model], SIZE, (16, 20), point.logit, point.min_area, batch_size=3, rules=point, gate=gate)
    promised, plain = point_scores(found, point), point_scores(found, OperatingPoint(0.5, 6))
    images = [catalog.read_image(i) for i in range(8)]
    model.seen = 0
    many = list(predictor.predict_many(images))
    skipped = sum(o < rule["gate"] for o in found.gates) if "gate" in rule else 0
    assert model.seen == 8 - skipped, "a skipped image must cost the segmenter nothing"
    assert [len(o) for o in many] == promised.n_pred.tolist() and [int(o.mask.sum()) for o in many] == promised.pred_area.tolist()
    assert promised.pred_area.tolist() != plain.pred_area.tolist() and 0 < promised.pred_area.astype(bool).sum() <= 8
    for img, one, score in zip(images, many, found.gates):
        z = image_logits(model.eval(), [img], (16, 20))[0]
        assert np.array_equal(one.labels, point.keep(z, score)) and np.array_equal(predictor.predict(img).labels, one.labels)
        full = predictor.predict(img, logits=True)
        assert np.array_equal(full.labels, one.labels) and np.array_equal(full.logits, z)


def test_the_predictor_refuses_what_it_cannot_apply(pair, tmp_path):
    from shipnb.models import build_unet
    network = build_unet("resnet18")
    card = dict(architecture="unet", encoder="resnet18", classes=1, in_channels=3, size=[32, 32], window=[32, 32])
    gated = OperatingPoint(0.0, 2, (32, 32), gate=0.5)
    for name, point in dict(a=gated, b=OperatingPoint(0.0, 2, (32, 32)), c=OperatingPoint(0.0, 2, (32, 32), total_area=9)).items():
        save_model(tmp_path/name, network, card)
        save_point(tmp_path/name, point)
    with pytest.raises(ValueError, match="give gate, a function"): Predictor.load(tmp_path/"a")
    with pytest.raises(ValueError, match="different rules cannot be averaged"): Predictor.load([tmp_path/"a", tmp_path/"b"], gate=lambda img: 0.0)
    assert Predictor.load(tmp_path/"a", threshold=.5, min_area=0).rules is None and Predictor.load(tmp_path/"b").rules is None
    one = Predictor.load(tmp_path/"a", gate=lambda img: -1.0)
    assert len(one.predict(np.zeros((32, 32, 3), np.uint8))) == 0 and one.rules.gate == .5
    with pytest.raises(ValueError, match="finite logit, not nan"): Predictor.load(tmp_path/"a", gate=lambda img: float("nan")).predict(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="the image is 33 x 32.*cut the image"): Predictor.load(tmp_path/"c").predict(np.zeros((33, 32, 3), np.uint8))
    assert Predictor.load(tmp_path/"c", min_area=4).rules == OperatingPoint(0.0, 4, (32, 32), total_area=9)
    save_point(tmp_path/"a", {"x": gated, "y": gated})
    with pytest.raises(ValueError, match="an operating point for each of x, y"): Predictor.load(tmp_path/"a")
    assert set(load_point(tmp_path/"a")) == {"x", "y"}


def test_what_knows_threshold_and_area_only_refuses_a_point_with_more():
    from shipnb.explorer import threshold_explorer
    from shipnb.strata import component_table
    from shipnb.uncertainty import object_ious
    rng = np.random.default_rng(0)
    evidence = Evidence((20, 24))
    evidence.add("a.jpg", rng.normal(0, 4, (20, 24)).astype(np.float32), (rng.random((20, 24)) > 0.9).astype(np.int32))
    for rules in (dict(total_area=9), dict(gate=0.0), dict(gate_slope=0.5, floor=evidence.floor)):
        point = OperatingPoint(0.0, 4, (20, 24), **rules)
        for ask in (lambda p: object_ious(evidence, p), lambda p: component_table(evidence, p, None), lambda p: threshold_explorer(evidence, None, point=p)):
            with pytest.raises(ValueError, match="applies a threshold and a minimum area only"): ask(point)
    assert len(object_ious(evidence, OperatingPoint(0.0, 4, (20, 24)))) == 1


def test_intervals_of_scores_take_a_point_with_all_its_rules():
    from shipnb.uncertainty import score_table
    rng = np.random.default_rng(1)
    evidence = Evidence((20, 24))
    for k in range(6): evidence.add(f"{k}.jpg", rng.normal(-1, 4, (20, 24)).astype(np.float32), (rng.random((20, 24)) > 0.9).astype(np.int32))
    plain, strict = (OperatingPoint(0.0, 0, (20, 24), total_area=o) for o in (0, 20 * 24))
    assert score_table(evidence, strict, draws=100).score["dice_with"] == 0 < score_table(evidence, plain, draws=100).score["dice_with"]
    assert score_table(evidence, plain, draws=100).score["dice"] == pytest.approx(point_scores(evidence, plain).dice.mean(), abs=1e-9)
