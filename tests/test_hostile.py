"""Every command on hostile input: one bad image costs only itself, what makes the job impossible ends it at once, and what stood before stays.

Real notebooks and real folders through `runs.main`. Only the kernel is left out, for it costs ten seconds a case: a notebook's module, its parameters
and its run are executed in this process instead (`tests/test_runs.py` has the kernels).
"""
import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from shipnb import files, fleet, runs
from shipnb.masks import encode_instances, label_instances
from shipnb.models import build_unet, save_model
from shipnb.thresholds import sigmoid

ROOT = Path(__file__).parents[1]
CSV = "train_ship_segmentations_v2.csv"


# --- the machine: disks that are full or cannot be written, for root too

def mounted(folder, options):
    """Whether a small memory disk could be mounted on `folder`."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def read_only():
    """A function that makes a folder read-only until the test ends: by a mount, by a file attribute, or by its mode where this process is not root."""
    with contextlib.ExitStack() as stack:
        def protect(folder):
            again = ["mount", "-o", "bind,ro", str(folder), str(folder)]
            if os.geteuid() != 0:
                folder.chmod(0o555)
                stack.callback(folder.chmod, 0o755)
            elif shutil.which("mount") and subprocess.run(again, capture_output=True).returncode == 0:
                stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            elif shutil.which("chattr") and subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode == 0:
                stack.callback(subprocess.run, ["chattr", "-i", str(folder)], check=True)
            else: pytest.skip("root may neither mount nor set attributes here: nothing is read-only")
            with pytest.raises(OSError): (folder/"probe").touch()
            return folder
        yield protect


@pytest.fixture
def full_disk(tmp_path):
    """A function that gives a folder on a disk of so many bytes, else of a limit on file sizes (the system's other way to refuse a write)."""
    with contextlib.ExitStack() as stack:
        def make(size, name="small"):
            folder = tmp_path/name
            folder.mkdir(exist_ok=True)
            if mounted(folder, f"size={size}"): stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            else:
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, limits[1]))
                stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            return folder
        yield make


# --- notebooks without kernels

def execute(nb, given, output, folder, name="notebook", echo=False):
    """Stands in for `runs.execute`: the notebook's module, its hidden imports, and everything from its parameters on."""
    node = nbformat.from_dict(runs.load_notebook(nb))
    for cell in node.cells: cell.source = runs.cell_source(cell)
    code = [i for i, o in enumerate(node.cells) if o.cell_type == "code" and not runs.NOT_RUN.search(o.source)]
    start = next(i for i in code if "parameters" in node.cells[i].metadata.get("tags", []))
    imports = [i for i in code if node.cells[i].source.startswith("#| hide") and i < 6]
    module = next((m[1] for o in node.cells if (m := re.match(r"#\|\s*default_exp\s+(\S+)", o.source))), None)
    names = dict(vars(importlib.import_module(f"shipnb.{module}")) if module else {}, display=lambda *shown: None)
    try:
        for index in imports + [i for i in code if i >= start]:
            exec(compile(node.cells[index].source, f"{name}, cell {index}", "exec"), names)
            if index == start: names.update(given)
    except Exception as error:
        said = types.SimpleNamespace(ename=type(error).__name__, evalue=str(error))
        raise runs._failure(node, index, said, name, output) from error
    finally: plt.close("all")
    files.atomic_write(output, json.dumps(node))
    return runs.environment()


# --- data, models, and what is asked of a command

def scene(ships, seed):
    """Dark noise with bright bars, 64 x 64."""
    rng = np.random.default_rng(seed)
    img = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)
    for k in range(ships): img[8 + 14 * k:13 + 14 * k, 6:6 + int(rng.integers(12, 40))] = 240
    return img


def jpeg(img): return cv2.imencode(".jpg", img)[1].tobytes()


def write_data(root, ships=(0, 1, 2), images=12, more=()):
    """A folder in the Airbus layout, the counts of `ships` in turn, with further files {name: bytes}."""
    (root/"train_v2").mkdir(parents=True)
    rows = [(name, "") for name in more]
    for k in range(images):
        img, name = scene(ships[k % len(ships)], k), f"{k:02d}.jpg"
        (root/"train_v2"/name).write_bytes(jpeg(img))
        rows += [(name, code) for code in encode_instances(label_instances(img.min(-1) > 200)[0]) or [""]]
    for name, data in dict(more).items(): (root/"train_v2"/name).write_bytes(data)
    pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"]).to_csv(root/CSV, index=False)
    return root


