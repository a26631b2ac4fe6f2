"""The Catalog on good, bad and hostile folders, and on the real images when they are at hand."""
import cv2
import numpy as np
import pandas as pd
import pytest

from shipnb.catalog import image_size, read_airbus, read_image
from shipnb.masks import rle_decode, rle_encode

CSV = "train_ship_segmentations_v2.csv"


def write(root, rows, files=None, size=64):
    """A folder in the Airbus layout: rows of (name, code), files (name -> bytes or None for a real JPEG)."""
    (root/"train_v2").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"]).to_csv(root/CSV, index=False)
    jpeg = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8))[1].tobytes()
    for name, data in (files or {}).items(): (root/"train_v2"/name).write_bytes(jpeg if data is None else data)
    return root, jpeg


def test_rows_are_grouped_and_counted(tmp_path):
    root, _ = write(tmp_path, [("b.jpg", "1 2"), ("a.jpg", ""), ("b.jpg", "100 5")], {"a.jpg": None, "b.jpg": None})
    catalog = read_airbus(root)
    assert catalog.images["image"].tolist() == ["a.jpg", "b.jpg"]
    assert catalog.counts.tolist() == [0, 2]
    assert catalog.rles(1) == ["1 2", "100 5"] and catalog.rles(0) == []
    assert catalog.shape(0) == (64, 64) and catalog.images["bytes"].gt(0).all()
    assert catalog.objects[["x0", "y0", "x1", "y1", "area"]].values.tolist() == [[0, 0, 1, 2, 2], [1, 35, 2, 40, 5]]


def test_the_codes_of_an_image_do_not_cost_a_pass_over_all(tmp_path, monkeypatch):
    """A column of text is converted whole by pandas; asked for per image, that made exploring the complete label tables quadratic."""
    catalog = read_airbus(write(tmp_path, [("b.jpg", "1 2"), ("a.jpg", "")], {"a.jpg": None, "b.jpg": None})[0])
    def refuse(*args, **kwargs): raise AssertionError("a whole column is converted")
    for name in ("to_numpy", "tolist", "__array__"): monkeypatch.setattr(pd.Series, name, refuse)
    assert catalog.rles(1) == ["1 2"] and catalog.rles(0) == []


def test_all_zero_codes_stay_text(tmp_path):
    root, _ = write(tmp_path, [("a.jpg", "0"), ("b.jpg", "0")], {"a.jpg": None, "b.jpg": None})
    assert read_airbus(root).counts.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/passwd", "a/b.jpg", "..\\x.jpg", "C:\\x.jpg", " "])
def test_names_outside_the_folder_are_quarantined(tmp_path, name):
    root, _ = write(tmp_path, [("a.jpg", ""), (name, "")], {"a.jpg": None})
    problems = read_airbus(root).problems
    assert problems[["image", "action"]].values.tolist() == [[name, "quarantined"]]


@pytest.mark.parametrize("code,why", [("1 2 3", "odd count"), ("0 5", "first pixel"), ("4096 2", "beyond the last pixel"), ("1 3 2 3", "overlap"), ("x y", "whole number")])
def test_bad_codes_name_image_and_row(tmp_path, code, why):
    root, _ = write(tmp_path, [("a.jpg", ""), ("b.jpg", code)], {"a.jpg": None, "b.jpg": None})
    catalog = read_airbus(root)
    assert catalog.images["image"].tolist() == ["a.jpg"] and len(catalog.objects) == 0
    (image, problem, action), = catalog.problems.values.tolist()
    assert image == "b.jpg" and problem.startswith("row 3: ") and why in problem and action == "quarantined"


def test_duplicates_and_contradictions_are_reported(tmp_path):
    root, _ = write(tmp_path, [("a.jpg", "1 2"), ("a.jpg", "1 2"), ("a.jpg", ""), ("b.jpg", ""), ("b.jpg", "")], {"a.jpg": None, "b.jpg": None})
    catalog = read_airbus(root)
    assert catalog.counts.tolist() == [1, 0]
    assert sorted(catalog.problems["action"]) == ["copy dropped", "copy dropped", "empty row dropped"]


