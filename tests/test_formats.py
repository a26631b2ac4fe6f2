"""Every label format: real folders, round trips, pycocotools as the judge of COCO, and hostile input, each answered by a report or one clear error."""
import contextlib
import io
import json
import re
import resource
import time
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco
from pycocotools.coco import COCO
from scipy.io import loadmat, savemat

from shipnb import formats
from shipnb.catalog import Catalog, read_airbus
from shipnb.masks import label_instances, rle_area, rle_decode, rle_encode

BOX = ["x0", "y0", "x1", "y1"]
CSV = "train_ship_segmentations_v2.csv"
MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1))


def picture(path, height=48, width=64):
    """A real image file of noise; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))
    return path


def tree(folder):
    """All paths below a folder with their sizes: what a test compares to see that nothing was written."""
    return {(o.relative_to(folder).as_posix(), o.stat().st_size if o.is_file() else 0) for o in folder.rglob("*")}


def load_coco(path):
    """The file as pycocotools reads it, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()): return COCO(str(path))


def same_in_coco(catalog, path):
    """Write COCO, let pycocotools read it, and compare counts, boxes and mask areas with the Catalog."""
    catalog.to_coco(path)
    theirs = load_coco(path)
    assert (len(theirs.imgs), len(theirs.anns)) == (len(catalog), len(catalog.objects))
    boxes = np.array([o["bbox"] for o in theirs.anns.values()], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, catalog.objects[BOX].to_numpy(float), atol=1e-9)
    for ann, rle in zip(theirs.anns.values(), catalog.objects["rle"]):
        if rle: assert theirs.annToMask(ann).sum() == rle_area(rle)
    return theirs


# ---- COCO masks against pycocotools

@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_packed_counts_are_those_of_pycocotools(mask):
    theirs = coco.encode(np.asfortranarray(mask))
    ours = formats.rle_coco(rle_encode(mask), mask.shape)
    assert ours["counts"] == theirs["counts"].decode() and ours["size"] == theirs["size"]
    assert formats.coco_rle(ours, mask.shape) == rle_encode(mask)
    counts = formats._unpack_counts(ours["counts"]).tolist()
    assert formats.coco_rle({"counts": counts, "size": list(mask.shape)}, mask.shape) == rle_encode(mask)
    assert (coco.decode(coco.frPyObjects({"counts": counts, "size": list(mask.shape)}, *mask.shape)) == mask).all()


def test_packed_counts_of_large_numbers():
    for shape in ((768, 768), (2560, 2560), (14000, 14000)):
        pixels = shape[0] * shape[1]
        for rle in ("", "1 1", f"{pixels} 1", f"1 {pixels}", f"{pixels // 2} 3 {pixels - 5} 2"):
            packed = formats.rle_coco(rle, shape)
            assert coco.area({"size": packed["size"], "counts": packed["counts"].encode()}) == rle_area(rle)
            assert formats.coco_rle(packed, shape) == rle


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.data())
def test_polygons_are_drawn_as_by_pycocotools(shape, data):
    number = st.floats(-5, 45, allow_nan=False).map(lambda o: round(o, 2))
    h, w = shape
    limit = 2 * max(shape)
    polygon = [max(-limit, min(limit, o)) for o in data.draw(st.lists(number, min_size=6, max_size=16).filter(lambda o: len(o) % 2 == 0))]
    theirs = coco.decode(coco.frPyObjects([polygon], h, w))[..., 0]
    assert (rle_decode(formats.polygon_rle(polygon, shape), shape) == theirs).all()


def test_several_polygons_are_one_mask():
    parts = [[1.0, 1, 9, 1, 9, 9, 1, 9], [5.0, 5, 20, 5, 20, 20, 5, 20]]
    theirs = coco.decode(coco.merge(coco.frPyObjects(parts, 32, 32)))
    assert (rle_decode(formats.coco_rle(parts, (32, 32)), (32, 32)) == theirs).all()


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_as_counts_is_a_code_or_a_value_error(text):
    try: rle = formats.coco_rle({"counts": text, "size": [8, 8]}, (8, 8))
    except (ValueError, UnicodeEncodeError): return
    rle_decode(rle, (8, 8))


# ---- COCO files

def coco_folder(root, annotations, images=None, categories=({"id": 3, "name": "tank"},), **more):
    """A folder with a.png, b.png and train.json."""
    for name in ("a.png", "b.png"): picture(root/name)
    images = [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}, {"id": 2, "file_name": "b.png"}] if images is None else images
    (root/"train.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": list(categories), **more}))
    return root


def mark(**changes):
    return {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], **changes}


def test_fractions_of_a_pixel_and_crowds_survive_a_round_trip(tmp_path):
    marks = [mark(), mark(id=2, iscrowd=1, segmentation={"counts": [100, 20, 2952], "size": [48, 64]}), mark(id=3, image_id=2, segmentation=[[1, 1, 9, 1, 9, 9]])]
    catalog = formats.read(coco_folder(tmp_path, marks))
    assert catalog.objects[BOX].iloc[0].tolist() == [1, 2, 4.5, 6] and catalog.objects["area"].iloc[0] == 14
    assert catalog.objects["crowd"].tolist() == [False, True, False] and catalog.objects["label"].tolist() == ["tank"] * 3
    theirs = same_in_coco(catalog, tmp_path/"out"/"again.json")
    assert [o["iscrowd"] for o in theirs.anns.values()] == [0, 1, 0] and "segmentation" not in theirs.anns[1]
    again = formats.read_coco(tmp_path, tmp_path/"out"/"again.json")
    pd.testing.assert_frame_equal(again.objects, catalog.objects)