@pytest.fixture(scope="session")
def giant_png(tmp_path_factory):
    """A file of 20,000 x 20,000 pixels and few bytes: 1 bit each, dark with three bright squares."""
    path = tmp_path_factory.mktemp("giant")/"giant.png"
    img = Image.new("1", (20_000, 20_000))
    for x, y in ((100, 200), (19_000, 200), (10_000, 19_500)): img.paste(1, (x, y, x + 300, y + 300))
    img.save(path, compress_level=1)
    return path


@pytest.fixture(scope="session")
def bad_files(giant_png):
    """{name: bytes} of every kind of bad image."""
    whole = jpeg(scene(2, 99))
    return {"text.jpg": b"this is no image", "cut.jpg": whole[:len(whole) // 2], "empty.jpg": b"",
            "pixel.jpg": jpeg(np.zeros((1, 1, 3), np.uint8)), "giant.png": giant_png.read_bytes()}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with the weights of an untrained U-Net, and its card."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")/"model"
    point = dict(logit=0.0, threshold=float(sigmoid(0)), min_area=4, grid=[64, 64], objective="dice")
    save_model(folder, build_unet("resnet18"), dict(architecture="unet", encoder="resnet18", classes=1, in_channels=3, size=[32, 32],
                                                    window=[64, 64], operating_point=point, data=dict(valid=[f"{k:02d}.jpg" for k in range(6)])))
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, weights):
    """A project whose notebooks are the real ones, with a model and one earlier run; the working folder."""
    root = tmp_path/"project"
    (root/"runs"/"earlier").mkdir(parents=True)
    (root/"settings.ini").write_text("")
    (root/"nbs").symlink_to(ROOT/"nbs")
    (root/"model").mkdir()
    (root/"model"/"model.safetensors").hardlink_to(weights/"model.safetensors")     # 57 MB
    shutil.copy(weights/"card.json", root/"model")
    (root/"runs"/"earlier"/"run.json").write_text(json.dumps(dict(notebook="20_training", folder="runs/earlier", status="finished", minutes=1.5, parameters={}, attempts=[], code_hash="c")))
    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr("logging.raiseExceptions", False)     # lightning logs to the standard error of an earlier test
    monkeypatch.chdir(root)
    return root


def state(folder):
    """{file: hash} of everything below a folder but locks and notebooks; of large files the time."""
    mark = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 10**6 else path.stat().st_mtime_ns
    return {o.relative_to(folder).as_posix(): mark(o) for o in sorted(folder.rglob("*")) if o.is_file() and not o.name.endswith(".lock") and "nbs" not in o.parts}


def refused(capsys, words, code, *says):
    """Run a command that must fail with `code` and one sentence that says all of `says`."""
    assert runs.main(words) == code, capsys.readouterr().err
    said = capsys.readouterr().err
    lines = [o for o in said.splitlines() if o.startswith("shipnb: ")]
    assert len(lines) == 1 and 30 < len(lines[0]) < 700 and "Traceback" not in said and not re.search(r"\w+Error\b|Errno", lines[0]), said
    for one in says: assert re.search(one, lines[0]), (one, lines[0])
    return lines[0]


# --- what makes the whole job impossible: data

def no_data(root): return None
def no_csv(root): (root/"train_v2").mkdir(parents=True)
def binary_csv(root): no_csv(root), (root/CSV).write_bytes(bytes(range(256)) * 8)
def torn_csv(root): no_csv(root), (root/CSV).write_text('ImageId,EncodedPixels\n"a.jpg,1\n')
def other_columns(root): no_csv(root), (root/CSV).write_text("name,code\na.jpg,1 2\n")
def no_rows(root): no_csv(root), (root/CSV).write_text("ImageId,EncodedPixels\n")
def no_image_folder(root): root.mkdir(), (root/CSV).write_text("ImageId,EncodedPixels\na.jpg,\n")
def no_image(root): no_csv(root), (root/CSV).write_text("ImageId,EncodedPixels\na.jpg,\nb.jpg,1 2\n")
def only_bad_images(root): no_image(root), [(root/"train_v2"/o).write_text("text") for o in ("a.jpg", "b.jpg")]


