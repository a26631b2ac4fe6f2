"""The threshold explorer without a browser: states, numbers and pictures against thresholding, labelling and matching; parts that do not belong together."""
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from shipnb import explorer
from shipnb.catalog import Catalog
from shipnb.explorer import Levels, Tally, Walk, collect_levels, match_labels, read_levels, threshold_explorer, view_of, write_levels
from shipnb.masks import encode_instances
from shipnb.metrics import dice, iou, object_counts, object_f2
from shipnb.thresholds import EDGES, Evidence, OperatingPoint, choose, edge_index, image_logits, image_scores, keep, surface, true_labels

ROOT = Path(__file__).parents[1]
SHAPE, SIZES = (60, 84), (0, 3, 10, 40)
SETTINGS = [(-8.0, 0), (-5.25, 3), (-2.0, 0), (-1.984375, 10), (0.0, 3), (1.5, 40), (6.0, 0), (16.0, 0)]


def truth_of(i):
    """Label images with no, one, touching and tiny objects."""
    true = np.zeros(SHAPE, np.int32)
    if i == 0: return true
    true[5:12, 8:30], true[12:17, 8:20], true[40, 50:53] = 1, 2, 3
    if i == 2: true[30:50, 60:80] = 4
    if i == 3: true[:] = np.where(true == 2, 1, 0)
    return true


def map_of(i):
    rng = np.random.default_rng(i)
    z = 16 * cv2.GaussianBlur((truth_of(i) > 0).astype(np.float32), (0, 0), 1.2) - 9 + cv2.GaussianBlur(rng.normal(0, 1, SHAPE).astype(np.float32), (0, 0), 2) * 16
    if i == 4: z[:] = -12      # nothing above the floor
    return z.astype(np.float32)


def make_set(folder, grid=None, floor=-8.0, n=6):
    """A Catalog of images with their truth, its Evidence and Levels; one image cannot be read."""
    folder.mkdir()
    rng, images, objects, names = np.random.default_rng(0), [], [], [f"im{i}.png" for i in range(n)]
    for i, name in enumerate(names):
        cv2.imwrite(str(folder/name), rng.integers(0, 80, (*SHAPE, 3), np.uint8))
        codes = encode_instances(truth_of(i))
        images.append((name, *SHAPE, len(codes), 1, f"scene{i // 2}", ""))
        objects += [(name, "ship", code, 0, 0, 1, 1, 1) for code in codes]
    (folder/names[5]).write_bytes(b"no image")
    catalog = Catalog(pd.DataFrame(images, columns=["image", "height", "width", "count", "bytes", "group", "split"]),
                      pd.DataFrame(objects, columns=["image", "label", "rle", "x0", "y0", "x1", "y1", "area"]), folder)
    evidence, levels = Evidence(grid or SHAPE, floor, "data", "model"), Levels(floor, "data", "model")
    for i, name in enumerate(names):
        true = true_labels(catalog.rles(i), SHAPE, grid or SHAPE)
        z = map_of(i) if grid is None else cv2.resize(map_of(i), grid[::-1], interpolation=cv2.INTER_AREA)
        evidence.add(name, z, true)
        levels.add(name, z)
    return evidence, catalog, levels


@pytest.fixture(scope="module")
def parts(tmp_path_factory): return make_set(tmp_path_factory.mktemp("set")/"images")


@pytest.fixture
def tool(parts): return threshold_explorer(*parts, min_areas=SIZES, static=False)


def by_hand(i, logit, min_area):
    """(kept labels, missed numbers, false numbers) of image i, pair by pair."""
    kept, true = keep(map_of(i), logit, min_area), truth_of(i)
    hit = {(k, t) for k in range(1, kept.max() + 1) for t in range(1, true.max() + 1)
           if ((kept == k) & (true == t)).sum() / max(((kept == k) | (true == t)).sum(), 1) > .5}
    return kept, [t for t in range(1, true.max() + 1) if t not in {o[1] for o in hit}], [k for k in range(1, kept.max() + 1) if k not in {o[0] for o in hit}]


# --- levels