def test_bad_files_are_quarantined_and_the_rest_goes_on(tmp_path):
    root, jpeg = write(tmp_path, [(o, "") for o in ("good.jpg", "text.jpg", "torn.jpg", "tiny.jpg", "gone.jpg", "empty.jpg")], {"good.jpg": None})
    tiny = cv2.imencode(".jpg", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    for name, data in {"text.jpg": b"hello", "torn.jpg": jpeg[:-500], "tiny.jpg": tiny, "empty.jpg": b""}.items(): (root/"train_v2"/name).write_bytes(data)
    catalog = read_airbus(root)
    problems = catalog.check()
    assert catalog.images["image"].tolist() == ["good.jpg"]
    assert set(problems["image"]) == {"text.jpg", "torn.jpg", "tiny.jpg", "gone.jpg", "empty.jpg"} and set(problems["action"]) == {"quarantined"}
    assert problems.set_index("image")["problem"]["gone.jpg"] == "file is missing"


def test_a_giant_raster_is_refused_from_its_header(tmp_path):
    root, _ = write(tmp_path, [("good.jpg", ""), ("giant.png", "")], {"good.jpg": None})
    from PIL import Image
    Image.new("1", (20000, 20000)).save(root/"train_v2"/"giant.png")
    assert image_size(root/"train_v2"/"giant.png") == (20000, 20000)
    assert "cut it into windows" in read_airbus(root).problems["problem"].item()


def test_decoded_colours_are_rgb_and_grey_becomes_three(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 2] = 255                                    # OpenCV writes BGR
    cv2.imwrite(str(tmp_path/"red.png"), red)
    cv2.imwrite(str(tmp_path/"grey16.png"), np.full((32, 32), 40000, np.uint16))
    assert read_image(tmp_path/"red.png")[0, 0].tolist() == [255, 0, 0]
    assert read_image(tmp_path/"grey16.png").shape == (32, 32, 3)


def test_unlabelled_images_are_left_out_with_a_count(tmp_path):
    root, _ = write(tmp_path, [("a.jpg", "")], {"a.jpg": None, "b.jpg": None, "c.jpg": None})
    with pytest.warns(UserWarning, match="2 images in train_v2/ have no row"): assert len(read_airbus(root)) == 1


def test_the_cleaned_table_has_one_row_per_image(tmp_path):
    root, jpeg = write(tmp_path, [("b.jpg", "1 2"), ("a.jpg", ""), ("b.jpg", "100 5")], {"a.jpg": None, "b.jpg": None})
    catalog = read_airbus(root)
    catalog.to_csv(tmp_path/"clean.csv")
    table = pd.read_csv(tmp_path/"clean.csv", dtype=str)
    assert table.columns.tolist() == ["ImageId", "EncodedPixels", "Ships", "Size_kb"]
    assert table.values.tolist()[1][:3] == ["b.jpg", "1 2 100 5", "2"] and table["EncodedPixels"][0] == "0"
    assert float(table["Size_kb"][0]) == round(len(jpeg) / 1024, 3)


@pytest.mark.parametrize("content,why", [("", "not a readable CSV"), ("a,b\n1,2\n", "lacks the column ImageId"), ("ImageId,EncodedPixels\n", "no rows"),
                                         ("ImageId,EncodedPixels\ngone.jpg,\n", "no usable image"), ('ImageId,EncodedPixels\n"a.jpg,1\n', "CSV")])
def test_what_makes_the_job_impossible_is_one_sentence(tmp_path, content, why):
    (tmp_path/"train_v2").mkdir()
    (tmp_path/CSV).write_text(content)
    with pytest.raises(ValueError, match=why) as error: read_airbus(tmp_path)
    assert "\n" not in str(error.value)


def test_binary_as_csv_is_refused(tmp_path):
    (tmp_path/"train_v2").mkdir()
    (tmp_path/CSV).write_bytes(bytes(range(256)) * 8)
    with pytest.raises(ValueError): read_airbus(tmp_path)


@pytest.mark.parametrize("missing", ["root", "csv", "images"])
def test_missing_pieces(tmp_path, missing):
    if missing != "root": (tmp_path/"d").mkdir()
    if missing == "csv": (tmp_path/"d"/"train_v2").mkdir()
    if missing == "images": (tmp_path/"d"/CSV).write_text("ImageId,EncodedPixels\na.jpg,\n")
    with pytest.raises(FileNotFoundError, match="no such"): read_airbus(tmp_path/"d")


def test_subset_and_fingerprint(tmp_path):
    root, _ = write(tmp_path, [("a.jpg", "1 2"), ("b.jpg", ""), ("c.jpg", "9 1")], {"a.jpg": None, "b.jpg": None, "c.jpg": None})
    catalog = read_airbus(root)
    assert catalog.subset([2, 0]).images["image"].tolist() == ["c.jpg", "a.jpg"] and catalog.subset([2, 0]).rles(0) == ["9 1"]
    assert len(catalog.subset(catalog.counts > 0)) == 2
    assert catalog.fingerprint() == read_airbus(root).fingerprint() != catalog.subset([0, 1]).fingerprint()


def test_groups_come_from_a_scene_table(tmp_path):
    root, _ = write(tmp_path, [("a.jpg", ""), ("b.jpg", "")], {"a.jpg": None, "b.jpg": None})
    (root/"scenes.csv").write_text("ImageId,SceneId\na.jpg,7\n")
    assert read_airbus(root).images["group"].tolist() == ["7", ""]


def test_labels_alone(tmp_path):
    root, _ = write(tmp_path, [("a.jpg", "1 2"), ("b.jpg", "")])
    catalog = read_airbus(root, images=False)
    assert catalog.counts.tolist() == [1, 0] and len(catalog.check()) == 0
    with pytest.raises(ValueError, match="labels only"): catalog.path(0)


def test_real_images(real_data):
    catalog = read_airbus(real_data/"airbus")
    assert (len(catalog), int((catalog.counts > 0).sum()), len(catalog.check())) == (163, 109, 0)
    assert set(zip(catalog.images["height"], catalog.images["width"])) == {(768, 768)}
    for i in range(0, 163, 20):
        for rle in catalog.rles(i): assert rle_encode(rle_decode(rle)) == rle
