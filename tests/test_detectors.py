"""The single-stage detectors: numbers of the configuration in the built model, losses against plain arithmetic, weights taken or refused."""
import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from torchvision.models.detection.image_list import ImageList

from shipnb import detectors
from shipnb.dataset import make_loader
from shipnb.dataset_tasks import DetectionDataset
from shipnb.detectors import CellAnchors, MirroredDataset, build_single_stage, build_ssd, build_ssd_resnet_fpn, load_detector, take_weights
from shipnb.fleet_tasks import make_tanks
from shipnb.formats import read
from shipnb.models import Exact, build_detector, save_model
from shipnb.optim import build_optimizer
from shipnb.sampler import ShipStratifiedSampler
from shipnb.tasks import detection_task, losses_without_traces
from shipnb.training import Learner

SMALL = dict(backbone="resnet18", size=128, channels=16)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build_ssd_resnet_fpn(**SMALL)


@pytest.fixture(scope="module")
def scene():
    images = [torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    boxes = [[[8.0, 8, 50, 44]], [[3.0, 3, 12, 12], [60, 60, 90, 95]], []]       # the second is too small for any anchor: 0.5 is not reached
    return images, [dict(boxes=torch.tensor(o).reshape(-1, 4), labels=torch.ones(len(o), dtype=torch.int64)) for o in boxes]


def plain_anchors(shape, levels, scale, ratios, per_octave):
    """TensorFlow's multiscale_grid_anchor_generator, in loops: x0, y0, x1, y1."""
    out = []
    for level in levels:
        for row in range(shape[0] // 2**level):
            for column in range(shape[1] // 2**level):
                for ratio in ratios:
                    for k in range(per_octave):
                        side = scale * 2**level * 2 ** (k / per_octave)
                        w, h = side * math.sqrt(ratio), side / math.sqrt(ratio)
                        x, y = (column + .5) * 2**level, (row + .5) * 2**level
                        out.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return np.array(out)


@pytest.mark.parametrize("levels, scale, ratios, per_octave", [((3, 4, 5, 6, 7), 4., (1., 2., .5), 2), ((2, 3), 1.5, (1., 3.), 3)])
def test_anchors_equal_tensorflows(levels, scale, ratios, per_octave):
    anchors = CellAnchors(levels, scale, ratios, per_octave)
    maps = [torch.zeros(1, 8, 128 // 2**o, 256 // 2**o) for o in levels]
    found = anchors(ImageList(torch.zeros(1, 3, 128, 256), [(128, 256)]), maps)[0].numpy()
    wanted = plain_anchors((128, 256), levels, scale, ratios, per_octave)
    assert found.shape == wanted.shape
    order = lambda o: o[np.lexsort(o.round(3).T)]
    np.testing.assert_allclose(order(found), order(wanted), atol=1e-3)


def test_every_number_of_the_configuration_is_in_the_built_model():
    model = build_ssd_resnet_fpn("resnet18")   # but for the depth of the body the defaults are the configuration
    norms = [o for o in model.modules() if isinstance(o, nn.BatchNorm2d)]
    assert {(o.eps, round(o.momentum, 10), o.affine) for o in norms} == {(.001, .003, True)}
    assert all(o.requires_grad for o in model.parameters()), "nothing is frozen"
    assert not any(isinstance(o, torchvision.ops.FrozenBatchNorm2d) for o in model.modules())
    assert not any(type(o) is nn.ReLU for o in model.modules())
    assert model.head.coder.weights == model.box_coder.weights == (10, 10, 5, 5)
    assert type(model.proposal_matcher).__name__ == "SSDMatcher"
    assert (model.proposal_matcher.high_threshold, model.proposal_matcher.low_threshold) == (.5, .5)
    assert (model.score_thresh, model.nms_thresh, model.detections_per_img) == (1e-8, .6, 100)
    assert (model.head.gamma, model.head.alpha) == (2, .25)
    assert model.transform.fixed_size == (1024, 1024)
    for tower in model.head.towers.values():
        assert [tuple(o.weight.shape) for o in tower.conv] == [(256, 256, 3, 3)] * 4 and [len(o) for o in tower.norm] == [4] * 5
        assert all(abs(float(o.weight.detach().std()) - .01) < 1e-4 and o.bias is None for o in tower.conv)
    assert model.anchor_generator.num_anchors_per_location() == [6] * 5
    assert model.head.last["classes"].out_channels == 6 * 2 and model.head.last["boxes"].out_channels == 6 * 4
    assert (model.head.last["classes"].bias == -4.6).all() and (model.head.last["boxes"].bias == 0).all()
    for o in (model.backbone.body.layer3[0].conv1, model.backbone.fpn.layer_blocks[0][0], model.backbone.fpn.extra_blocks.blocks[1][0]):
        assert float(o.weight.detach().abs().max()) <= .06 and abs(float(o.weight.detach().std()) - .03 * .88) < .001      # a normal cut at two deviations has 0.88 of its deviation
    with torch.inference_mode(): assert [o.shape[-1] for o in model.eval().backbone(torch.zeros(1, 3, 256, 256)).values()] == [32, 16, 8, 4, 2]


def plain_losses(model, images, targets):
    """The two losses from the model's outputs, in loops over anchors."""
    x, there = model.transform(images, [dict(o) for o in targets])
    with losses_without_traces(model), torch.no_grad():
        features = list(model.backbone(x.tensors).values())
        out = model.head(features)
    anchors = model.anchor_generator(x, features)[0].double().numpy()
    z, offsets = (out[o].double().numpy() for o in ("cls_logits", "bbox_regression"))
    focal = smooth = matches = 0
    for i, target in enumerate(there):
        boxes = target["boxes"].double().numpy()
        ious = torchvision.ops.box_iou(torch.from_numpy(boxes), torch.from_numpy(anchors)).numpy()
        mine = {}
        for a in range(len(anchors)):
            if len(boxes) and ious[:, a].max() >= .5: mine[a] = int(ious[:, a].argmax())
        best = torchvision.ops.box_iou(target["boxes"], torch.from_numpy(anchors).float()).max(1)[1].tolist() if len(boxes) else []     # of many anchors around a small box, the one that torch finds
        for t, a in enumerate(best):
            assert ious[t, a] == pytest.approx(ious[t].max(), abs=1e-6)
            mine[a] = t
        matches += len(mine)
        y = np.zeros_like(z[i])
        for a, t in mine.items():
            y[a, int(target["labels"][t])] = 1
            (ax, ay), (aw, ah) = (anchors[a][:2] + anchors[a][2:]) / 2, anchors[a][2:] - anchors[a][:2]
            (bx, by), (bw, bh) = (boxes[t][:2] + boxes[t][2:]) / 2, boxes[t][2:] - boxes[t][:2]
            wanted = np.array([10 * (bx - ax) / aw, 10 * (by - ay) / ah, 5 * math.log(bw / aw), 5 * math.log(bh / ah)])
            d = np.abs(offsets[i, a] - wanted)
            smooth += np.where(d < 1, d * d / 2, d - .5).sum()
        p = 1 / (1 + np.exp(-z[i]))
        focal += -(.25 * y * (1 - p) ** 2 * np.log(p) + .75 * (1 - y) * p**2 * np.log(1 - p)).sum()
    return focal / matches, smooth / matches / 4


def test_losses_equal_plain_arithmetic(small, scene):
    with torch.no_grad():
        for o in small.head.last.values(): nn.init.normal_(o.weight, std=.3)     # an untrained head gives nearly constants
    with losses_without_traces(small): ours = small(*scene)
    focal, smooth = plain_losses(small, *scene)
    assert float(ours["classification"]) == pytest.approx(focal, rel=1e-4) and float(ours["bbox_regression"]) == pytest.approx(smooth, rel=1e-4)


def test_images_without_objects_give_finite_losses(small, scene):
    images, targets = scene
    with losses_without_traces(small): losses = small(images[2:], targets[2:])
    assert all(torch.isfinite(o) for o in losses.values()) and float(losses["bbox_regression"]) == 0 < float(losses["classification"])


def test_background_is_no_detection(small, scene):
    with torch.no_grad(): small.head.last["classes"].bias[0::2] = 5                # the column of the background, in each anchor
    try:
        with torch.inference_mode(): found = small.eval()(scene[0])
    finally:
        with torch.no_grad(): small.head.last["classes"].bias[0::2] = -4.6
    assert all(len(o["labels"]) == 100 and set(o["labels"].tolist()) == {1} for o in found)


def test_boxes_come_back_in_pixels_of_the_image(small, scene):
    big = [nn.functional.interpolate(o[None], scale_factor=2, mode="nearest")[0] for o in scene[0]]
    with torch.inference_mode(): found, large = small.eval()(scene[0]), small(big)
    assert max(float(o["boxes"].max()) for o in found) <= 128 < max(float(o["boxes"].max()) for o in large) <= 256


def test_under_autocast_body_and_heads_run_in_bfloat16_and_boxes_do_not(small, scene):
    kinds = {}
    hooks = [module.register_forward_hook(lambda m, args, out, name=name: kinds.update({name: out.dtype}))
             for name, module in (("body", small.backbone.body.layer2[0].conv1), ("head", small.head.towers["boxes"].conv[1]))]
    try:
        with torch.autocast("cpu", torch.bfloat16), losses_without_traces(small): losses = small(Exact(scene[0]), Exact(scene[1]))
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(): found = small.eval()(scene[0])
        assert kinds == dict(body=torch.bfloat16, head=torch.bfloat16)
        assert {o.dtype for o in losses.values()} | {o["boxes"].dtype for o in found} == {torch.float32}
        with torch.inference_mode(): small(scene[0])
        assert kinds == dict(body=torch.float32, head=torch.float32)
    finally:
        for o in hooks: o.remove()


@pytest.fixture(scope="module")
def tanks(tmp_path_factory):
    return read(make_tanks(tmp_path_factory.mktemp("tanks")/"set", images=6, seed=2, valid=0))


def learner_of(network, precision="bf16-mixed"): return Learner(network, detection_task(), build_optimizer("adamw", network, 2e-3), precision=precision, device="cpu", progress=False)


@pytest.mark.parametrize("name, side", [("ssd_resnet_fpn", 128), ("ssdlite320_mobilenet_v3_large", 160)])
def test_training_through_the_learner_lowers_the_loss(tanks, name, side):
    torch.manual_seed(0)
    network = build_single_stage(name, "resnet18", size=128, **({"channels": 16, "bn_decay": .9} if name == "ssd_resnet_fpn" else {}))
    learner = learner_of(network)
    loader = make_loader(DetectionDataset(tanks, (side, side)), ShipStratifiedSampler(tanks.counts, 3, batches_per_epoch=4))
    rows = list(learner.epochs(3, loader, loader, evaluate_every=3))
    assert rows[-1]["loss"] < .9 * rows[0]["loss"] and "ap50" in rows[-1]


def test_ssdlite_refuses_a_training_batch_of_one_and_nothing_else(scene):
    lite = build_ssd("ssdlite320_mobilenet_v3_large")
    images, targets = scene
    with pytest.raises(ValueError, match="batch size of 2 or more"): lite(images[:1], targets[:1])
    with pytest.raises(ValueError, match="batch size of 2 or more"): lite(Exact(images[:1]), Exact(targets[:1]))
    with losses_without_traces(lite): assert all(torch.isfinite(o) for o in lite(images[:1], targets[:1]).values())
    with torch.inference_mode(): assert len(lite.eval()(images[:1])) == 1


def test_ssd300_has_a_head_for_the_classes_asked(scene):
    network = build_ssd("ssd300_vgg16", classes=3)
    assert [o.out_channels for o in network.head.classification_head.module_list] == [4 * o for o in network.anchor_generator.num_anchors_per_location()]
    with torch.inference_mode(): found = network.eval()(scene[0][:1])
    assert set(found[0]["labels"].tolist()) <= {1, 2, 3}


# --- weights

def no_internet(*args, **kwargs): raise URLError("no route")


@pytest.mark.parametrize("build", [lambda: build_ssd_resnet_fpn("resnet50", weights="coco"), lambda: build_ssd_resnet_fpn("resnet18", weights="imagenet"),
                                   lambda: build_ssd("ssd300_vgg16", weights="coco"), lambda: build_ssd("ssdlite320_mobilenet_v3_large", weights="imagenet")])
def test_weights_that_cannot_be_downloaded_are_an_error_at_once(build, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_internet)
    with pytest.raises(ValueError, match="could not be downloaded .URLError.; use 'none', or a file of weights"): build()


def test_coco_weights_are_taken_but_for_the_class_head(monkeypatch):
    torch.manual_seed(3)
    whole = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: whole)
    network = build_ssd("ssdlite320_mobilenet_v3_large", classes=1, weights="coco").state_dict()
    same = [name for name, o in network.items() if o.shape == whole[name].shape and torch.equal(o, whole[name])]
    assert set(whole) == set(network) and all("classification_head" in o for o in set(network) - set(same))
    assert sum("regression_head" in o or "backbone" in o for o in same) > 200


def test_coco_weights_of_retinanet_give_the_body_and_the_laterals(monkeypatch):
    torch.manual_seed(3)
    whole = torchvision.models.detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: whole)
    network = build_ssd_resnet_fpn("resnet50", weights="coco").state_dict()
    assert all(torch.equal(o, whole[name]) for name, o in network.items() if name.startswith("backbone.body.") or name.startswith("backbone.fpn.inner_blocks."))


def test_weights_that_hardly_fit_are_refused(small):
    state = small.state_dict()
    assert take_weights(small, state, "itself") == len(state)
    with pytest.raises(ValueError, match="only 2 fit in that"): take_weights(small, dict(list(state.items())[:2]), "that")


@pytest.mark.parametrize("text", [None, b"nothing"])
def test_a_file_that_is_missing_or_no_weights_is_refused(tmp_path, text):
    path = tmp_path/"some.safetensors"
    if text: path.write_bytes(text)
    with pytest.raises(ValueError, match="does not exist" if text is None else "is no file of weights"): build_ssd_resnet_fpn(**SMALL, weights=str(path))


def test_model_folders(small, scene, tmp_path):
    card = dict(encoder="resnet18", classes=1, in_channels=3, size=[128, 128], window=[512, 512])
    lite = build_ssd("ssdlite320_mobilenet_v3_large")
    house = build_detector("retinanet", min_size=64, max_size=64, channels=16)
    for name, network, build in (("ssd_resnet_fpn", small, {"channels": 16}), ("ssdlite320_mobilenet_v3_large", lite, {}), ("retinanet", house, {"channels": 16, "min_size": 64, "max_size": 64})):
        save_model(tmp_path/name, network, card | dict(architecture=name, build=build))
        again, read_card = load_detector(tmp_path/name)
        assert read_card["architecture"] == name and not again.training
        with torch.inference_mode(): pairs = zip(network.eval()(scene[0][:1]), again(scene[0][:1]))
        assert all(torch.equal(a[o], b[o]) for a, b in pairs for o in a)


# --- flips

def test_mirrored_images_keep_their_boxes(tanks):
    plain, data = DetectionDataset(tanks, (96, 128)), MirroredDataset(tanks, (96, 128), seed=4)
    codes = []
    for epoch in range(8):
        data.set_epoch(epoch)
        for i in range(len(tanks)):
            img, boxes, rows, code = data.arrays(i)
            before, old, _, _ = plain.arrays(i)
            codes.append(code)
            assert (img == (before[:, ::-1] if code else before)).all() and code in (0, 4)
            np.testing.assert_allclose(boxes, np.column_stack([128 - old[:, 2], old[:, 1], 128 - old[:, 0], old[:, 3]]) if code else old)
            assert (img == data.arrays(i)[0]).all()                              # a function of (seed, epoch, position)
    assert 12 < sum(o == 4 for o in codes) < 36


def test_names():
    assert detectors.SINGLE_STAGE == ("ssd_resnet_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
    with pytest.raises(ValueError, match="unknown detector 'ssd512'"): build_single_stage("ssd512")