@pytest.mark.parametrize("floor", [-16.0, -8.0, -2.5, 3.0])
def test_levels_keep_what_logits_keep_at_every_edge_from_the_floor_up(floor):
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(0, 9, (20, 30)), rng.choice(EDGES, (6, 30)), np.full((1, 30), 1e30), np.full((1, 30), -1e30),
                        np.nextafter(rng.choice(EDGES, (2, 30)).astype(np.float32), np.float32(-99))]).astype(np.float32)
    levels = Levels(floor)
    levels.add("a", z)
    assert levels["a"].dtype == np.float32
    for edge in EDGES[edge_index(floor):]: assert np.array_equal(levels["a"] >= np.float32(edge), z >= np.float32(edge)), edge
    for edge in (floor, 4.0, 16.0): assert np.array_equal(keep(levels["a"], edge, 3), keep(z, edge, 3))


def test_levels_come_back_from_their_file(parts, tmp_path):
    write_levels(tmp_path/"levels.npz", parts[2])
    back = read_levels(tmp_path/"levels.npz")
    assert (back.maps, back.floor, back.data, back.model) == (parts[2].maps, -8.0, "data", "model") and "6 images" in repr(back)
    write_levels(tmp_path/"none.npz", Levels())
    assert len(read_levels(tmp_path/"none.npz")) == 0