IMPOSSIBLE = {no_data: ("data", "no (such )?folder", "should hold|give the folder"), no_csv: (CSV, "no such file", "must be a CSV with the columns ImageId, EncodedPixels"),
              binary_csv: (CSV, "not a readable CSV", "must be text with the columns"), torn_csv: (CSV, "not a readable CSV", "must be text"),
              other_columns: (CSV, "lacks the column ImageId, EncodedPixels; it has name, code"), no_rows: (CSV, "has no rows; it needs one for each image"),
              no_image_folder: ("train_v2", "no such folder; the images should be there"), no_image: ("train_v2", CSV, "put the images there")}
COMMANDS = {"run eda": ["run", "eda", "-p", "data", "data"], "run training": ["run", "training", "-p", "data", "data"], "run sampler": ["run", "sampler", "-p", "data", "data"],
            "study": ["study", "--data", "data"], "study --dry-run": ["study", "--data", "data", "--dry-run"]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("condition", IMPOSSIBLE, ids=lambda o: o.__name__)
def test_an_impossible_data_folder_ends_the_command_before_a_kernel_starts(project, capsys, monkeypatch, command, condition):
    condition(project/"data")
    monkeypatch.setattr(runs, "execute", lambda *given: pytest.fail("a notebook was started"))
    before = state(project)
    refused(capsys, COMMANDS[command], 2, *IMPOSSIBLE[condition])
    assert state(project) == before


@pytest.mark.parametrize("command", ["run eda", "run training", "study"])
def test_no_usable_image(project, capsys, command):
    only_bad_images(project/"data")
    before = state(project)
    refused(capsys, COMMANDS[command], 2, "no usable image is left: a.jpg: not an image that can be opened", r"b\.jpg", r"cell \d+", "the notebook so far is runs/")
    assert before.items() <= state(project).items()


@pytest.mark.parametrize("parameters, says", [
    (["-p", "labels_table", "none.csv"], ["none.csv", "no such file", "columns ImageId"]), (["-p", "labels_table", "bad.csv"], ["bad.csv", "not a readable CSV"]),
    (["-p", "counts_table", "other.csv"], ["other.csv", "lacks the column ImageId"]), (["-p", "data", "good", "-p", "labels_table", "other.csv"], ["not both"])])
def test_label_tables_of_eda(project, capsys, parameters, says):
    (project/"bad.csv").write_bytes(bytes(range(256)) * 8)
    (project/"other.csv").write_text("name,code\na,b\n")
    if "good" in parameters: write_data(project/"good")
    refused(capsys, ["run", "eda", *parameters], 2, *says)


# --- one class only

TINY = ["size", "32", "batch_size", "4", "precision", "32-true", "epochs", "1", "crop", "0", "evaluate_every", "1"]
TRAIN = [word for k in range(0, len(TINY), 2) for word in ("-p", *TINY[k:k + 2])]
STUDY = [word for k in range(0, len(TINY), 2) for word in ("-p", f"training.{TINY[k]}", TINY[k + 1])] + ["-p", "thresholds.draws", "100", "-p", "thresholds.min_areas", "[0]"]


@pytest.mark.parametrize("ships", [(0,), (1, 2)], ids=["no image with ships", "no image without"])
@pytest.mark.parametrize("notebook", ["eda", "sampler"])
def test_looking_at_one_class_is_fine(project, capsys, notebook, ships):
    write_data(project/"data", ships)
    ratio = ["-p", "zero_ships_ratio_per_batch", "-1"] if notebook == "sampler" else []
    assert runs.main(["run", notebook, "-p", "data", "data", *ratio, "--out", "runs/look"]) == 0, capsys.readouterr().err
    assert files.read_json(project/"runs"/"look"/"results.json")["images"] == 12


def test_sampling_a_share_of_what_is_not_there(project, capsys):
    write_data(project/"data", (1, 2))
    refused(capsys, ["run", "sampler", "-p", "data", "data"], 2, "zero")


def test_training_without_a_ship(project, capsys):
    write_data(project/"data", (0,))
    refused(capsys, ["run", "training", "-p", "data", "data", *TRAIN], 2, "no image with ships: there is nothing to learn from")


def test_thresholds_without_a_ship(project, capsys):
    write_data(project/"data", (0,))
    before = state(project/"model")
    refused(capsys, ["run", "thresholds", "-p", "data", "data", "-p", "model", "model"], 2, "none of the 6 held-out images has a ship", "label some, or hold out more")
    assert state(project/"model") == before


# --- some bad images

def reported(said, bad):
    """Whether every bad image is named once, and the sum at the end."""
    return [o for o in bad if said.count(f"bad image {o}: ") != 1] == [] and f"shipnb: {len(bad)} " in said and "Traceback" not in said


def test_looking_at_data_with_bad_images(project, capsys, bad_files):
    write_data(project/"data", more=bad_files | {"../out.jpg": b"x"})
    command = ["run", "eda", "-p", "data", "data", "--out", "runs/look"]
    for again in (False, True):     # finished, and not run again: the same answer
        assert runs.main(command) == 3
        captured = capsys.readouterr()
        assert reported(captured.err, [*bad_files, "../out.jpg"]) and "20000 x 20000 pixels are too many for training; cut it into windows" in captured.err
        assert ("not run again" in captured.out) == again
    results = files.read_json(project/"runs"/"look"/"results.json")
    assert results["images"] == 12 and set(results["bad_images"]) == {*bad_files, "../out.jpg"} and len(results["fingerprint"]) == 64
    assert files.read_json(project/"runs"/"look"/"run.json")["fingerprint"] == results["fingerprint"]


def test_a_study_with_bad_images_and_no_empty_one_reaches_its_end(project, capsys, bad_files):
    """Scores of images without ships do not exist then; they must not end a training after its last epoch."""
    write_data(project/"data", (1, 2), more=bad_files)
    assert runs.main(["study", "--name", "bad", "--data", "data", *STUDY]) == 3
    assert reported(capsys.readouterr().err, bad_files)
    folder = project/"runs"/"bad"
    rows = pd.read_csv(folder/"31_inference"/"submission.csv", dtype=str, keep_default_na=False)
    assert len(rows) and not set(rows.ImageId) & set(bad_files) and (folder/"report.html").is_file()
    assert files.read_json(folder/"20_training"/"model"/"card.json")["metrics"]["dice_without@32"] is None


def test_predicting_with_bad_images(project, capsys, bad_files):
    """A pixel is an image that can be predicted; the giant is further down."""
    bad = [o for o in bad_files if o not in ("pixel.jpg", "giant.png")]
    images = write_data(project/"data", more={o: bad_files[o] for o in [*bad, "pixel.jpg"]})/"train_v2"
    assert runs.main(["predict", "model", str(images), "-o", "out.csv"]) == 3
    assert reported(capsys.readouterr().err, bad)
    rows = pd.read_csv(project/"out.csv", dtype=str, keep_default_na=False)
    assert rows.ImageId.nunique() == 16 and (rows[rows.ImageId.isin(bad)].EncodedPixels == "").all()
    before = state(project)
    refused(capsys, ["predict", "model", str(images), "-o", "out.csv", "--strict"], 2, r"1 bad image \(cut.jpg: ")
    assert state(project) == before


def one_window(model, *shape):
    """Make a model folder's window, and the grid of its operating point, of another size."""
    card = files.read_json(model/"card.json")
    files.write_json(model/"card.json", card | dict(window=shape, operating_point=card["operating_point"] | dict(grid=shape, logit=1.5, threshold=float(sigmoid(1.5)))))


def test_predicting_takes_ten_bytes_per_pixel(project):
    """So 20,000 x 20,000 pixels take 4 GB beside the libraries: the image 3 bytes, its copy while it is decoded 3; or image, labels (4), mask."""
    image = Image.new("L", (1000, 20_000))
    image.paste(255, (100, 100, 400, 400))
    image.save("long.png", compress_level=1)
    one_window(project/"model", 1000, 1000)
    tracemalloc.start()
    assert runs.main(["predict", "model", "long.png", "-o", "out.csv"]) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 20_000_000


@pytest.mark.skipif("SHIPNB_SLOW" not in os.environ, reason="SHIPNB_SLOW is not set: a giant image takes a minute")
def test_a_giant_image_is_predicted(project, giant_png):
    """20,000 x 20,000 pixels through the command line in a process of its own, in less than 6 GB."""
    one_window(project/"model", 2048, 2048)
    code = "import resource, sys; from shipnb.runs import main; code = main(); print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    words = ["predict", "model", str(giant_png), "-o", "out.csv"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert int(done.stdout.split("peak ")[1]) * 1024 < 6e9
    assert set(pd.read_csv(project/"out.csv", dtype=str, keep_default_na=False).ImageId) == {"giant.png"}


# --- predicting: what makes it impossible

@pytest.mark.parametrize("images, options, says", [
    ("nowhere", [], ["nowhere", "no such file or folder of images"]), ("empty", [], ["empty", r"no image files \(jpg"]), ("bad", [], ["2 bad images", "a.jpg: not an image", "b.jpg"]),
    ("good", ["--sample-submission", "none.csv"], ["none.csv", "no such file", "a CSV with the column ImageId"]),
    ("good", ["--sample-submission", "binary.csv"], ["binary.csv", "not a readable CSV"]), ("good", ["--sample-submission", "other.csv"], ["other.csv", "lacks the column ImageId; it has"]),
    ("good", ["--sample-submission", "rows.csv"], ["rows.csv", "no image"]), ("good", ["--format", "xml"], ["format is 'xml'", "must be one of csv"]),
    ("good", ["--overlays", "good"], ["good", "folder of their own"]), ("good", ["-o", "far/away/out.csv"], ["away", "does not exist; make it"]), ("good", ["-o", "good"], ["is a folder; name the file"])])
def test_impossible_predictions(project, capsys, images, options, says):
    for name, data in {"binary.csv": bytes(range(256)) * 8, "other.csv": b"a,b\n1,2\n", "rows.csv": b"ImageId\nx.jpg\n", "out.csv": b"earlier"}.items(): (project/name).write_bytes(data)
    for name in ("empty", "bad", "good"): (project/name).mkdir()
    for name in ("a.jpg", "b.jpg"): (project/"bad"/name).write_text("text")
    (project/"good"/"a.jpg").write_bytes(jpeg(scene(1, 0)))
    before = state(project)
    refused(capsys, ["predict", "model", images, "-o", "out.csv", *options], 2, *says)
    assert state(project) == before


@pytest.mark.parametrize("damage, says", [("no folder", ["nothing", "is not a model folder", "train one"]), ("no card", ["card.json", "train one"]), ("torn card", ["card.json is not valid JSON"]),
                                          ("empty card", ["card.json lacks architecture"]), ("torn weights", ["model.safetensors does not fit"]),
                                          ("no point", ["no operating point", "run 30_thresholds"])])
def test_impossible_models(project, capsys, damage, says):
    (project/"a.jpg").write_bytes(jpeg(scene(1, 0)))
    (project/"out.csv").write_text("earlier")
    model, card = project/"model", project/"model"/"card.json"
    if damage == "no card": card.unlink()
    if damage == "torn card": card.write_text(card.read_text()[:50])
    if damage == "empty card": card.write_text("{}")
    if damage == "no point": files.write_json(card, files.read_json(card) | dict(operating_point=None))
    if damage == "torn weights":
        head = (model/"model.safetensors").read_bytes()[:1000]
        (model/"model.safetensors").unlink()    # it is a link to the other tests' weights
        (model/"model.safetensors").write_bytes(head)
    refused(capsys, ["predict", "nothing" if damage == "no folder" else "model", "a.jpg", "-o", "out.csv"], 2, *says)
    assert (project/"out.csv").read_text() == "earlier"


@pytest.mark.parametrize("notebook", ["thresholds", "inference"])
def test_a_missing_model_folder_ends_a_run_before_a_kernel_starts(project, capsys, monkeypatch, notebook):
    monkeypatch.setattr(runs, "execute", lambda *given: pytest.fail("a notebook was started"))
    refused(capsys, ["run", notebook, "-p", "model", "nowhere"], 2, "model: nowhere is not a model folder", "card.json", "train one with")


def test_an_interrupted_prediction(project, capsys, monkeypatch):
    from shipnb import inference
    def interrupted(*given): raise KeyboardInterrupt
    monkeypatch.setattr(inference, "draw_overlay", interrupted)
    (project/"a.jpg").write_bytes(jpeg(scene(1, 0)))
    (project/"out.csv").write_text("earlier")
    assert runs.main(["predict", "model", "a.jpg", "-o", "out.csv", "--overlays", "look"]) == 130
    assert capsys.readouterr().err == "shipnb: interrupted\n" and (project/"out.csv").read_text() == "earlier" and list((project/"look").iterdir()) == []


# --- disks

WRITES = {"predict": ["predict", "model", "a.jpg", "-o", "out/x.csv"], "predict, overlays": ["predict", "model", "a.jpg", "-o", "x.csv", "--overlays", "out"],
          "run": ["run", "eda", "-p", "data", "data", "--out", "out/run"], "study": ["study", "--data", "data", "--name", "../out/study"],
          "sample": ["sample", "out/fleet", "--images", "2"], "sample in place": ["sample", "out", "--images", "2"]}


@pytest.fixture
def inputs(project):
    """Data and an image to predict, and an earlier output in `out`."""
    write_data(project/"data")
    (project/"a.jpg").write_bytes(jpeg(scene(1, 0)))
    (project/"out").mkdir()
    return project


@pytest.mark.parametrize("command", WRITES)
def test_a_read_only_output_folder(inputs, capsys, read_only, command):
    (inputs/"out"/"x.csv").write_text("earlier")
    if command == "sample in place": (inputs/"out"/"x.csv").unlink()
    read_only(inputs/"out" if command != "sample in place" else inputs)
    before = state(inputs)
    refused(capsys, WRITES[command], 2, r"out|project", "[Rr]ead-only|[Pp]ermi", "choose")
    assert state(inputs) == before


def test_read_only_runs_can_be_listed(inputs, capsys, read_only):
    read_only(inputs)
    assert runs.main(["runs"]) == 0 and "earlier" in capsys.readouterr().out


@pytest.mark.parametrize("command, size", [("predict", 4096), ("predict, overlays", 4096), ("run", 24 * 1024), ("study", 24 * 1024), ("sample", 64 * 1024)])
def test_a_full_disk(inputs, capsys, full_disk, tmp_path, command, size):
    small = full_disk(size)
    (inputs/"out").rmdir()
    (inputs/"out").symlink_to(small)
    words = [o.replace("../out", "../../small") if command == "study" else o for o in WRITES[command]]
    if command.startswith("predict"): (small/"x.csv").write_text("earlier")
    with contextlib.suppress(OSError):
        if command.startswith("predict"): (small/"fill").write_bytes(bytes(2 * size))
    before, elsewhere = state(small), state(inputs)
    refused(capsys, words, 1, "No space left on device|File too large", "small|out", "free space|raise the limit")
    after = state(small)
    assert {k: after.get(k) for k in before} == before and (command != "sample" or after == before)
    assert {k: v for k, v in state(inputs).items() if not k.startswith("x.csv")}.items() >= elsewhere.items()


def test_a_full_disk_for_tensors(full_disk, weights):
    """torch and safetensors have errors of their own for it."""
    small = full_disk(200 * 1024)
    (small/"last.pt").write_bytes(b"earlier")
    big = {"x": torch.zeros(1_000_000)}
    from safetensors.torch import save_file
    for save in (torch.save, save_file):
        with pytest.raises(OSError, match="last.pt") as error, files.atomic_path(small/"last.pt") as temp: save(big, temp)
        assert error.value.errno in (errno.ENOSPC, errno.EFBIG) and state(small) == {"last.pt": hashlib.sha256(b"earlier").hexdigest()}


# --- samples

def test_the_default_folder_is_one_folder_however_it_is_asked_for(project, capsys):
    assert runs.main(["sample", "data/sample", "--images", "2"]) == 0
    folder, before = project/"data"/"sample", state(project/"data")
    times = [o.stat().st_mtime_ns for o in folder.rglob("*")]
    assert fleet.sample(2) == folder and runs.main(["sample", "--images", "2"]) == 0 and runs.main(["sample", str(folder), "--images", "2"]) == 0
    assert state(project/"data") == before and times == [o.stat().st_mtime_ns for o in folder.rglob("*")]
    assert len(list(folder.glob("train_v2/*.jpg"))) == 2


def test_samples_never_replace_anything(project, capsys):
    assert runs.main(["sample", "new/fleet", "--images", "2"]) == 0 and runs.main(["sample", "new/fleet", "--images", "2"]) == 0
    (project/"mine").mkdir()
    (project/"mine"/"thesis.txt").write_text("precious")
    capsys.readouterr()
    before = state(project)
    refused(capsys, ["sample", "new/fleet", "--images", "4"], 2, "new/fleet already holds 2 images of seed 0", "remove it or choose another")
    refused(capsys, ["sample", "mine"], 2, "mine already holds files that were not made here", "choose another folder")
    refused(capsys, ["sample", "settings.ini"], 2, "settings.ini", "choose a folder")
    refused(capsys, ["sample", "other", "--seed", "-1"], 2, "seed must be a whole number >= 0, not -1")
    assert runs.main(["sample", "other", "--images", "0"]) == 2 and state(project) == before


def test_an_interrupted_sample_leaves_nothing(project, capsys, monkeypatch):
    def interrupted(*given): raise KeyboardInterrupt
    monkeypatch.setattr(fleet, "_write_scene", interrupted)
    assert runs.main(["sample", "fleet", "--images", "2"]) == 130 and capsys.readouterr().err == "shipnb: interrupted\n"
    assert [o.name for o in project.iterdir() if "fleet" in o.name] == [".fleet.lock"]


def test_an_interrupted_training_that_is_built_once_goes_on(project, monkeypatch):
    from shipnb.catalog import read_airbus
    from shipnb.training import Learner, Recipe, split_by, train_model
    catalog, epochs = read_airbus(write_data(project/"data", images=8)), []
    parts, recipe = split_by(catalog), Recipe(size=32, batch_size=2, precision="32-true", epochs=3)
    save = Learner.save
    def stop_once(self):
        save(self)
        epochs.append(self.epoch)
        if len(epochs) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(Learner, "save", stop_once)
    build = lambda: files.build_once(project/"quick", "key", lambda temp: train_model(catalog, parts, recipe, temp, progress=False), resume=True)
    with pytest.raises(KeyboardInterrupt): build()
    assert (build()/"model"/"card.json").is_file() and epochs == [1, 2, 3]


# --- runs and figures

@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"status": "finished"}', '{"status": 3, "parameters": []}', "null"])
def test_a_damaged_record(project, capsys, text):
    write_data(project/"data")
    (project/"runs"/"torn").mkdir()
    (project/"runs"/"torn"/"run.json").write_text(text)
    assert runs.main(["runs"]) == 0
    captured = capsys.readouterr()
    assert "earlier" in captured.out and captured.err.count("\n") == 1 and "shipnb: runs/torn/run.json is no record of a run and is left out" in captured.err
    refused(capsys, ["run", "eda", "-p", "data", "data", "--out", "runs/torn"], 2, "runs/torn/run.json", "is no record of a run", "move the folder away")
    assert (project/"runs"/"torn"/"run.json").read_text() == text
    assert runs.main(["study", "--data", "data", "--dry-run"]) == 0