@pytest.mark.parametrize("change,why", [
    ({"image_id": 77}, "image_id 77 is not in images"), ({"image_id": None}, "image_id None is not in images"), ({"category_id": 9}, "category_id 9 is not in categories"),
    ({"category_id": [3]}, "is not in categories"), ({"bbox": None}, "neither bbox nor segmentation"), ({"bbox": [1, 2, 3]}, "not 4 numbers"),
    ({"bbox": ["a", 1, 2, 3]}, "not 4 numbers"), ({"bbox": [1, 1, 0, 5]}, "holds nothing"), ({"bbox": [500, 1, 5, 5]}, "holds nothing"),
    ({"bbox": [1, 1, -5, 5]}, "holds nothing"), ({"bbox": [float("nan"), 1, 2, 3]}, "holds nothing"), ({"bbox": [1e400, 0, 1, 1]}, "holds nothing"),
    ({"bbox": [10**400, 0, 1, 1]}, "too large"), ({"segmentation": {"counts": [1, 10**12, 3]}}, "counts sum"), ({"segmentation": {"counts": "zz~"}}, "damaged"),
    ({"segmentation": [[1, 1, 1e12, 5, 7, 7]]}, "far outside"), ({"segmentation": [[1, 1, 2, 2]]}, "three or more corners"), ({"segmentation": "1 2"}, "neither polygons"),
    ({"segmentation": [["x"] * 6]}, "could not convert"), ({"segmentation": {"counts": [3072], "size": [9, 9]}}, "is of an image of"),
    ({"segmentation": {"counts": [-5, 3077]}}, "counts sum")])
def test_a_bad_annotation_is_reported_and_the_rest_goes_on(tmp_path, change, why):
    catalog = formats.read_coco(coco_folder(tmp_path, [mark(**change), mark(id=2, image_id=2)]))
    (image, problem, action), = catalog.problems.values.tolist()
    assert why in problem and problem.startswith("annotation 1")
    assert (action, len(catalog)) in {("annotation dropped", 2), ("quarantined", 1)} and len(catalog.objects) == 1


@pytest.mark.parametrize("images,why", [
    ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "is that of a.png too"), ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}], "listed twice"),
    ([{"id": 1, "file_name": "a.png"}, {"file_name": "b.png"}], "has no id"), ([{"id": 1, "file_name": "a.png"}, {"id": 2}], "has no file_name"),
    ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "../b.png"}], "outside"), ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "/etc/passwd"}], "absolute"),
    ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "gone.png"}], "missing"), ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png", "height": 1, "width": 9}], "the JSON says")])
def test_a_bad_image_entry_is_reported(tmp_path, images, why):
    before = tree(coco_folder(tmp_path, [], images))
    try: catalog = formats.read_coco(tmp_path)
    except ValueError as error: assert why in str(error) and "no usable image" in str(error)
    else: assert why in catalog.problems["problem"].str.cat(sep="; ") and "a.png" in catalog.images["image"].tolist()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text,why", [("[1, 2]", "lacks the list 'images'"), ('{"images": 3}', "lacks the list 'images'"), ('{"images": [], "annotations": []}', "lacks the list 'categories'"),
                                      ("{", "not valid JSON"), ("[" * 200_000, "nested too deep"), ("\udcff", "not valid JSON"),
                                      ('{"images": [], "annotations": [], "categories": []}', "no folder holds")])