def test_a_file_that_is_no_levels_file_is_refused(parts, tmp_path):
    path = tmp_path/"levels.npz"
    write_levels(path, parts[2])
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, len(whole), 60):      # one byte changed: refused, or, where a zip header has slack, nothing lost
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
        try: assert read_levels(path).maps == parts[2].maps
        except ValueError as error:
            refused += 1
            assert "not a whole levels file" in str(error)
    assert refused > 40
    for text in (whole[:-20], whole[:len(whole) // 2], b"", b"no zip"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="not a whole levels file"): read_levels(path)
    parts[0].save(path)
    with pytest.raises(ValueError, match="not a whole levels file"): read_levels(path)
    with pytest.raises(FileNotFoundError, match="no levels file"): read_levels(tmp_path/"x.npz")


def test_one_pass_makes_both(parts):
    catalog = parts[1].subset(np.arange(5))
    model = torch.nn.Conv2d(3, 1, 1)
    evidence, levels = collect_levels(model.train(), catalog, (32, 32), (30, 42), batch_size=2, floor=-2, model_hash="m")
    assert model.training and (levels.floor, levels.data, levels.model) == (-2, catalog.fingerprint(), "m") == (evidence.floor, evidence.data, evidence.model)
    assert evidence.groups.tolist() == [f"group scene{i // 2}" for i in range(5)]
    for i, record in enumerate(evidence.records):
        explorer.open_case(evidence, catalog, levels, i, i)      # the histograms agree
        z = image_logits(model.eval(), [catalog.read_image(o) for o in range(i - i % 2, min(i - i % 2 + 2, 5))], (32, 32), (30, 42))[i % 2]
        assert np.array_equal(levels[record.image], np.where(z >= -2, np.floor(z * 64) / 64, -np.inf).astype(np.float32))


# --- numbers

@pytest.mark.parametrize("setting", SETTINGS)
def test_every_number_is_that_of_thresholding_labelling_and_matching(setting, parts):
    evidence, catalog, levels = parts
    walk = Walk(*parts, SIZES)
    walk.set(*setting)
    table, whole, scores = image_scores(evidence, *setting), surface(evidence, SIZES).at(*setting), []
    for i in range(6):
        walk.open(i)
        kept, missed, false = by_hand(i, *setting)
        shown, true = walk.shown, truth_of(i)
        assert np.array_equal(shown.kept, kept) and shown.missed.tolist() == missed and shown.false.tolist() == false
        assert [int(walk.counts[o][i]) for o in ("kept", "found", "missed", "false")] == [kept.max(), true.max() - len(missed), len(missed), len(false)]
        scores.append((float(dice(kept > 0, true > 0)), object_f2(kept, true), float(iou(kept > 0, true > 0))))
        assert np.allclose([shown.scores[o] for o in ("dice", "f2", "iou")], scores[-1], rtol=0, atol=1e-12)
        assert all(shown.scores[o] == table[o][i] for o in ("dice", "f2", "iou", "count", "n_pred"))
        assert (shown.scores["found"], shown.scores["missed"], shown.scores["false"]) == (true.max() - len(missed), len(missed), len(false))
    mean, has = np.mean(scores, axis=0), evidence.counts > 0
    assert np.allclose([walk.now[o] for o in ("dice", "f2", "iou")], mean, rtol=0, atol=1e-12)
    assert np.isclose(walk.now["dice_with"], np.mean([o[0] for o, ship in zip(scores, has) if ship])) and {o: walk.now[o] for o in whole} == whole
    rows = {name: of_set for name, of_set, _ in explorer.score_rows(walk)}
    assert rows["missed"] == str(sum(len(by_hand(i, *setting)[1]) for i in range(6))) and rows["Dice"] == walk.now["dice"]
    assert rows["empty images with one"] == f"{int(by_hand(0, *setting)[0].max() > 0)} of 1"


def test_matching_finds_at_most_one_each_and_more_than_a_half():
    rng = np.random.default_rng(0)
    for _ in range(60):
        kept, true = (ndimage.label(ndimage.uniform_filter(rng.random((14, 17)), 3) > .5)[0] for _ in range(2))
        if rng.random() < .5: true = np.where(kept > 0, kept, true) * (rng.random((14, 17)) < .9)
        true = np.unique(np.append(0, true), return_inverse=True)[1][1:].reshape(true.shape)
        found = match_labels(kept, true)
        for k in range(1, kept.max() + 1):
            good = [t for t in range(1, true.max() + 1) if ((kept == k) & (true == t)).sum() / ((kept == k) | (true == t)).sum() > .5]
            assert [int(found[k])] == (good or [0])
        assert (found > 0).sum() == object_counts(kept, true)[2][0] and found[0] == 0


def test_the_best_setting_is_the_best(parts):
    walk = Walk(*parts, SIZES)
    for name in walk.scores.names:
        walk.set(*walk.scores.best(name))
        assert walk.now[name] == np.nanmax(getattr(surface(parts[0], SIZES), name))


def test_sets_without_and_with_only_objects(parts):
    evidence, catalog, levels = parts
    without, only = evidence.subset([0]), evidence.subset([1, 2, 3])
    assert "dice_with" not in Walk(without, catalog, levels).scores.names and "dice_without" not in Walk(only, catalog, levels).scores.names
    with pytest.raises(ValueError, match="no image counts for the objective dice_with"): threshold_explorer(without, catalog, levels, objective="dice_with")
    assert "empty images" not in explorer.score_table(threshold_explorer(only, catalog, levels, static=False).walk)
    tool = threshold_explorer(without, catalog, levels, static=False)
    tool.next("missed")
    assert "no miss in any image" in tool.said.value
    nothing = threshold_explorer(evidence.subset([4]), catalog, levels, static=False)     # not one pixel above the floor
    assert nothing.walk.shown.scores["n_pred"] == 0 and nothing.walk.counts["missed"].tolist() == [3]


# --- steps

@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["missed", "false"])
def test_steps_visit_every_miss_and_false_alarm_once(kind, setting, parts):
    walk = Walk(*parts, SIZES)
    walk.set(*setting)
    walk.open(3)
    expected = [(i, number) for i in (*range(3, 6), *range(3)) for number in by_hand(i, *setting)[1 if kind == "missed" else 2]]
    got = []
    for _ in expected:
        assert walk.next(kind)
        got.append((walk.i, walk.focus[1]))
        y, x = walk.centre
        labels = truth_of(walk.i) if kind == "missed" else by_hand(walk.i, *setting)[0]
        ys, xs = np.nonzero(labels == walk.focus[1])
        assert walk.focus[0] == kind and ys.min() <= y <= ys.max() + 1 and xs.min() <= x <= xs.max() + 1
    assert got == expected
    assert walk.next(kind) == bool(expected)
    if expected: assert (walk.i, walk.focus[1]) == expected[0]


def test_steps_over_images(parts):
    walk = Walk(*parts, SIZES)
    walk.set(0, 3)
    walk.open(0)
    with_miss = [i for i in range(6) if by_hand(i, 0, 3)[1]]
    for i in [*[o for o in with_miss if o > 0], *with_miss, *with_miss]:
        assert walk.next("missed", image=True)
        assert walk.i == i


def test_the_object_in_question_stays_while_it_is_one(parts):
    walk = Walk(*parts, SIZES)
    walk.set(6, 0)
    walk.open(2)
    walk.next("missed")
    number = walk.focus[1]
    for setting in [(5.0, 0), *SETTINGS, (6.0, 0)]:
        walk.set(*setting)
        assert walk.focus == (("missed", number) if number in by_hand(2, *setting)[1] else None)
    walk.set(-5, 0)
    assert walk.next("false")
    at = walk.pixel
    for edge in np.arange(-5, 3, .25):
        walk.set(edge, 0)
        kept, _, false = by_hand(walk.i, edge, 0)
        number = int(kept[at[1], at[2]])
        assert walk.focus == (("false", number) if number in false else None)


# --- pictures

def test_the_lines_enclose_what_they_should(parts):
    """At twice the size: a kept component has yellow directly around it; truth has blue around that; nothing inside is drawn over."""
    walk = Walk(*parts, SIZES)
    walk.set(0, 3)
    walk.open(2)
    view = view_of(SHAPE, side=170)
    assert view.scale == 2
    case, shown = dataclasses.replace(walk.case, img=np.zeros((*SHAPE, 3), np.uint8)), walk.shown
    quiet = dataclasses.replace(shown, missed=shown.missed[:0], false=shown.false[:0])
    img = explorer.draw_case(case, quiet, view)
    big = np.kron(shown.kept, np.ones((2, 2), np.int32))
    around = (ndimage.maximum_filter(big, 3) > 0) & (big == 0)
    assert (img[around] == explorer.KEPT).all()
    true = np.kron(case.true, np.ones((2, 2), np.int32))
    first, second = (ndimage.binary_dilation(true > 0, np.ones((3, 3)), o) for o in (1, 2))
    blue = (img == explorer.TRUE).all(axis=2)
    assert (blue | (img == explorer.KEPT).all(axis=2))[second & ~first].all()
    assert not blue[~second].any() and not (img == explorer.KEPT).all(axis=2)[~(around | ((big > 0) & (ndimage.maximum_filter(big, 3) != big)))].any()


def test_marks_tell_misses_from_false_alarms(parts):
    walk = Walk(*parts, SIZES)
    walk.set(-1.984375, 10)
    walk.open(1)
    base = dataclasses.replace(walk.case, img=np.zeros((*SHAPE, 3), np.uint8))
    for kind, colour in (("missed", explorer.MISSED), ("false", explorer.FALSE)):
        one = dataclasses.replace(walk.shown, missed=np.array([1]) if kind == "missed" else walk.shown.missed[:0], false=np.array([1]) if kind == "false" else walk.shown.false[:0])
        thin, strong = (explorer.draw_case(base, one, view_of(SHAPE), focus) for focus in (None, (kind, 1)))
        other = explorer.FALSE if kind == "missed" else explorer.MISSED
        assert (strong == colour).all(axis=2).sum() > (thin == colour).all(axis=2).sum() > 20 and not (strong == other).all(axis=2).any()


@pytest.mark.parametrize("shape", [(1600, 300), (60, 84), (1, 1), (3000, 3000), (7, 900)])
@pytest.mark.parametrize("zoom", [0, 2, 8])
def test_views_of_any_size_lie_inside_and_lose_no_object(shape, zoom):
    for centre in (None, (0, 0), (shape[0], shape[1]), (shape[0] * .7, 3)):
        view = view_of(shape, zoom, centre)
        assert 0 <= view.top <= shape[0] - view.height and 0 <= view.left <= shape[1] - view.width and min(view.height, view.width) >= 1
        labels = np.zeros(shape, np.int32)
        rng = np.random.default_rng(0)
        for number in range(1, 9):      # single pixels
            y, x = rng.integers(view.top, view.top + view.height), rng.integers(view.left, view.left + view.width)
            labels[y, x] = number
        there = set(np.unique(labels)) - {0}
        small = explorer._shown_labels(labels, view)
        assert small.shape == explorer._picture_size(view)[::-1] and max(small.shape) <= explorer.SIDE
        if view.scale >= 1: assert there <= set(np.unique(small))
        else: assert len(there & set(np.unique(small))) >= len(there) - 1      # two in one pixel of the picture: the higher number
        assert explorer._shown_image(np.zeros((*shape, 3), np.uint8), shape, view).shape[:2] == small.shape


def test_the_image_may_be_larger_than_the_grid(tmp_path):
    evidence, catalog, levels = make_set(tmp_path/"images", grid=(30, 42))
    tool = threshold_explorer(evidence, catalog, levels, min_areas=SIZES, static=False)
    tool.zoom.value = 8
    img = cv2.imdecode(np.frombuffer(tool.picture.value, np.uint8), cv2.IMREAD_COLOR)
    assert img.shape == (390, 546, 3)
    photo = explorer._shown_image(np.arange(60 * 84, dtype=np.int64).reshape(60, 84, 1).repeat(3, 2).astype(np.uint8), (30, 42), view_of((30, 42), 20, (0, 0)))
    assert photo[0, 0, 0] == 0 and photo[0, 20, 0] == 2 and photo[20, 0, 0] == (2 * 84) % 256


def test_thousands_of_false_alarms_are_drawn(tmp_path):
    z, true = np.random.default_rng(0).normal(0, 4, (300, 300)).astype(np.float32), np.zeros((300, 300), np.int32)
    evidence, levels = Evidence((300, 300)), Levels()
    evidence.add("a", z, true)
    levels.add("a", z)
    case = explorer.Case(evidence.records[0], np.zeros((300, 300, 3), np.uint8), true, levels["a"])
    shown = explorer.outcome(case, 4, 0)
    assert len(shown.false) == keep(z, 4).max() > 3000
    boxes = explorer._false_boxes(shown)
    areas = np.bincount(shown.kept.ravel())[1:]
    assert len(boxes) == 200 and min(areas[o - 1] for o in boxes) >= np.sort(areas)[-200] and all((shown.kept[box] == o).any() for o, box in boxes.items())
    assert explorer.draw_case(case, shown, view_of((300, 300))).shape == (300, 300, 3)


# --- the tool, its widgets without a browser

def test_sliders_surface_and_buttons_lead_to_the_same_state(tool, parts):
    walk, sizes = tool.walk, list(SIZES)
    tool.slider.value = edge_index(-1.5)
    tool.area.value = 10
    assert (walk.logit, walk.min_area) == (-1.5, 10) and "log-odds -1.5" in tool.setting.value and "0.1824" in tool.setting.value
    first = tool.picture.value
    event = dict(canvas=tool.canvas, inaxes=tool.ax, button=1)
    from types import SimpleNamespace
    tool._clicked(SimpleNamespace(**event, xdata=-3.011, ydata=2.7))
    assert (walk.logit, walk.min_area) == (-3.015625, 40) and (tool.slider.value, tool.area.value) == (edge_index(-3.015625), 40) and tool.picture.value != first
    tool._clicked(SimpleNamespace(**event | dict(inaxes=None), xdata=0, ydata=0))
    tool._clicked(SimpleNamespace(**event | dict(button=None), xdata=0, ydata=0))
    assert (walk.logit, walk.min_area) == (-3.015625, 40)
    tool._clicked(SimpleNamespace(**event, xdata=99, ydata=-99))
    assert (walk.logit, walk.min_area) == (16, 0) and f"{walk.now['dice']:.4f}" in tool.table.value
    tool.goal.value = "f2"
    tool.best.click()
    assert (walk.logit, walk.min_area) == walk.scores.best("f2") and "object F2" in tool.ax.get_title()
    left, top = map(float, re.findall(r"(-?[\d.]+)px", tool.dot.value))     # from the upper left corner of the canvas
    assert np.allclose(tool.ax.transData.inverted().transform((left, tool.figure.bbox.height - top)), (walk.logit, sizes.index(walk.min_area)), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="not offered"): tool.set(0, 7)
    with pytest.raises(ValueError, match="not offered"): tool.set(-9, 0)


def test_a_real_mouse_on_the_canvas(tool):
    """Through the canvas's own events, where the mouse stands in pixels."""
    from matplotlib.backend_bases import MouseButton, MouseEvent
    x, y = tool.ax.transData.transform((-2.25, 1))
    MouseEvent("button_press_event", tool.canvas, x, y, MouseButton.LEFT)._process()
    assert abs(tool.walk.logit + 2.25) < .1 and tool.walk.min_area == 3
    x, y = tool.ax.transData.transform((1, 2))
    MouseEvent("motion_notify_event", tool.canvas, x, y)._process()      # dragged
    assert abs(tool.walk.logit - 1) < .1 and tool.walk.min_area == 10
    MouseEvent("button_release_event", tool.canvas, x, y, MouseButton.LEFT)._process()
    x, y = tool.ax.transData.transform((-4, 0))
    MouseEvent("motion_notify_event", tool.canvas, x, y)._process()      # only passing
    assert abs(tool.walk.logit - 1) < .1


def test_images_are_turned_and_what_cannot_be_opened_is_said(tool, parts):
    tool.open(0)
    tool.back.click()
    assert tool.walk.i == 5 == tool.place.value - 1 and "unreadable" in tool.said.value and "im5.png" in tool.name.value
    tool.forth.click()
    assert tool.walk.i == 0 and tool.said.value == ""
    tool.place.value = 3
    assert tool.walk.i == 2
    for button in tool.jumps.values(): button.click()
    with pytest.raises(ValueError, match="image 6"): tool.walk.open(6)


def test_names_are_shown_as_text(parts):
    evidence, catalog, levels = parts
    images = catalog.images.replace({"image": {"im1.png": "<b>x</b>.png"}})
    other = Catalog(images, catalog.objects.replace({"image": {"im1.png": "<b>x</b>.png"}}), catalog.root)
    named = Evidence(SHAPE, records=[dataclasses.replace(evidence.records[1], image="<b>x</b>.png")])
    tool = threshold_explorer(named, other, static=False)
    assert "<b>x" not in tool.name.value and "&lt;b&gt;x" in tool.name.value


def test_without_levels_all_numbers_are_there(parts):
    evidence, catalog, levels = parts
    tool, full = threshold_explorer(evidence, catalog, min_areas=SIZES, static=False), threshold_explorer(*parts, min_areas=SIZES, static=False)
    for setting in SETTINGS:
        for i in range(6):
            for o in (tool, full):
                o.set(*setting)
                o.open(i)
            assert tool.table.value == full.table.value and tool.walk.shown.missed.tolist() == full.walk.shown.missed.tolist() and tool.walk.shown.kept is None
    assert "collect_levels" in tool.said.value or "unreadable" in tool.said.value
    tool.set(-5.25, 3)
    tool.open(0)
    assert "There are no levels" in tool.said.value and full.said.value != tool.said.value
    assert tool.walk.next("false") and tool.walk.counts["false"][tool.walk.i] > 0 and tool.walk.focus is None      # the image is known, the place is not


def test_an_operating_point_is_where_it_begins(parts):
    evidence, catalog, levels = parts
    point = choose(surface(evidence, (0, 7)), "dice_with")
    walk = threshold_explorer(*parts, point=point, static=False).walk
    assert (walk.logit, walk.min_area) == (point.logit, point.min_area) and np.isclose(walk.now["dice_with"], point.score)
    other = OperatingPoint(0.25, 5, SHAPE)
    assert threshold_explorer(*parts, point=other, static=False).walk.min_area == 5
    walk = threshold_explorer(*parts, image="im3.png", static=False).walk
    assert walk.i == 3


# --- what does not belong together

def test_parts_of_different_passes_are_refused(parts, tmp_path):
    evidence, catalog, levels = parts
    ask = lambda *o, **k: threshold_explorer(*o, static=False, **k)
    with pytest.raises(ValueError, match="nothing to look at"): ask(Evidence(SHAPE), catalog)
    with pytest.raises(ValueError, match="image im3.png of the evidence is not in this Catalog"): ask(evidence, catalog.subset([0, 1, 2, 4, 5]))
    wrong = Catalog(catalog.images, catalog.objects.iloc[1:], catalog.root)
    with pytest.raises(ValueError, match="image im1.png: its objects in this Catalog are not those of the evidence"): ask(evidence, wrong, levels, image="im1.png")
    later = ask(evidence, wrong, levels, image="im0.png")      # found when it is opened: a sentence, and the numbers
    later.open(1)
    assert "not those of the evidence" in later.said.value and "this image" in later.table.value
    later.next("missed")
    own = Evidence(None, records=[dataclasses.replace(evidence.records[0], height=30)])
    with pytest.raises(ValueError, match="im0.png is 30 x 84 in the evidence and 60 x 84"): ask(own, catalog)
    for key, value in (("floor", -4.0), ("data", "x"), ("model", "x")):
        with pytest.raises(ValueError, match=f"{key} .* do not belong together"): ask(evidence, catalog, Levels(**{key: value} | {o: getattr(levels, o) for o in ("floor", "data", "model") if o != key}))
    with pytest.raises(ValueError, match="image im0.png is not in these levels"): ask(evidence, catalog, Levels(-8, "data", "model"))
    maps = levels.maps | {"im1.png": levels.maps["im2.png"]}
    with pytest.raises(ValueError, match="make both in one pass"): ask(evidence, catalog, Levels(-8, "data", "model", maps), image="im1.png")
    with pytest.raises(ValueError, match=r"grid \(30, 42\) is not that of the evidence"): ask(evidence, catalog, levels, point=OperatingPoint(0, 0, (30, 42)))
    with pytest.raises(ValueError, match="objective 'x' is none of"): ask(evidence, catalog, objective="x")
    with pytest.raises(ValueError, match="image x is not in this evidence"): ask(evidence, catalog, image="x")
    with pytest.raises(ValueError, match="below this evidence's floor"): Tally(evidence).at(-9)


def test_levels_of_a_turned_map_are_noticed(parts):
    """The same pixels at other places: only the histogram on the objects tells."""
    evidence, catalog, _ = parts
    levels = Levels(-8, "data", "model")
    for i in range(6): levels.add(f"im{i}.png", np.ascontiguousarray(map_of(i)[::-1]))
    with pytest.raises(ValueError, match="make both in one pass"): explorer.open_case(evidence, catalog, levels, 1, 1)


# --- without a person

def test_the_figure_without_a_browser(parts):
    before = matplotlib.get_backend()
    figure = threshold_explorer(*parts, min_areas=SIZES)
    words = " ".join(o.get_text() for ax in figure.axes for o in ax.texts)
    walk = threshold_explorer(*parts, min_areas=SIZES, static=False).walk
    assert f"{walk.now['dice']:.4f}" in words and f"threshold {1 / (1 + np.exp(-walk.logit)):.4g}" in words and len(figure.axes) == 4
    assert matplotlib.get_backend() == before      # ipympl is no one's backend


def test_papermill_gets_the_figure(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT/'tests')!r})\nfrom pathlib import Path\nfrom test_explorer import make_set\nfrom shipnb.explorer import threshold_explorer\n"
            "evidence, catalog, levels = make_set(Path('again'))\nthreshold_explorer(evidence, catalog, levels)")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")))
    nbformat.write(nb, tmp_path/"a.ipynb")
    subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "a.ipynb", "b.ipynb"], cwd=tmp_path, check=True, timeout=300, capture_output=True,
                   env={name: o for name, o in os.environ.items() if name not in ("MPLBACKEND", "JPY_SESSION_NAME")})
    kinds = {kind for o in nbformat.read(tmp_path/"b.ipynb", 4).cells[-1]["outputs"] for kind in o.get("data", {})}
    assert "image/png" in kinds and "application/vnd.jupyter.widget-view+json" not in kinds