def test_no_runs_at_all(project, capsys):
    shutil.rmtree(project/"runs")
    assert runs.main(["runs"]) == 0 and capsys.readouterr().out == "no runs in runs/\n"


@pytest.mark.parametrize("source, code, says", [("raise ValueError('labels.csv: lacks the column ImageId')", 2, ["labels.csv: lacks", "10_toy, cell 2"]),
                                                ("open('/dev/full', 'w').write('x' * 10**6)", 1, ["No space left on device", "free space", "10_toy, cell 2"]),
                                                ("open('/nowhere/x')", 2, ["/nowhere/x", "No such file", "check the path"])])
def test_figures_that_fail_leave_the_notebook(tmp_path, monkeypatch, capsys, source, code, says):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('out = ""  # folder', metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(source)])
    (tmp_path/"nbs").mkdir()
    (tmp_path/"settings.ini").write_text("")
    nbformat.write(nb, tmp_path/"nbs"/"10_toy.ipynb")
    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path/"nbs"/"10_toy.ipynb").read_bytes()
    refused(capsys, ["figures", "toy"], code, *says)
    refused(capsys, ["figures", "nothing"], 2, "no notebook named nothing", "toy")
    assert (tmp_path/"nbs"/"10_toy.ipynb").read_bytes() == before


def test_figures_in_a_read_only_project(tmp_path, monkeypatch, capsys, read_only):
    (tmp_path/"p"/"nbs").mkdir(parents=True)
    (tmp_path/"p"/"settings.ini").write_text("")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('out = ""  # folder', metadata=dict(tags=["parameters"]))]), tmp_path/"p"/"nbs"/"10_toy.ipynb")
    read_only(tmp_path/"p")
    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.chdir(tmp_path/"p")
    refused(capsys, ["figures"], 2, "[Rr]ead-only|[Pp]ermi", "runs", "choose")