def test_what_is_no_coco_is_one_sentence(tmp_path, text, why):
    (tmp_path/"x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises((ValueError, FileNotFoundError), match=why) as error: formats.read_coco(tmp_path)
    assert "\n" not in str(error.value)


def test_labels_alone_take_the_sizes_of_the_json(tmp_path):
    catalog = formats.read_coco(coco_folder(tmp_path, [mark()]), images=False)
    assert catalog.root is None and catalog.shape(0) == (48, 64) and catalog.problems["image"].tolist() == ["b.png"]


# ---- steel, VOC, bounds

def steel_folder(root, text, n=3):
    for i in range(n): picture(root/"train_images"/f"{i}.png", 32, 96)
    (root/"train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def test_both_forms_of_the_steel_table_mean_the_same(tmp_path):
    short = steel_folder(tmp_path/"short", "ImageId,ClassId,EncodedPixels\n0.png,1,1 3\n0.png,4,50 2 9 9\n2.png,3,7 1\n")
    rows = {("0", 1): "1 3", ("0", 4): "50 2 9 9", ("2", 3): "7 1"}
    text = "".join(f"{i}.png_{k},{rows.get((str(i), k), '')}\n" for i in range(3) for k in range(1, 5))
    long = steel_folder(tmp_path/"long", "ImageId_ClassId,EncodedPixels\n" + text)
    a, b = formats.read(short), formats.read(long)
    assert a.fingerprint() == b.fingerprint() and a.counts.tolist() == [2, 0, 1] and a.shape(0) == (32, 96)
    assert a.objects["label"].tolist() == ["defect_1", "defect_4", "defect_3"]
    formats.to_severstal_csv(a, tmp_path/"s.csv")
    table = pd.read_csv(tmp_path/"s.csv", dtype=str, keep_default_na=False)
    assert len(table) == 12 and table["EncodedPixels"].tolist()[3] == "9 9 50 2" and (table["EncodedPixels"] != "").sum() == 3


def test_steel_labels_alone_have_the_size_of_the_challenge(tmp_path):
    (tmp_path/"train.csv").write_text("ImageId,ClassId,EncodedPixels\na.jpg,3,409600 1\nb.jpg,3,409600 2\n")
    catalog = formats.read_severstal(tmp_path, images=False)
    assert catalog.shape(0) == (256, 1600) and catalog.objects[BOX].values.tolist() == [[1599, 255, 1600, 256]]
    assert "beyond the last pixel" in catalog.problems["problem"].item()


def test_steel_masks_of_our_own_in_all_four_classes(tmp_path):
    random, rows, masks = np.random.default_rng(3), [], {}
    for i in range(4):
        for k in range(1, 5):
            mask = random.random((32, 96)) > 0.97
            masks[f"{i}.png", f"defect_{k}"] = mask
            rows.append(f"{i}.png,{k},{rle_encode(mask)}")
    catalog = formats.read_severstal(steel_folder(tmp_path, "ImageId,ClassId,EncodedPixels\n" + "\n".join(rows), 4))
    assert catalog.counts.tolist() == [4] * 4
    for o in catalog.objects.itertuples(): assert (rle_decode(o.rle, (32, 96)) == masks[o.image, o.label]).all()


def voc(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{text}</annotation>")


def voc_object(x0, y0, x1, y1, label="ship"):
    return f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"


@given(st.integers(0, 60), st.integers(0, 44), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_voc_boxes_count_from_one_and_include_the_last_pixel(tmp_path_factory, x, y, width, height):
    """Paint an object, say its first and last pixel counted from 1 as VOC does, and read the box: it holds the painted pixels and no other."""
    root = tmp_path_factory.mktemp("voc")
    picture(root/"a.png")
    mask = np.zeros((48, 64), bool)
    mask[y:y + height, x:x + width] = True
    rows, columns = np.nonzero(mask)
    voc(root/"a.xml", voc_object(columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1))
    x0, y0, x1, y1 = formats.read_voc(root).objects[BOX].iloc[0]
    assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)


def test_masati_folders_become_the_category_column(tmp_path):
    for name in ("coast/1.png", "sea/1.png", "ship/1.png", "multi/1.png", "coast_ship/1.png", "detail/1.png", "ship/2.png"): picture(tmp_path/name)
    for k, name in enumerate(("ship", "multi", "coast_ship", "detail"), 1): voc(tmp_path/f"{name}_labels"/"1.xml", voc_object(1, 1, 9, 9) * k)
    with pytest.warns(UserWarning, match="1 images of .* have no XML file"): catalog = formats.read(tmp_path)
    assert catalog.images.set_index("category")["count"].to_dict() == {"coast": 0, "coast_ship": 3, "detail": 4, "multi": 2, "sea": 0, "ship": 1}
    assert catalog.subset([3]).images["category"].tolist() == ["multi"] and len(catalog.check()) == 0
    same_in_coco(catalog, tmp_path/"out.json")


def test_voc_writes_what_it_reads(tmp_path):
    for name in ("ship/1.png", "sea/2.png"): picture(tmp_path/name)
    voc(tmp_path/"ship"/"1.xml", voc_object(1, 1, 64, 48) + voc_object(5.5, 6, 7, 8, "tug &amp; barge"))
    first = formats.read_voc(tmp_path)
    formats.to_voc(first, tmp_path)
    pd.testing.assert_frame_equal(formats.read_voc(tmp_path).objects, first.objects)


BOMB = '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol">' + "".join(f'<!ENTITY lol{i} "{f"&lol{i - 1 if i > 1 else str()};" * 10}">' for i in range(1, 10)) + "]>"
OUTSIDE = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("head,label", [(BOMB, "&lol9;"), (OUTSIDE, "&x;"), ('<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd">', "ship")])
def test_xml_bombs_are_refused_before_they_expand(tmp_path, head, label):
    for name in ("a", "b"): picture(tmp_path/f"{name}.png")
    (tmp_path/"a.xml").write_text(f"{head}<annotation>{voc_object(1, 1, 5, 5, label)}</annotation>")
    voc(tmp_path/"b.xml", voc_object(1, 1, 5, 5))
    tracemalloc.start()
    start = time.perf_counter()
    catalog = formats.read_voc(tmp_path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5 and peak < 20e6
    assert catalog.images["image"].tolist() == ["b.png"] and "DOCTYPE" in catalog.problems["problem"].item()


@pytest.mark.parametrize("text,why", [("<a", "not a readable XML"), ("", "not a readable XML"), ("<annotation>" * 100_000, "not a readable XML"), ("<a>\0</a>", "not a readable XML"),
                                      (f"<annotation>{voc_object(1, 1, 'nan', 4)}</annotation>", "holds nothing"), (f"<annotation>{voc_object(9, 9, 3, 3)}</annotation>", "holds nothing"),
                                      (f"<annotation>{voc_object(1e308, 1, 1e309, 9)}</annotation>", "holds nothing"), ("<annotation><object/></annotation>", "has no bndbox"),
                                      ("<annotation><size><width>9</width><height>9</height></size></annotation>", "says (9, 9)"),
                                      ("<annotation><size><width>inf</width><height>9</height></size></annotation>", "infinity"),
                                      ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "not a readable XML")])
def test_a_bad_xml_quarantines_its_image(tmp_path, text, why):
    for name in ("a", "b"): picture(tmp_path/f"{name}.png")
    (tmp_path/"a.xml").write_text(text)
    voc(tmp_path/"b.xml", voc_object(1, 1, 5, 5))
    catalog = formats.read_voc(tmp_path)
    assert catalog.images["image"].tolist() == ["b.png"] and catalog.problems[["image", "action"]].values.tolist() == [["a.png", "quarantined"]]
    assert why in catalog.problems["problem"].item() and str(tmp_path) not in catalog.problems["problem"].item()


def test_an_xml_that_names_a_file_outside_is_not_followed(tmp_path):
    picture(tmp_path/"in"/"b.png")
    picture(tmp_path/"out.png")
    voc(tmp_path/"in"/"b.xml", voc_object(1, 1, 5, 5))
    voc(tmp_path/"in"/"x.xml", "<filename>../out.png</filename>" + voc_object(1, 1, 5, 5))
    catalog = formats.read_voc(tmp_path/"in")
    assert catalog.images["image"].tolist() == ["b.png"] and "no image has the name 'x' or 'out.png'" in catalog.problems["problem"].item()


@pytest.mark.parametrize("bounds,why", [("(1, 2, 3)", "not (x0, y0, x1, y1)"), ("(1, 2, 3, x)", "not (x0"), ("(9, 9, 3, 3)", "holds nothing"), ("__import__('os')", "not (x0"),
                                        ("(1, 2, 99999999999999999999, 4)", "not (x0"), ("(500, 500, 600, 600)", "holds nothing"), ("(nan, 1, 2, 3)", "not (x0")])
def test_bad_bounds_name_their_row(tmp_path, bounds, why):
    for name in "ab": picture(tmp_path/f"{name}.png")
    pd.DataFrame([("a", "tank", bounds), ("b", "tank", "[1, 2, 3.5, 4]")], columns=["image_id", "class", "bounds"]).to_csv(tmp_path/"annotations.csv", index=False)
    catalog = formats.read(tmp_path)
    assert catalog.images["image"].tolist() == ["b.png"] and catalog.objects[BOX].values.tolist() == [[1, 2, 3.5, 4]]
    assert why in catalog.problems["problem"].item() and catalog.problems["problem"].item().startswith("row 2: ")


# ---- masks

def test_masks_of_every_kind(tmp_path):
    plane = np.zeros((40, 50), np.uint8)
    plane[2:6, 3:30], plane[20, 20], plane[30:35, 0:5] = 1, 1, 2
    for k in range(5): picture(tmp_path/"images"/f"{k}.png", 40, 50)
    (tmp_path/"masks").mkdir()
    cv2.imwrite(str(tmp_path/"masks"/"0.png"), plane)
    cv2.imwrite(str(tmp_path/"masks"/"1_mask.tif"), plane)
    cv2.imwrite(str(tmp_path/"masks"/"2.png"), np.repeat(plane[..., None], 3, axis=2))
    savemat(tmp_path/"masks"/"3.mat", {"labels": plane}, do_compression=True)
    savemat(tmp_path/"masks"/"4.mat", {"groundTruth": {"Segmentation": plane, "Boundaries": plane}})
    catalog = formats.read(tmp_path, classes={1: "crack", 2: "joint"})
    assert catalog.counts.tolist() == [3] * 5 and catalog.objects["label"].tolist() == ["crack", "crack", "joint"] * 5
    assert catalog.objects["area"].tolist() == [108, 1, 25] * 5 and catalog.objects[BOX].values.tolist()[2] == [0, 30, 5, 35]
    assert formats.read(tmp_path).objects["label"].tolist() == ["object"] * 15
    assert formats.read(tmp_path, classes={1: "crack", 2: "joint"}, objects="class").counts.tolist() == [2] * 5
    assert formats.read(tmp_path, objects="values").objects["area"].tolist() == [109, 25] * 5
    assert set(formats.read(tmp_path, classes={1: "crack"}).problems["action"]) == {"taken as background"}
    same_in_coco(catalog, tmp_path/"out.json")
    classes = formats.to_masks(catalog, tmp_path/"again")
    assert formats.read_masks(tmp_path, masks=tmp_path/"again", classes=classes).fingerprint() == catalog.fingerprint()


@pytest.mark.parametrize("data,why", [(b"", "MATLAB"), (b"MATLAB 7.3" + b" " * 116 + b"\0\2IM" + b"\x0e\0\0\0\xff\xff\xff\x7f", "MATLAB"), (b"x" * 300, "MATLAB"),
                                      (bytes(126) + b"IM" + b"\x0f\0\0\0\x40\0\0\0" + b"damaged" * 9, "MATLAB")])
def test_a_bad_matlab_file_quarantines_its_image(tmp_path, data, why):
    for k in range(2): picture(tmp_path/"images"/f"{k}.png")
    (tmp_path/"masks").mkdir()
    (tmp_path/"masks"/"0.mat").write_bytes(data)
    savemat(tmp_path/"masks"/"1.mat", {"a": np.ones((48, 64), np.uint8)})
    catalog = formats.read_masks(tmp_path)
    assert catalog.images["image"].tolist() == ["1.png"] and why in catalog.problems["problem"].item()


def test_a_matlab_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_MAT", 2**20)
    packed = zlib.compress(bytes(200 * 2**20), 1)
    (tmp_path/"bomb.mat").write_bytes(b" " * 124 + b"\0\1IM" + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed)
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more than 1048576 bytes when unpacked"): formats.read_mask(tmp_path/"bomb.mat")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def png_header(height, width):
    """The start of a PNG of a size, with next to no pixels."""
    def chunk(kind, data): return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_giant_png_is_refused_from_its_header_by_every_reader(tmp_path):
    giant = png_header(60000, 60000)
    (tmp_path/"train_v2").mkdir()
    for folder in ("train_v2", "steel/train_images", "voc", "coco", "spot", "chips/ship", "named", "m/images"):
        picture(tmp_path/folder/"ok.0.1.png", 32, 32)
        (tmp_path/folder/"giant.0.1.png").write_bytes(giant)
    (tmp_path/CSV).write_text("ImageId,EncodedPixels\nok.0.1.png,\ngiant.0.1.png,\n")
    (tmp_path/"steel"/"train.csv").write_text("ImageId,ClassId,EncodedPixels\nok.0.1.png,1,1 1\ngiant.0.1.png,1,1 1\n")
    for name in ("ok", "giant"): voc(tmp_path/"voc"/f"{name}.0.1.xml", voc_object(1, 1, 5, 5))
    images = [{"id": k, "file_name": f"{o}.0.1.png"} for k, o in enumerate(("ok", "giant"))]
    (tmp_path/"coco"/"x.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    (tmp_path/"spot"/"annotations.csv").write_text('image_id,class,bounds\nok.0.1,a,"1,1,5,5"\ngiant.0.1,a,"1,1,5,5"\n')
    for name in ("ok", "giant"): cv2.imwrite(str(picture(tmp_path/"m"/"masks"/f"{name}.0.1.png")), np.ones((32, 32), np.uint8))
    tracemalloc.start()
    for folder in (".", "steel", "voc", "coco", "spot", "chips", "named", "m"):
        catalog = formats.read(tmp_path/folder, "airbus") if folder == "." else formats.read(tmp_path/folder)
        assert len(catalog) == 1 and catalog.problems["problem"].item() == "60000 x 60000 pixels are too many for training; cut it into windows"
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_giant_mask_is_refused_from_its_header(tmp_path):
    for k in range(2): picture(tmp_path/"images"/f"{k}.png")
    (tmp_path/"masks").mkdir()
    (tmp_path/"masks"/"0.png").write_bytes(png_header(60000, 60000))
    cv2.imwrite(str(tmp_path/"masks"/"1.png"), np.ones((48, 64), np.uint8))
    assert "the mask is (60000, 60000)" in formats.read(tmp_path).problems["problem"].item()


# ---- folders, names, mixed sizes

def test_folders_are_classes_and_splits(tmp_path):
    for name in ("train/ship/a.png", "train/no-ship/b.png", "valid/ship/c.png", "test/d.png"): picture(tmp_path/name)
    catalog = formats.read(tmp_path)
    assert catalog.images[["category", "split", "count"]].values.tolist() == [["", "test", 0], ["no-ship", "train", 0], ["ship", "train", 1], ["ship", "valid", 1]]
    assert formats.read_folders(tmp_path, empty=()).counts.sum() == 3


def test_overlap_and_label_in_the_name(tmp_path):
    for name in ("a.x.0_73.1.png", "a.x.0_499.0.png", "a.x.1_0.1.png", "a.x.0.0.png"): picture(tmp_path/name)
    catalog = formats.read(tmp_path)
    assert dict(zip(catalog.images["image"], catalog.images["iou"])) == {"a.x.0.0.png": 0, "a.x.0_499.0.png": 0.499, "a.x.0_73.1.png": 0.73, "a.x.1_0.1.png": 1}
    assert catalog.counts.tolist() == [0, 0, 1, 1]
    for name in ("a.x.1_5.1.png", "a.x.0_7.one.png", "plain.png"): picture(tmp_path/name)
    assert len(formats.read_named(tmp_path).problems) == 3


def test_images_of_many_sizes_in_one_catalog(tmp_path):
    sizes = [(16, 400), (400, 16), (33, 77), (512, 512)]
    for k, (h, w) in enumerate(sizes): picture(tmp_path/"ship"/f"{k}.png", h, w)
    catalog = formats.read(tmp_path)
    assert [catalog.shape(i) for i in range(4)] == sizes and catalog.objects[["x1", "y1"]].values.tolist() == [[w, h] for h, w in sizes]
    assert [o["height"] for o in same_in_coco(catalog, tmp_path/"x.json").imgs.values()] == [16, 400, 33, 512]
    assert formats.fill_boxes(catalog).objects["area"].tolist() == [h * w for h, w in sizes]


# ---- the Catalog's own forms

def all_kinds(root):
    """A Catalog with a group, a split, masks and bare boxes, fractions, and more columns."""
    coco_folder(root, [mark(), mark(id=2, image_id=2, segmentation=[[1, 1, 9, 1, 9, 9]])])
    catalog = formats.read_coco(root)
    catalog.images["group"], catalog.images["split"], catalog.images["detail"] = ["s", "t"], ["train", "valid"], [True, False]
    catalog.objects["score"] = [0.5, np.nan]
    return catalog


def test_save_and_load_keep_everything(tmp_path):
    catalog = all_kinds(tmp_path)
    catalog.save(tmp_path/"saved")
    for loaded in (Catalog.load(tmp_path/"saved"), formats.read(tmp_path/"saved")):
        for name in ("images", "objects", "problems"): pd.testing.assert_frame_equal(getattr(loaded, name), getattr(catalog, name))
        assert loaded.root == catalog.root and loaded.fingerprint() == catalog.fingerprint()
    part = catalog.subset([1])
    part.save(tmp_path/"saved")
    assert Catalog.load(tmp_path/"saved").images["detail"].tolist() == [False]
    assert Catalog.load(tmp_path/"saved", root=False).root is None


def test_a_catalog_without_objects_is_saved_too(tmp_path):
    catalog = formats.read_coco(coco_folder(tmp_path, []))
    catalog.save(tmp_path/"saved")
    loaded = Catalog.load(tmp_path/"saved")
    assert len(loaded) == 2 and len(loaded.objects) == 0 and loaded.fingerprint() == catalog.fingerprint()
    assert len(same_in_coco(loaded, tmp_path/"x.json").anns) == 0


def test_damaged_and_mixed_saves_are_refused(tmp_path):
    catalog = all_kinds(tmp_path)
    catalog.save(tmp_path/"saved")
    with pytest.raises(FileNotFoundError, match="say where with root="): Catalog.load(tmp_path/"saved", root=tmp_path/"moved")
    card = (tmp_path/"saved"/"catalog.json").read_text()
    (tmp_path/"saved"/"objects.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged or of another save"): Catalog.load(tmp_path/"saved")
    (tmp_path/"saved"/"catalog.json").write_text(card.replace('"shipnb_catalog": 1', '"shipnb_catalog": 9'))
    with pytest.raises(ValueError, match="this version"): Catalog.load(tmp_path/"saved")
    catalog.images["mixed"] = [1, "b"]
    with pytest.raises(ValueError, match="a column of images cannot be written"): catalog.save(tmp_path/"other")


def test_boxes_count_in_the_fingerprint(tmp_path):
    catalog = formats.read_coco(coco_folder(tmp_path, [mark()]))
    moved = formats.read_coco(coco_folder(tmp_path, [mark(bbox=[2, 2, 3.5, 4])]))
    assert catalog.fingerprint() != moved.fingerprint()


def test_writers_need_masks_where_the_format_does(tmp_path):
    catalog = formats.read_coco(coco_folder(tmp_path, [mark()]))
    for write in (catalog.to_airbus_csv, lambda o: formats.to_severstal_csv(catalog, o), lambda o: formats.to_masks(catalog, o)):
        with pytest.raises(ValueError, match="1 objects have only a box .* fill_boxes"): write(tmp_path/"x")
    formats.fill_boxes(catalog).to_airbus_csv(tmp_path/"labels.csv")
    assert len(read_airbus(tmp_path, tmp_path/"labels.csv", tmp_path).objects) == 1


def test_writers_stay_inside_their_folder(tmp_path):
    catalog = all_kinds(tmp_path/"in")
    catalog = formats.fill_boxes(catalog)
    catalog.images["image"] = ["../a.png", "b.png"]
    catalog.objects["image"] = ["../a.png", "b.png"]
    before = tree(tmp_path)
    for write in (formats.to_voc, formats.to_masks):
        with pytest.raises(ValueError, match="outside its folder"): write(catalog, tmp_path/"in"/"target")
    assert tree(tmp_path) == before


# ---- hostile tables

def test_bom_and_windows_line_ends(tmp_path):
    steel_folder(tmp_path, b"\xef\xbb\xbfImageId,ClassId,EncodedPixels\r\n0.png,1,1 3\r\n2.png,3,7 1\r\n")
    assert formats.read(tmp_path).counts.tolist() == [1, 0, 1]


def test_quotes_and_commas_in_names(tmp_path):
    names = ['a,b.png', 'say "ship".png', "semi;colon.png", "blank in name.png", "ünïcode.png"]
    for name in names: picture(tmp_path/"train_v2"/name)
    pd.DataFrame([(o, "1 3") for o in names], columns=["ImageId", "EncodedPixels"]).to_csv(tmp_path/CSV, index=False)
    catalog = formats.read(tmp_path)
    assert sorted(names) == catalog.images["image"].tolist() and len(catalog.problems) == 0
    catalog.to_airbus_csv(tmp_path/"again.csv")
    assert read_airbus(tmp_path, tmp_path/"again.csv").fingerprint() == catalog.fingerprint()
    same_in_coco(catalog, tmp_path/"x.json")


@pytest.mark.parametrize("name", ["../evil.png", "/etc/passwd", "..\\evil.png", "C:\\evil.png", "a\0.png", "a/../../b.png"])
def test_names_that_leave_the_folder_are_quarantined_by_every_table(tmp_path, name):
    for folder in ("train_images", "train_v2"): picture(tmp_path/folder/"ok.png")
    picture(tmp_path/"ok.png")
    pd.DataFrame([("ok.png", "1", "1 1"), (name, "1", "1 1")], columns=["ImageId", "ClassId", "EncodedPixels"]).to_csv(tmp_path/"train.csv", index=False)
    pd.DataFrame([("ok.png", "1 1"), (name, "1 1")], columns=["ImageId", "EncodedPixels"]).to_csv(tmp_path/CSV, index=False)
    pd.DataFrame([("ok", "a", "1,1,5,5"), (name, "a", "1,1,5,5")], columns=["image_id", "class", "bounds"]).to_csv(tmp_path/"annotations.csv", index=False)
    before = tree(tmp_path)
    for reader in (formats.read_severstal, read_airbus, lambda o: formats.read_bounds(o, images=o/"train_v2")):
        catalog = reader(tmp_path)
        assert catalog.images["image"].tolist() == ["ok.png"] and catalog.problems["action"].tolist() == ["quarantined"]
    assert tree(tmp_path) == before


def test_nul_bytes_in_a_table_are_a_report_or_an_error(tmp_path):
    steel_folder(tmp_path, b"ImageId,ClassId,EncodedPixels\n0.png,1,1 3\n\0\0\0,1,5 5\n2.png,\0,7 1\n1.png,1,1 \0 5\n")
    try: catalog = formats.read(tmp_path)
    except ValueError as error: assert "train.csv" in str(error)
    else: assert catalog.images["image"].tolist()[0] == "0.png" and len(catalog.problems) >= 2


def test_a_run_of_a_million_million_costs_nothing(tmp_path):
    steel_folder(tmp_path, "ImageId,ClassId,EncodedPixels\n0.png,1,1 1000000000000\n1.png,1,1 999999999999999999999999\n2.png,1,1 1\n")
    tracemalloc.start()
    catalog = formats.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert catalog.images["image"].tolist() == ["2.png"] and len(catalog.problems) == 2


def damaged_rows(n, seed=0):
    """A CSV of n rows, one in ten damaged in one of a dozen ways; codes and names are repeated from a few thousand."""
    random = np.random.default_rng(seed)
    codes = np.array([f"{a} {b}" for a, b in zip(random.integers(1, 500_000, 5000), random.integers(1, 60, 5000))] + [""] * 5000)[random.integers(0, 10000, n)]
    names = np.array([f"{k:08x}.jpg" for k in range(n)])
    bad = np.flatnonzero(random.random(n) < 0.1)
    wrong_codes = np.array(["1", "0 5", "-3 4", "1 1000000000000", "x y", "5 3 6 3", "1 2 3", "1e3 5", "9" * 40 + " 1", "1\t2", "١ ٢"])
    wrong_names = np.array(["../x.jpg", "/etc/passwd", "", " ", "C:\\x.jpg", "a\0b.jpg", "x" * 5000, '"a,b".jpg'])
    half = bad[:len(bad) // 2]
    codes, names = codes.astype(object), names.astype(object)
    codes[half] = wrong_codes[random.integers(0, len(wrong_codes), len(half))]
    rest = bad[len(half):]
    names[rest] = wrong_names[random.integers(0, len(wrong_names) - 2, len(rest))]
    names[rest[:20]] = wrong_names[-2:].tolist() * 10
    return pd.DataFrame({"ImageId": names, "EncodedPixels": codes})


def test_a_million_damaged_rows_are_a_report_in_bounded_time_and_memory(tmp_path):
    table = damaged_rows(1_000_000)
    table.to_csv(tmp_path/"labels.csv", index=False)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    catalog = read_airbus(tmp_path, tmp_path/"labels.csv", images=False)
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert seconds < 40 and grown < 2e6                              # 10 s of processor time when nothing else runs; kB
    assert len(catalog) > 850_000 and len(catalog) + catalog.problems["image"].nunique() >= 900_000
    assert {"../x.jpg", "/etc/passwd", "C:\\x.jpg"} <= set(catalog.problems["image"]) and not catalog.images["image"].str.contains("/", regex=False).any()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_bytes_in_a_table_never_escape(tmp_path_factory, data):
    """Bytes of a good CSV are replaced at random: the answer is a Catalog or a ValueError of one line."""
    root = tmp_path_factory.mktemp("fuzz")
    text = bytearray(b"ImageId,ClassId,EncodedPixels\n0.png,1,1 3\n1.png,2,30 4 50 6\n2.png,3,7 1\n")
    byte = st.one_of(st.integers(0, 255), st.sampled_from(list(b',"\n\r\0 19')))
    for _ in range(data.draw(st.integers(1, 8))): text[data.draw(st.integers(0, len(text) - 1))] = data.draw(byte)
    steel_folder(root, bytes(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: catalog = formats.read_severstal(root)
        except ValueError as error: assert "\n" not in str(error) and ("train.csv" in str(error) or "no usable" in str(error))
        else: assert set(catalog.images["image"]) <= {"0.png", "1.png", "2.png"}


@pytest.mark.parametrize("rows,why", [("0.png,1,1 3,\n", "more fields than its header"), ("0.png,1,1 3,9 9\n", "more fields"), ("0.png,1,1 3\n1.png,2,3 4,5\n", "Expected 3 fields in line 3, saw 4")])
def test_rows_of_another_length_are_an_error_that_says_where(tmp_path, rows, why):
    with pytest.raises(ValueError, match=why): formats.read(steel_folder(tmp_path, "ImageId,ClassId,EncodedPixels\n" + rows))


def test_a_table_of_which_no_row_is_usable_is_one_sentence(tmp_path):
    for text in ("ImageId,ClassId,EncodedPixels\n0.png,9,1 3\n", "EncodedPixels,ImageId_ClassId\n1 3,nonsense\n", 'ImageId_ClassId,EncodedPixels\n"line\nbreak.png_1",1 3\n'):
        (tmp_path/"s"/"train_images").mkdir(parents=True, exist_ok=True)
        steel_folder(tmp_path/"s", text, n=0)
        with pytest.raises(ValueError, match="no usable image is left") as error: formats.read(tmp_path/"s")
        assert "\n" not in str(error.value)
    (tmp_path/CSV).write_text("EncodedPixels,ImageId\n1 3,../x.png\n")
    (tmp_path/"train_v2").mkdir()
    with pytest.raises(ValueError, match="no usable image is left"): read_airbus(tmp_path)


# ---- which format

def test_the_format_is_told_or_asked_for(tmp_path):
    picture(tmp_path/"a.png")
    with pytest.raises(ValueError, match=r"cannot be told \(1 images.*say it with format=") as error: formats.read(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unknown format 'yolo'; known are auto, airbus"): formats.read(tmp_path, "yolo")
    with pytest.raises(FileNotFoundError, match="no such folder"): formats.read(tmp_path/"nowhere")
    (tmp_path/"annotations.csv").write_text('image_id,class,bounds\na,tank,"(1,1,5,5)"\n')
    assert len(formats.read(tmp_path).objects) == 1
    (tmp_path/"x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several formats \(bounds, coco\); say which"): formats.read(tmp_path)
    assert len(formats.read(tmp_path, "bounds").objects) == 1


# ---- real folders, counts only

def test_real_airbus(real_data, tmp_path):
    catalog = formats.read(real_data/"airbus")
    assert (len(catalog), int((catalog.counts > 0).sum()), len(catalog.check())) == (163, 109, 0)
    catalog.to_airbus_csv(tmp_path/"x.csv")
    assert read_airbus(real_data/"airbus", tmp_path/"x.csv").fingerprint() == catalog.fingerprint()
    same_in_coco(catalog, tmp_path/"x.json")


def test_real_steel(real_data, tmp_path):
    catalog = formats.read(real_data/"severstal")
    assert catalog.images["category"].value_counts().to_dict() == {"": 30, "no_defect": 20, "defect_1": 20, "defect_2": 20, "defect_3": 20, "defect_4": 20}
    assert set(zip(catalog.images["height"], catalog.images["width"])) == {(256, 1600)} and len(catalog.check()) == 0
    assert (catalog.images["split"] == "test").sum() == 30 and len(catalog.objects) == 80
    same_in_coco(catalog, tmp_path/"x.json")


def test_real_cracks(real_data, tmp_path):
    with pytest.warns(UserWarning, match="37 images"): catalog = formats.read(real_data/"crackforest")
    assert len(catalog) == 118 and set(catalog.check()["action"]) == {"taken as background"} and len(catalog.problems) == 22
    areas = {o.stem: int((loadmat(o)["groundTruth"][0, 0]["Segmentation"] == 2).sum()) for o in (real_data/"crackforest"/"groundTruth").glob("*.mat")}
    assert catalog.objects.groupby("image")["area"].sum().to_dict() == {f"{k}.jpg": v for k, v in areas.items()}
    for i in range(0, 118, 30):
        mask = loadmat(real_data/"crackforest"/"groundTruth"/catalog.path(i).with_suffix(".mat").name)["groundTruth"][0, 0]["Segmentation"] == 2
        assert label_instances(mask)[1] == catalog.counts[i]
    same_in_coco(catalog, tmp_path/"x.json")


def test_real_tanks(real_data, tmp_path):
    catalog = formats.read(real_data/"oil_tanks")
    assert catalog.images["split"].value_counts().to_dict() == {"train": 550, "validation": 131}
    assert catalog.subset(catalog.images["split"] == "train").counts.astype(bool).sum() == 450 and len(catalog.objects) == 1618 + 129
    problems = catalog.check()
    assert set(problems["action"]) == {"box cut"} and len(problems) == 95
    for o in problems["problem"]: assert max(max(-v, v - 512) for v in map(float, re.search(r"\((.*)\)", o)[1].split(","))) <= 2
    same_in_coco(catalog, tmp_path/"x.json")


def test_real_spot(real_data, tmp_path):
    catalog = formats.read(real_data/"oil_airbus_spot")
    assert (len(catalog), len(catalog.objects), len(catalog.check())) == (5, 805, 0) and catalog.counts.min() > 90
    assert set(zip(catalog.images["height"], catalog.images["width"])) == {(2560, 2560)} and set(catalog.objects["label"]) == {"oil-storage-tank"}
    same_in_coco(catalog, tmp_path/"x.json")


def test_real_voc(real_data, tmp_path):
    catalog = formats.read(real_data/"ships_voc")
    assert (len(catalog), int((catalog.counts > 0).sum()), len(catalog.objects)) == (120, 120, 320)
    assert catalog.check()["action"].tolist() == ["box cut"]         # one box of this set counts from 0
    assert len(set(zip(catalog.images["height"], catalog.images["width"]))) > 10
    same_in_coco(catalog, tmp_path/"x.json")


def test_real_chips(real_data, tmp_path):
    catalog = formats.read(real_data/"shipsnet_chips")
    assert catalog.images.groupby(["split", "category"]).size().to_dict() == {("train", "no-ship"): 71, ("train", "ship"): 38, ("valid", "no-ship"): 300, ("valid", "ship"): 100}
    assert len(catalog) == 509 and len(catalog.check()) == 0 and set(zip(catalog.images["height"], catalog.images["width"])) == {(80, 80)}
    same_in_coco(catalog, tmp_path/"x.json")


def test_the_full_size_of_the_airbus_table(real_data, tmp_path):
    """231,723 rows, as many as the challenge's table, made of the partial one under new names."""
    part = pd.read_csv(real_data/"airbus"/"labels"/"train_ship_segmentations_v2_partial.csv.gz", dtype=str, keep_default_na=False)
    ships = part[part["EncodedPixels"] != ""]
    more = pd.concat([ships.assign(ImageId=f"{k}_" + ships["ImageId"]) for k in range(2)])[:231_723 - len(part)]
    pd.concat([part, more]).to_csv(tmp_path/"labels.csv", index=False)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    catalog = read_airbus(tmp_path, tmp_path/"labels.csv", images=False)
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert seconds < 5 and grown < 1e6                               # 2 to 3 s of processor time; kB
    assert len(catalog.objects) == len(ships) + len(more) and len(catalog.problems) == 0
