"""Looking at a set: filters against pandas, outlines against masks, lists that lose nothing, pages that read only what they show."""
import json
import os
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from shipnb import cleaning, eda, explore
from shipnb.catalog import IMAGE_COLUMNS, OBJECT_COLUMNS, Catalog, read_airbus
from shipnb.masks import rle_encode

ROOT = Path(__file__).parents[1]
SHAPE = (96, 128)


def make_catalog(root, n=40, seed=0, write=True):
    """A Catalog of n small images with up to four rectangles each, image 1 lost, image 2 torn, image 3 no image at all."""
    random, images, objects = np.random.default_rng(seed), [], []
    root.mkdir()
    for i in range(n):
        name, mask = f"im{i:03}.png", np.zeros(SHAPE, np.uint8)
        for k in range(int(random.integers(0, 5))):
            h, w = random.integers(1, 12, 2)
            y, x = random.integers(0, SHAPE[0] - h), 30 * k + random.integers(0, 30 - w)     # one in each quarter: disjoint
            one = np.zeros_like(mask)
            one[y:y + h, x:x + w] = 1
            mask |= one
            objects.append((name, "ship", rle_encode(one), x, y, x + w, y + h, int(one.sum())))
        images.append((name, *SHAPE, int(mask.any() and len([o for o in objects if o[0] == name])), 5000, f"scene {i % 7}", ("train", "valid")[i % 3 == 0], "Cloudy" if i % 5 == 0 else "", i / n))
        if write and i != 1: cv2.imwrite(str(root/name), random.integers(0, 90, (*SHAPE, 3), np.uint8))
    if write:
        data = (root/"im002.png").read_bytes()
        (root/"im002.png").write_bytes(data[:len(data) // 2])
        (root/"im003.png").write_text("no image")
    columns = [*IMAGE_COLUMNS, "note", "score"]
    return Catalog(pd.DataFrame(images, columns=columns), pd.DataFrame(objects, columns=OBJECT_COLUMNS), root)


@pytest.fixture
def catalog(tmp_path):
    return make_catalog(tmp_path/"images")


# --- filters

@pytest.mark.parametrize("given", [{}, dict(split="valid"), dict(counts=(1, 2)), dict(counts=(3, None)), dict(area=(0, 9)), dict(area=(30, None)), dict(text="cloudy"), dict(text="SCENE 3"),
                                   dict(text="im01"), dict(without={"im003.png", "no.png"}), dict(only={"im003.png", "im008.png", "no.png"}), dict(split="train", counts=(1, None), area=(5, 60), text="scene")])
def test_filters_agree_with_rows_looked_at_one_by_one(given, catalog):
    def fits(row):
        areas = catalog.objects[catalog.objects["image"] == row["image"]]["area"]
        (low, high), (least, most) = given.get("counts", (0, None)), given.get("area", (0, None))
        return (given.get("split", row["split"]) == row["split"] and low <= row["count"] <= (10**9 if high is None else high)
                and ("area" not in given or any(least <= o <= (10**9 if most is None else most) for o in areas))
                and any(given.get("text", "").lower() in row[o].lower() for o in ("image", "group", "note")) and row["image"] in given.get("only", {row["image"]}) and row["image"] not in given.get("without", ()))
    expected = [i for i, row in catalog.images.iterrows() if fits(row)]
    assert explore.Selection(catalog).find(**given).tolist() == expected
    assert 0 < len(expected) and (not given or len(expected) < len(catalog))


def test_a_regular_expression_is_only_text(catalog):
    assert explore.Selection(catalog).find(text=".*").size == 0 and explore.Selection(catalog).find(text="(").size == 0


def test_tables_as_they_may_be(catalog):
    """A split of numbers (folds), notes that are lacking, an image twice, notes of the list."""
    catalog.images["split"], catalog.images.loc[4, "note"] = catalog.images.index % 4, None
    twice = Catalog(catalog.images.iloc[[*range(10), 3]], catalog.objects, catalog.root)
    selection = explore.Selection(twice)
    assert selection.find(split="3").tolist() == [3, 7, 10] and 4 not in selection.find(text="none") and selection.find(only=["im003.png"]).tolist() == [3, 10]
    has = [(catalog.objects["image"] == name).any() for name in twice.images["image"]]
    assert selection.find(area=(0, 10**6)).tolist() == np.flatnonzero(has).tolist()
    assert selection.find(text="GLARE", notes={"im003.png": "a glare", "im005.png": "haze", "no.png": "glare"}).tolist() == [3, 10]


def test_objects_without_their_image_count_nowhere(catalog):
    catalog.objects.loc[0, "image"] = "gone.png"
    found = explore.Selection(catalog).find(area=(0, 1000))
    assert found.tolist() == [i for i, name in enumerate(catalog.images["image"]) if (catalog.objects["image"] == name).any()] and len(catalog) - 1 not in found[catalog.counts[found] == 0]


# --- pictures

@pytest.mark.parametrize("side", [128, 64, 256])
def test_outlines_surround_their_objects_and_touch_none(side, catalog):
    """The line's pixels: outside of every object that was outlined, around it, and a few pixels from it."""
    black = np.zeros((side * SHAPE[0] // SHAPE[1], side, 3), np.uint8)
    scale = side / SHAPE[1]
    for i in np.flatnonzero(catalog.counts == 1):
        row = catalog.objects.iloc[catalog._rows[catalog.images["image"][i]]]
        drawn = explore.draw_outlines(black, row, SHAPE).any(2)
        o = row.iloc[0]
        yy, xx = np.nonzero(drawn)
        box = np.array([o.x0, o.y0, o.x1, o.y1]) * scale
        inside = (xx + .5 > box[0]) & (xx + .5 < box[2]) & (yy + .5 > box[1]) & (yy + .5 < box[3])
        assert not inside.any(), "the object itself stays as it is"
        far = (np.ceil(2 / scale) + 1) * scale + 2      # a smooth line of width 1 touches three pixels
        assert xx.min() >= box[0] - far and xx.max() + 1 <= box[2] + far and yy.min() >= box[1] - far and yy.max() + 1 <= box[3] + far
        if box[0] > far and box[1] > far and box[2] < black.shape[1] - far and box[3] < black.shape[0] - far:    # a closed line: filled, it holds the object
            filled = cv2.floodFill(drawn.astype(np.uint8), None, (0, 0), 2)[1]
            assert (filled[int(box[1] + .5):int(np.ceil(box[3] - .5)), int(box[0] + .5):int(np.ceil(box[2] - .5))] == 0).all()


@pytest.mark.parametrize("side", [128, 40, 256])
def test_outlines_follow_a_slanted_object_at_one_distance(side):
    """Every pixel of the line lies at the stated distance from the object, by scipy's distances; every direction around the object has some."""
    mask, shape = np.zeros(SHAPE, np.uint8), (side * SHAPE[0] // SHAPE[1], side)
    cv2.line(mask, (50, 40), (80, 60), 1, 5)
    yy, xx = np.nonzero(mask)
    row = pd.DataFrame([("a", "ship", rle_encode(mask), xx.min(), yy.min(), xx.max() + 1, yy.max() + 1, len(xx))], columns=OBJECT_COLUMNS)
    drawn = explore.draw_outlines(np.zeros((*shape, 3), np.uint8), row, SHAPE).max(2) > 120
    scale = side / SHAPE[1]
    distance = ndimage.distance_transform_edt(mask == 0)
    y, x = np.nonzero(drawn)
    at = ndimage.map_coordinates(distance, [(y + .5) / scale - .5, (x + .5) / scale - .5], order=1)
    margin = np.ceil(2 / scale) + 1
    assert at.min() > margin - 1 - .8 / scale and at.max() < margin + 1 + .8 / scale
    turns = np.arctan2((y + .5) / scale - yy.mean(), (x + .5) / scale - xx.mean())
    assert np.histogram(turns, 12, (-np.pi, np.pi))[0].min() >= 1


def test_a_wide_margin_costs_little():
    """Ships in a scene of 6000 pixels, drawn 60 pixels wide: the line is 201 pixels of the scene away."""
    shape, mask = (6000, 6000), np.zeros((6000, 6000), np.uint8)
    mask[3000:3200, 2000:2100] = 1
    row = pd.DataFrame([("a", "ship", rle_encode(mask), 2000, 3000, 2100, 3200, 20_000)], columns=OBJECT_COLUMNS)
    drawn = explore.draw_outlines(np.zeros((60, 60, 3), np.uint8), row, shape).any(2)
    yy, xx = np.nonzero(drawn)
    assert (yy.min(), yy.max(), xx.min(), xx.max()) == pytest.approx((27.5, 33.5, 17.5, 22.5), abs=1.6)


def test_bad_boxes_draw_nothing_and_stop_nothing(catalog):
    objects = catalog.objects.head(4).assign(rle="", x0=[np.nan, -1e30, 5, 1e300], x1=[4, 1e30, np.inf, 1e301])
    assert (explore.draw_outlines(np.zeros((48, 64, 3), np.uint8), objects.iloc[[0, 2]], SHAPE) == 0).all()
    explore.draw_outlines(np.zeros((48, 64, 3), np.uint8), objects, SHAPE)
    long = catalog.objects.head(1).assign(rle="1 1000000000000")
    assert explore.draw_outlines(np.zeros((48, 64, 3), np.uint8), long, SHAPE).any()      # its box


def png_of(height, width):
    """A PNG of a few bytes whose header promises a size."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_must_not_be_opened_is_not(catalog, tmp_path, monkeypatch):
    """A name that leads out of the folder, a header that promises 10 GB: a sentence, and no pixel of it is decoded."""
    cv2.imwrite(str(tmp_path/"secret.png"), np.full((*SHAPE, 3), 200, np.uint8))
    (catalog.root/"im000.png").write_bytes(png_of(60_000, 60_000))
    images = catalog.images.copy()
    images.loc[5, "image"], images.loc[6, "image"], images.loc[7, "image"] = "../secret.png", str(tmp_path/"secret.png"), "a\0b.png"
    bad = Catalog(images, catalog.objects, catalog.root)
    monkeypatch.setattr(Catalog, "read_image", lambda self, i: pytest.fail("decoded"))
    for i, words in ((0, "60000 x 60000 pixels are too many"), (5, "points outside its folder"), (6, "absolute path"), (7, "points outside its folder")):
        img, problem = explore.picture(bad, i, 64)
        assert problem.startswith("unreadable: ") and words in problem and (img[0, 0] == explore.GREY).all()


def test_sizes_that_the_table_does_not_know(catalog):
    cv2.imwrite(str(catalog.root/"im005.png"), np.zeros((48, 48, 3), np.uint8))
    img, problem = explore.picture(catalog, 5)
    assert img.shape == (*SHAPE, 3) and problem == "wrong size: the file has 48 x 48 px, the table says 96 x 128"
    catalog.images["height"] = catalog.images["width"] = 0
    img, problem = explore.picture(catalog, 5)
    assert img.shape == (48, 48, 3) and problem is None
    catalog.images["height"], catalog.images["width"] = 90_000, 60_000        # no picture of 16 GB for a file that is lost
    img, problem = explore.picture(catalog, 1)
    assert max(img.shape) == explore.LARGEST and problem == "unreadable: no such file"


def test_bad_images_become_a_sentence(catalog):
    for i, words in ((1, "no such file"), (2, "cannot be decoded"), (3, "not an image that can be opened")):
        img, problem = explore.picture(catalog, i, 64)
        assert img.shape == (48, 64, 3) and words in problem and problem.count("\n") == 0
        assert (img == explore.GREY).all(2).mean() > .3
    img, problem = explore.picture(catalog, 0, None)
    assert img.shape == (*SHAPE, 3) and problem is None


def test_labels_only_and_boxes_only(catalog):
    bare = Catalog(catalog.images, catalog.objects.assign(rle=""), None)
    i = int(np.argmax(bare.counts))
    img, problem = explore.picture(bare, i)
    assert problem == "labels only" and (img != explore.picture(bare, i, outlines=False)[0]).any()


@pytest.mark.parametrize("change", [dict(height=0, width=0), dict(height=1, width=4000)])
def test_odd_sizes_are_shown(change, catalog):
    catalog.images = catalog.images.assign(**change)
    catalog.root = None
    assert max(explore.picture(catalog, 0, 64)[0].shape[:2]) >= 32


def test_thumbnails_are_bounded(catalog):
    small = explore.Thumbnails(catalog, 32, most=5)
    for i in [*range(10), 9, 8]: small.page([i])
    assert small.read == 10 and len(small.kept) == 5
    assert cv2.imdecode(np.frombuffer(small.page([9])[0][0], np.uint8), cv2.IMREAD_COLOR).shape == (24, 32, 3)


# --- the list

def test_lists_in_any_form_are_read_and_come_back(tmp_path):
    names = {"a.jpg": "", "with, comma.jpg": 'a "quoted" note', "\u8239.jpg": "two\nlines"}
    explore.write_excluded(tmp_path/"x"/"list.csv", names)
    assert explore.read_excluded(tmp_path/"x"/"list.csv") == names
    assert pd.read_csv(tmp_path/"x"/"list.csv", keep_default_na=False)["Note"].tolist() == list(names.values())   # pandas as oracle
    for text in ("image\na.jpg\n", "# mine\nImageId,Note\n\na.jpg,\n", "name\n a.jpg \n"):
        (tmp_path/"other.csv").write_text(text)
        assert explore.read_excluded(tmp_path/"other.csv") == {"a.jpg": ""} == dict.fromkeys(cleaning.read_exclude(tmp_path/"other.csv"), "")
    (tmp_path/"plain.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n\r\nb.jpg\r\n")
    assert explore.read_excluded(tmp_path/"plain.txt") == {"a.jpg": "", "b.jpg": ""}
    (tmp_path/"ids.csv").write_text("ImageId\na.jpg\n")
    assert explore.read_excluded(tmp_path/"ids.csv") == {"a.jpg": ""} and explore.read_excluded(tmp_path/"none.csv") == {}


def test_cleaning_leaves_out_what_was_marked(tmp_path):
    """The list is read by cleaning's own reader, whatever stands in names and notes, and exactly the marked images go."""
    catalog = make_catalog(tmp_path/"images")
    notes = {"im004.png": "# no comment", "im006.png": 'a "quoted", note', "im009.png": "two\n# lines", "b#1 .png": "", "\u8239, x.png": "it's"}
    explore.write_excluded(tmp_path/"list.csv", notes)
    assert cleaning.read_exclude(tmp_path/"list.csv") == list(notes) and explore.read_excluded(tmp_path/"list.csv") == notes
    kept, dropped, *_ = cleaning.clean(catalog, [partial(cleaning.excluded, names=cleaning.read_exclude(tmp_path/"list.csv"))])
    assert set(catalog.images["image"]) - set(kept.images["image"]) == {"im004.png", "im006.png", "im009.png"} == set(dropped["image"])


@pytest.mark.parametrize("text", ["ImageId,Note\na.jpg,cloud, all of it\n", "ImageId,EncodedPixels\na.jpg,1 2\n", "a.jpg,1 2\n", "\x00\xff\xfe", "a\x00b"])
def test_a_file_that_is_no_list_is_never_written_over(text, tmp_path, catalog):
    path = tmp_path/"labels.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="choose another file"): explore.write_excluded(path, {"a.jpg": ""})
    with pytest.raises(ValueError, match="labels.csv"): explore.explore(catalog, path, static=True)
    assert path.read_bytes() == text.encode("latin-1")


# --- the tool, its widgets without a browser

@pytest.fixture
def tool(catalog, tmp_path):
    return explore.explore(catalog, tmp_path/"out"/"excluded.csv", page_size=6, static=False)


def test_only_the_pages_that_are_seen_are_read(tool, monkeypatch):
    assert tool.small.read == 6 and len(tool.grid.children) == 6 and tool.pages == 7
    tool.next.click()
    assert tool.small.read == 12 and [o.i for o in tool.tiles] == list(range(6, 12))
    tool.back.click()
    assert tool.small.read == 12 and tool.number.value == 1
    tool.last.click()
    assert len(tool.grid.children) == 4 and tool.next.disabled and tool.last.disabled and not tool.back.disabled
    tool.number.value = 3
    assert tool.page == 2 and tool.tiles[0].i == 12


def test_filters_of_the_tool(tool, catalog):
    tool.next.click()
    tool.split.value = "valid"
    assert tool.page == 0 and (catalog.images["split"].to_numpy()[tool.found] == "valid").all() and "of 40 images" in tool.summary.value
    tool.count.value = (2, 4)
    tool.text.value = "nothing like it"
    assert len(tool.found) == 0 and not tool.grid.children and tool.pages == 1
    tool.reset.click()
    assert len(tool.found) == 40
    tool.area.index = (1, 3)
    least, most = tool.area.value
    assert (least, most) == (10, 50)
    assert set(catalog.images["image"].to_numpy()[tool.found]) == set(catalog.objects[catalog.objects["area"].between(least, most)]["image"])


@pytest.mark.parametrize("given", [dict(split="valid", counts=(1, 3), text="scene", area=(11, 47)), dict(counts=(5, None)), dict(counts=(1, 900)), dict(area=(10**6, None)), dict(area=(0, 30))])
def test_beginning_with_filters(given, catalog, tmp_path):
    tool = explore.explore(catalog, tmp_path/"x.csv", static=False, **given)
    assert tool.found.tolist() == explore.Selection(catalog).find(**given).tolist()
    tool.reset.click()
    assert len(tool.found) == 40


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("given, says", [(dict(split="tset"), "split = 'tset' is not in this Catalog; it has train, valid"), (dict(counts=(3, 1)), r"counts = \(3, 1\)"), (dict(area=(-1, None)), r"area = \(-1, None\)"),
                                         (dict(page_size=0), "page_size = 0")])
def test_filters_that_make_no_sense_are_refused(given, says, static, catalog, tmp_path):
    with pytest.raises(ValueError, match=says): explore.explore(catalog, tmp_path/"x.csv", static=static, **given)


def test_marks_notes_and_saving(tool, tmp_path):
    path = tmp_path/"out"/"excluded.csv"
    tool.tiles[2].out.value = True
    assert not path.exists() and "not saved" in tool.said.value and "shipnb-out" in tool.tiles[2].box._dom_classes
    tool.tiles[4].hit.click()
    assert tool.body.children == (tool.single,) and tool.current == 4 and not tool.out.value
    tool.note.value = "glare"                       # a reason excludes
    assert tool.out.value and tool.excluded == {"im002.png": "", "im004.png": "glare"}
    tool.step(1)
    assert tool.current == 5 and not tool.out.value and tool.note.value == ""
    tool.step(-1)
    assert tool.out.value and tool.note.value == "glare"
    tool.close.click()
    assert tool.tiles[4].out.value
    tool.save_button.click()
    assert explore.read_excluded(path) == {"im002.png": "", "im004.png": "glare"}
    assert "2 names saved in out/excluded.csv" in tool.said.value
    tool.text.value = "GLARE"                       # the notes of the list are searched as well
    assert tool.found.tolist() == [4]
    tool.text.value, tool.which.value = "", "excluded"
    assert tool.found.tolist() == [2, 4]
    tool.which.value = "not excluded"
    assert len(tool.found) == 38 and not {2, 4} & set(tool.found.tolist())
    tool.which.value = "excluded"
    tool.tiles[0].out.value = False
    tool.save()
    assert explore.read_excluded(path) == {"im004.png": "glare"}


def test_names_of_another_set_stay_in_the_list(catalog, tmp_path):
    (tmp_path/"list.csv").write_text("ImageId\nother.jpg\nim001.png\n")
    tool = explore.explore(catalog, tmp_path/"list.csv", static=False)
    assert tool.tiles[1].out.value and not tool.tiles[0].out.value
    tool.save()
    assert explore.read_excluded(tmp_path/"list.csv") == {"other.jpg": "", "im001.png": ""}


def test_two_tools_on_one_list_lose_no_mark(catalog, tmp_path):
    (tmp_path/"list.csv").write_text("ImageId,Note\nim007.png,old\n")
    one, other = (explore.explore(catalog, tmp_path/"list.csv", static=False) for _ in range(2))
    one.mark(0, True, "mine")
    other.mark(1, True)
    other.mark(7, False)
    one.save()
    other.save()
    assert explore.read_excluded(tmp_path/"list.csv") == {"im000.png": "mine", "im001.png": ""} == other.excluded
    assert other.tiles[0].out.value and "2</b> excluded" in other.summary.value
    one.mark(0, True)                               # nothing new: nothing to save
    assert not one.changed and "not saved" not in one.said.value


def test_what_cannot_be_saved_is_a_sentence_and_the_marks_stay(tool, tmp_path):
    (tmp_path/"out").write_text("a file where the folder should be")
    tool.mark(0, True)
    tool.save_button.click()
    assert "not saved: " in tool.said.value and "shipnb-bad" in tool.said._dom_classes and "Traceback" not in tool.said.value
    assert tool.excluded == {"im000.png": ""} and tool.tiles[0].out.value
    (tmp_path/"out").unlink()
    tool.save_button.click()
    assert explore.read_excluded(tmp_path/"out"/"excluded.csv") == {"im000.png": ""} and "shipnb-bad" not in tool.said._dom_classes


def test_a_disk_that_fails_leaves_the_list_as_it_was(tool, tmp_path, monkeypatch):
    tool.mark(0, True)
    tool.save()
    before = (tmp_path/"out"/"excluded.csv").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    tool.mark(1, True)
    tool.save()
    assert "No space left on device" in tool.said.value and (tmp_path/"out"/"excluded.csv").read_bytes() == before
    assert os.listdir(tmp_path/"out") == ["excluded.csv"] and len(tool.excluded) == 2


def test_every_image_opens(tool):
    for i in range(8): tool.open(i)
    tool.outlines.value = False
    tool.open(2)
    assert "problem" in tool.facts.value
    assert "no such file" not in tool.facts.value
    tool.open(39)
    tool.step(1)      # no neighbour: nothing happens
    assert tool.current == 39


def test_names_are_shown_as_text(catalog, tmp_path):
    catalog.images.loc[0, "note"] = "<script>alert(1)</script>"
    catalog.images.loc[0, "image"] = "<b>x</b>.png"
    tool = explore.explore(Catalog(catalog.images, catalog.objects, catalog.root), tmp_path/"x.csv", static=False)
    tool.open(0)
    assert "<script>" not in tool.facts.value and "&lt;script&gt;" in tool.facts.value and "<b>x" not in tool.tiles[0].caption.value


# --- without a person

def test_the_figure_without_a_browser(catalog, tmp_path):
    figure = explore.explore(catalog, tmp_path/"x.csv", page_size=6, counts=(1, None))
    expected = catalog.images["image"].to_numpy()[catalog.counts >= 1][:6]
    titles = [ax.get_title() or ax.get_title(loc="left") for ax in figure.axes]     # another test may have set where titles stand
    assert [o.split("\n")[0] for o in titles if o] == expected.tolist()
    assert explore.explore(catalog, tmp_path/"x.csv", text="nothing like it")._suptitle.get_text().startswith("none of 40")
    with pytest.raises(ValueError, match="nothing to look at"): explore.explore(catalog.subset([]), static=False)


@pytest.mark.parametrize("kernel, mine, parents, live", [(True, {}, {}, False), (True, {"JPY_SESSION_NAME": "a.ipynb"}, {}, True), (True, {"VSCODE_PID": "7"}, {"VSCODE_PID": "7"}, True),
                                                         (True, {"JPY_SESSION_NAME": "a.ipynb"}, {"JPY_SESSION_NAME": "a.ipynb"}, False), (False, {"JPY_SESSION_NAME": "a.ipynb"}, {}, False)])
def test_who_is_looking(kernel, mine, parents, live, monkeypatch):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG"): monkeypatch.delenv(name, raising=False)
    for name, value in mine.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(**({"kernel": 1} if kernel else {})))
    monkeypatch.setattr(explore, "_parent_has", lambda name: name in parents)
    assert explore.is_live() == live


def test_papermill_gets_the_figure(tmp_path):
    """Also a papermill that is started inside a kernel of JupyterLab, whose environment it hands on."""
    make_catalog(tmp_path/"images")
    code = f"import sys; sys.path.insert(0, {str(ROOT/'tests')!r})\nfrom pathlib import Path\nfrom test_explore import make_catalog\nfrom shipnb.explore import explore\nexplore(make_catalog(Path('again')), 'x.csv')"
    kernel = dict(display_name="python3", language="python", name="python3")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=kernel))
    nbformat.write(nb, tmp_path/"a.ipynb")
    subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "a.ipynb", "b.ipynb"], cwd=tmp_path, check=True, timeout=180, capture_output=True,
                   env={name: o for name, o in os.environ.items() if name != "MPLBACKEND"} | {"JPY_SESSION_NAME": "nbs/x.ipynb"})   # with agg a kernel shows no figure
    kinds = {kind for o in json.loads((tmp_path/"b.ipynb").read_text())["cells"][-1]["outputs"] for kind in o.get("data", {})}
    assert "image/png" in kinds and "application/vnd.jupyter.widget-view+json" not in kinds


def test_the_complete_label_tables(real_data, tmp_path):
    """192,556 rows whose images are not here: every page is placeholders, and only what is seen is asked for."""
    labels = real_data/"airbus"/"labels"
    whole = eda.read_labels(str(labels/"train_ship_segmentations_v2_partial.csv.gz"), str(labels/"train_image_counts.csv.gz"))
    whole.root = tmp_path
    tool = explore.explore(whole, tmp_path/"x.csv", static=False)
    assert len(tool.found) == 192_556 and tool.small.read == 20
    tool.count.value = (5, tool.count.max)
    assert len(tool.found) == int((whole.counts >= 5).sum())
    tool.last.click()
    assert tool.small.read <= 60 and all("unreadable" in o.caption.value for o in tool.tiles[:len(tool.grid.children)])


def test_the_real_images(real_data, tmp_path):
    catalog = read_airbus(real_data/"airbus")
    tool = explore.explore(catalog, tmp_path/"x.csv", static=False)
    assert len(tool.found) == 163 and tool.small.read == 20 and all(problem is None for _, problem in tool.small.page(range(163)))
