"""The oil tanks: every field of the configuration against what is built, the baseline, and an evaluation that follows a training in another process."""
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from shipnb import runs
from shipnb.checkpoints import list_checkpoints, save_checkpoint
from shipnb.dataset import make_loader
from shipnb.dataset_tasks import DetectionDataset
from shipnb.detectors import CellAnchors, build_single_stage, build_ssd_resnet_fpn
from shipnb.files import write_json
from shipnb.fleet_tasks import make_tanks
from shipnb.formats import read
from shipnb.masks import label_boxes, label_instances
from shipnb.metrics import box_iou
from shipnb.models import save_model
from shipnb.optim import build_optimizer, build_schedule
from shipnb.sampler import ShipStratifiedSampler
from shipnb.tasks import detection_task
from shipnb.training import Learner

ROOT = Path(__file__).parents[1]
FIELDS = pd.read_csv(ROOT/"nbs/studies/reference/oil_config.csv", dtype=str, keep_default_na=False)
SOURCE = yaml.safe_load((ROOT/"nbs/params/oil-source.yaml").read_text(encoding="utf-8"))


def cell(notebook, text):
    """Source of the code cell of a study that holds a text."""
    cells = json.loads((ROOT/f"nbs/studies/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return next(source for o in cells if o["cell_type"] == "code" and text in (source := runs.cell_source(o)))


# --- the configuration

def test_every_field_says_how_it_is_set():
    assert len(FIELDS) == FIELDS["field"].nunique() == 85
    assert set(FIELDS["how"]) == {"same", "other", "none"} and (FIELDS["here"] != "").all()
    assert FIELDS["how"].value_counts()["same"] >= 65
    assert not FIELDS.map(lambda o: "~" in o or o.startswith("/")).any().any(), "a path of somebody's machine"


def value_at(values, path):
    for part in path: values = values[int(part)] if isinstance(values, (list, tuple)) else values[part]
    return values


RUN = {name: o.default for name, o in runs.read_parameters(ROOT/"nbs/studies/oil_tanks.ipynb").items()} | SOURCE
BUILD = {name: o.default for name, o in inspect.signature(build_ssd_resnet_fpn).parameters.items()}


def source_value(place):
    """What a name in the column `argument` is in the parameter file, or by default in notebook and builder."""
    kind, *path = place.split(".")
    values = RUN if kind == "run" else BUILD
    return value_at(values, path), value_at(SOURCE["build"], path) if kind == "build" and path[0] in SOURCE["build"] else None


@pytest.mark.parametrize("row", [o for o in FIELDS.to_dict("records") if o["argument"]], ids=lambda o: o["field"].split(".", 2)[-1])
def test_arguments_have_the_values_of_the_fields(row):
    """`run.lr` is a parameter of the notebook as oil-source.yaml sets it, `build.gamma` a default of the builder (and the file may not say otherwise); `name=value` where both are written differently."""
    place, _, said = row["argument"].partition("=")
    value, in_file = source_value(place)
    wanted = said or row["value"]
    if isinstance(value, (tuple, list)): assert list(value) == [float(o) for o in wanted.split()]
    elif isinstance(value, (int, float)): assert value == float(wanted)
    else: assert value == wanted
    if place == "build.body_activation": assert in_file == "relu" and SOURCE["weights"] == "imagenet"     # said in the column `here`
    elif in_file is not None: assert (list(in_file) if isinstance(in_file, list) else in_file) == (list(value) if isinstance(value, tuple) else value)


def test_the_parameter_file_builds_the_documents_detector():
    """resnet101 at full size, without its weights."""
    build = SOURCE["build"] | dict(body_activation="relu6")
    network = build_single_stage(SOURCE["detector"], SOURCE["backbone"], 1, SOURCE["size"], **build)
    assert sum(o.numel() for o in network.parameters()) > 50_000_000
    assert [len(o) for o in (network.backbone.body.layer1, network.backbone.body.layer2, network.backbone.body.layer3, network.backbone.body.layer4)] == [3, 4, 23, 3]
    assert all(torch.equal(a, b) for a, b in zip(network.anchor_generator.cell_anchors, CellAnchors().cell_anchors, strict=True))


def test_rates_are_those_of_the_file():
    network = torch.nn.Conv2d(3, 3, 3)
    opt = build_optimizer(SOURCE["optimiser"], network, SOURCE["lr"], SOURCE["weight_decay"], momentum=SOURCE["momentum"])
    sched = build_schedule(SOURCE["schedule"], opt, SOURCE["steps"], **SOURCE["schedule_options"])
    rates = [sched.rate(o) for o in (0, 750, 1500, 8250, 15000)]
    assert rates == pytest.approx([.00083333, (.00083333 + .0025) / 2, .0025, .00125, 0])
    assert type(opt) is torch.optim.SGD and {o["momentum"] for o in opt.param_groups} == {.9}
    assert {o["name"]: o["weight_decay"] for o in opt.param_groups} == {"rest": .0004, "rest, no decay": 0}


# --- the baseline

def test_the_baseline_finds_a_bright_and_a_dark_disc():
    space = dict(cv2=cv2, np=np, label_instances=label_instances, label_boxes=label_boxes)
    exec(cell("oil_tanks", "def blobs(img)"), space)
    img = np.full((128, 128, 3), 120, np.uint8)
    cv2.circle(img, (40, 40), 15, (230, 230, 230), -1)
    cv2.circle(img, (90, 80), 20, (30, 30, 30), -1)
    cv2.rectangle(img, (100, 5), (103, 50), (230, 230, 230), -1)                   # a wall
    rows = space["blobs"](img)
    for bright, box in ((True, [25, 25, 56, 56]), (False, [70, 60, 111, 101])):
        mine = rows[rows[:, 4] == bright]
        ious = box_iou(mine[:, :4] * 128, [box])[:, 0]
        assert ious.max() > .85 and mine[ious.argmax(), 5] > .9 and mine[ious.argmax(), 6] > .3
    wall = rows[box_iou(rows[:, :4] * 128, [[100, 5, 104, 51]])[:, 0] > .7]
    assert len(wall) and wall[:, 5].max() < .2


# --- evaluation beside training

def follow_of(**names):
    space = dict(time=time, list_checkpoints=list_checkpoints, poll=.01, timeout=.3) | names
    exec(cell("oil_evaluate", "def follow(place"), space)
    return space["follow"]


def mark(folder, step): return save_checkpoint(folder, dict(shipnb=1), step, keep=2)


def test_following_ends_with_the_training_and_misses_nothing_that_stayed(tmp_path):
    follow, seen = follow_of(timeout=60), []
    mark(tmp_path, 1)
    for path in follow(tmp_path):
        seen.append(int(path.name.split("-")[1]))
        if len(seen) < 4: mark(tmp_path, len(seen) + 1)
        else:
            mark(tmp_path, 5), mark(tmp_path, 6)                                   # two while one was scored, the last two of the training
            write_json(tmp_path/"model"/"card.json", {})
            if seen[-1] == 6: break
        assert len(seen) < 9
    assert seen == [1, 2, 3, 4, 6]


def test_following_a_dead_training_ends(tmp_path, capsys):
    mark(tmp_path, 1)
    assert len(list(follow_of()(tmp_path))) == 1
    assert "seems to be dead" in capsys.readouterr().out


def test_following_skips_what_was_scored_before(tmp_path):
    path = mark(tmp_path, 1)
    write_json(tmp_path/"model"/"card.json", {})
    assert list(follow_of()(tmp_path, {path.name})) == []


def test_an_evaluation_in_a_second_process_scores_as_the_training_would(tmp_path):
    """The notebook is started first; this process trains, and the other one ends by itself."""
    catalog = read(make_tanks(tmp_path/"set", images=6, seed=0, valid=.34), "coco")
    train, valid = (catalog.subset((catalog.images["split"] == o).to_numpy()) for o in ("train", "validation"))
    place, out, build = tmp_path/"run", tmp_path/"scores", {"channels": 16, "levels": [2, 5], "bn_decay": .9}
    card = dict(architecture="ssd_resnet_fpn", encoder="resnet18", classes=1, labels=["tank"], in_channels=3, size=[64, 64], window=[512, 512], build=build)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(ROOT), str(ROOT/"nbs/studies/oil_evaluate.ipynb"), str(tmp_path/"done.ipynb"),
               "-p", "run", str(place), "-p", "out", str(out), "-p", "poll", "0.2", "-p", "timeout", "300"]
    other = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"MPLBACKEND": "agg"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        torch.manual_seed(0)
        network = build_single_stage("ssd_resnet_fpn", "resnet18", 1, 64, **build)
        learner = Learner(network, detection_task(), build_optimizer("adamw", network, 2e-3), None, place, device="cpu", progress=False, ema=.9)
        write_json(place/"detector.json", card | dict(data=str(tmp_path/"set"), ema=.9))
        loaders = [make_loader(DetectionDataset(train, (64, 64), ["tank"]), ShipStratifiedSampler(train.counts, 2, batches_per_epoch=3)), make_loader(DetectionDataset(valid, (64, 64), ["tank"]), batch_size=4)]
        for row in learner.epochs(3, *loaders):
            learner.save()
            wait_for_lines(out/"scores.jsonl", row["epoch"] + 1, other)
        save_model(place/"model", learner.trained, card)
        assert other.wait(120) == 0, other.stdout.read()
    finally:
        other.kill()
    scored = [json.loads(line) for line in (out/"scores.jsonl").read_text().splitlines()]
    assert [o["step"] for o in scored] == [3, 6, 9]
    assert [[o["ap50"], o["ap"]] for o in scored] == [[pytest.approx(o["ap50"], abs=1e-9), pytest.approx(o["ap"], abs=1e-9)] for o in learner.history]
    assert (out/"results.json").is_file() and list((out/"tensorboard").iterdir())


def wait_for_lines(path, lines, process, seconds=300):
    """Wait until a file has so many lines while a process runs."""
    end = time.monotonic() + seconds
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(.1)


# --- the published run

PUBLISHED = ROOT/"figures/oil_tanks_real.json"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the run on the real tanks is not published yet")
def test_the_published_numbers_hold_together():
    results = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = {o["method"]: o for o in results["ap50"]}
    assert results["images"] == 131 and results["train_images"] == 550 and results["tanks"] == 129 and results["draws"] == 2000
    assert rows["detector"]["ap50"] == pytest.approx(results["coco"]["ap50"]) and rows["size and brightness"]["ap50"] == pytest.approx(results["baseline"]["ap50"])
    assert rows["difference"]["ap50"] == pytest.approx(rows["detector"]["ap50"] - rows["size and brightness"]["ap50"])
    assert all(o["low"] <= o["ap50"] <= o["high"] for o in rows.values())
    assert sum(o["tanks"] for o in results["by_size"] if o["method"] == "detector") == 129
    assert results["precision"] == "bf16-mixed" and len(json.dumps(results)) < 20_000
    settings = yaml.safe_load((ROOT/"nbs/params/oil-real-cpu.yaml").read_text(encoding="utf-8"))
    assert {o: results[o] for o in ("backbone", "size", "build", "steps", "batch_size")} == {o: settings[o] for o in ("backbone", "size", "build", "steps", "batch_size")}
