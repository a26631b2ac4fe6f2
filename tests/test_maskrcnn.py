"""torchvision's contract, what is frozen, tight boxes, and the same answers from PyTorch and onnxruntime."""
import urllib.error

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torchvision.models import resnet18
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import masks_to_boxes
from torchvision.ops.misc import FrozenBatchNorm2d

from shipnb import maskrcnn
from shipnb.augment import RandomDownsample
from shipnb.catalog import read_airbus
from shipnb.dataset import DecodedCache, make_loader
from shipnb.dataset_tasks import DetectionDataset
from shipnb.fleet import make_fleet
from shipnb.maskrcnn import (COCO_FILE, VesselDataset, build_maskrcnn, detect, export_onnx, instance_labels, keep_sizes, load_maskrcnn, mask_boxes,
                             replace_heads, run_onnx)
from shipnb.masks import label_boxes
from shipnb.models import build_detector, save_model
from shipnb.optim import build_optimizer
from shipnb.sampler import ShipStratifiedSampler
from shipnb.tasks import detection_task
from shipnb.training import Learner


@pytest.fixture(scope="module")
def fleet(tmp_path_factory): return read_airbus(make_fleet(tmp_path_factory.mktemp("maskrcnn")/"fleet", images=6, seed=3))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A cache of torch's with a file in the place of COCO's weights: random ones, of the right shapes. What it makes is torchvision's own path."""
    folder = tmp_path_factory.mktemp("hub")
    (folder/"checkpoints").mkdir()
    torch.manual_seed(1)
    state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save({name: o for name, o in state.items() if "num_batches" not in name}, folder/"checkpoints"/COCO_FILE)
    before = torch.hub.get_dir()
    torch.hub.set_dir(folder)
    yield state
    torch.hub.set_dir(before)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No file in the cache and no way to get one."""
    def refuse(*_, **__): raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))


def small(seed=0, size=96):
    torch.manual_seed(seed)
    return keep_sizes(build_detector("maskrcnn", min_size=size, max_size=size, channels=16, head=32, proposals=20, most=10, score_threshold=0.0))


def targets(*shapes):
    """One square object in each image, and one of a single pixel."""
    out = []
    for h, w in shapes:
        masks = torch.zeros((2, h, w), dtype=torch.uint8)
        masks[0, 10:30, 12:40], masks[1, 5, 6] = 1, 1
        out.append(dict(boxes=mask_boxes(masks), labels=torch.ones(2, dtype=torch.int64), masks=masks))
    return out


# --- the published architecture

@pytest.mark.parametrize("layers", [0, 2, 3, 5])
def test_as_many_stages_are_trained_as_asked(coco, layers):
    model = build_maskrcnn(trainable_backbone_layers=layers)
    stages = ["layer4", "layer3", "layer2", "layer1", "conv1"][:layers]
    for name, o in model.backbone.body.named_parameters(): assert o.requires_grad == (name.split(".")[0] in stages), name
    assert all(o.requires_grad for part in (model.backbone.fpn, model.rpn, model.roi_heads) for o in part.parameters())
    assert model.start == "coco" and sum(isinstance(o, FrozenBatchNorm2d) for o in model.modules()) == 53


def test_frozen_stages_stay_as_they_are_in_a_step_of_the_learner(coco):
    model = keep_sizes(build_maskrcnn(trainable_backbone_layers=1))
    before = {name: o.clone() for name, o in model.state_dict().items()}
    learner = Learner(model, detection_task(), build_optimizer("sgd", model, 1e-4), device="cpu", monitor="ap50")
    learner.model.train()
    learner.step([dict(image=[torch.rand(3, 64, 64)] * 2, target=[t | dict(iscrowd=torch.zeros(2, dtype=torch.bool)) for t in targets((64, 64), (64, 64))], index=torch.arange(2))])
    after = learner.trained.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("conv1", "layer1", "layer2", "layer3")
    assert {name for name in before if name.startswith(tuple(f"backbone.body.{o}" for o in frozen))} <= same
    assert "backbone.body.layer4.0.conv1.weight" not in same and "roi_heads.mask_predictor.mask_fcn_logits.weight" not in same


def test_all_but_the_heads_comes_from_the_weights(coco):
    model = build_maskrcnn(3)
    state = model.state_dict()
    heads = ("roi_heads.box_predictor", "roi_heads.mask_predictor")
    for name, value in state.items(): assert name.startswith(heads) or torch.equal(value, coco[name]), name
    assert state["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3 and state["roi_heads.box_predictor.bbox_pred.weight"].shape[0] == 12
    assert state["roi_heads.mask_predictor.mask_fcn_logits.weight"].shape[0] == 3


def test_a_folder_of_the_published_architecture_gives_the_same_answers(coco, tmp_path):
    torch.manual_seed(0)
    model = build_maskrcnn(min_size=64, max_size=64, box_score_thresh=0.0, box_detections_per_img=5).eval()
    card = dict(architecture="maskrcnn_resnet50_fpn", encoder="resnet50", classes=1, in_channels=3, size=[64, 64], window=[64, 64], start=model.start,
                build=dict(min_size=64, max_size=64, box_score_thresh=0.0, box_detections_per_img=5))
    save_model(tmp_path, model, card)
    again, _ = load_maskrcnn(tmp_path)
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad(): a, b = model(image)[0], again(image)[0]
    assert len(a["scores"]) and all(torch.equal(a[o], b[o]) for o in a)
    save_model(tmp_path, model, {name: o for name, o in card.items() if name != "start"})
    with pytest.raises(ValueError, match="lacks start"): load_maskrcnn(tmp_path)
    save_model(tmp_path, small(), card)
    with pytest.raises(ValueError, match="does not fit its card"): load_maskrcnn(tmp_path)


@pytest.mark.parametrize("start", [dict(), dict(pretrained=False)])
def test_without_the_weights_an_error_says_what_to_do(offline, start):
    with pytest.raises(ValueError, match="scratch_if_offline=True") as error: build_maskrcnn(**start)
    assert "checkpoints" in str(error.value) and ".pth" in str(error.value)
    with pytest.warns(UserWarning, match="going on from scratch"): model = build_maskrcnn(scratch_if_offline=True, trainable_backbone_layers=2, **start)
    assert model.start == "none" and all(o.requires_grad for o in model.parameters())
    assert not any(isinstance(o, FrozenBatchNorm2d) for o in model.modules())


def test_frozen_norms_of_a_backbone_from_scratch_normalise_nothing():
    """The caveat: with frozen norms of statistics 0 and 1, ten times the input is ten times the output; ordinary norms give what they gave."""
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for norm, factor in ((FrozenBatchNorm2d, 10), (torch.nn.BatchNorm2d, 1)):
        body = resnet18(norm_layer=norm).train()
        body.fc = torch.nn.Identity()
        with torch.no_grad(): once, tenfold = body(x), body(10 * x)
        assert torch.allclose(tenfold, factor * once, rtol=0.01, atol=0.01 * factor)


def test_refusals():
    with pytest.raises(ValueError, match="0 to 5, not 7"): build_maskrcnn(trainable_backbone_layers=7)
    with pytest.raises(ValueError, match="random weights cannot stay"): build_maskrcnn(pretrained=False, pretrained_backbone=False, trainable_backbone_layers=0)
    with pytest.raises(ValueError, match="at least 2"): replace_heads(small(), 1)


# --- the contract

def test_training_mode_gives_the_five_losses_for_images_of_different_sizes():
    model, shapes = small().train(), ((64, 96), (96, 64), (48, 80))
    losses = model([torch.rand(3, *o) for o in shapes], targets(*shapes))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert all(o.ndim == 0 and torch.isfinite(o) for o in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(o.grad).all() for o in model.parameters() if o.grad is not None)


def test_eval_mode_gives_boxes_labels_scores_and_soft_masks_in_each_images_own_size():
    model, shapes = small().eval(), ((64, 96), (96, 64))
    with torch.no_grad(): found = model([torch.rand(3, *o) for o in shapes])
    for one, (h, w) in zip(found, shapes):
        n = len(one["scores"])
        assert n and {k: (tuple(o.shape), o.dtype) for k, o in one.items()} == dict(
            boxes=((n, 4), torch.float32), labels=((n,), torch.int64), scores=((n,), torch.float32), masks=((n, 1, h, w), torch.float32))
        assert (one["boxes"] >= 0).all() and (one["boxes"][:, [0, 2]] <= w).all() and (one["boxes"][:, [1, 3]] <= h).all()
        assert (one["masks"] >= 0).all() and (one["masks"] <= 1).all() and (one["scores"].diff() <= 0).all() and (one["labels"] == 1).all()


def test_an_image_answers_alike_alone_and_beside_a_larger_one():
    model = small().eval()
    torch.manual_seed(2)
    a, b = torch.rand(3, 64, 64), torch.rand(3, 64, 64)
    with torch.no_grad(): alone, beside = model([a])[0], model([a, b])[0]
    for name in alone: assert torch.allclose(alone[name].float(), beside[name].float(), atol=1e-4), name


def test_detect_gives_what_the_model_gives_and_puts_it_on_other_grids():
    model, image = small().eval(), torch.rand(3, 64, 96)
    with torch.no_grad(): own = model([image])[0]
    assert all(torch.equal(own[k], o) for k, o in detect(model, [image])[0].items())
    large = detect(model, [image], [(128, 192)])[0]
    assert torch.allclose(large["boxes"], 2 * own["boxes"]) and large["masks"].shape[-2:] == (128, 192)
    with pytest.raises(ValueError, match="in training mode"): detect(model.train(), [image])


# --- boxes, data, instances

masks_of_pixels = strategies.lists(strategies.sets(strategies.tuples(strategies.integers(0, 11), strategies.integers(0, 8)), min_size=1), max_size=5)


@given(masks_of_pixels)
@settings(max_examples=200, deadline=None)
def test_boxes_are_tight_around_masks(pixels):
    masks = torch.zeros((len(pixels), 12, 9), dtype=torch.uint8)
    for mask, places in zip(masks, pixels): mask[tuple(zip(*places))] = 1
    boxes = mask_boxes(masks)
    assert boxes.shape == (len(pixels), 4) and boxes.dtype == torch.float32
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        inside = mask[y0:y1, x0:x1]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        assert [x0, y0, x1, y1] == label_boxes(mask.numpy().astype(np.int32))[0].tolist()
    if len(pixels): assert torch.equal(boxes - torch.tensor([0, 0, 1, 1]), masks_to_boxes(masks))   # torchvision's end with the last pixel


def test_without_changes_the_data_set_is_the_detection_data_set(fleet):
    ours, plain = VesselDataset(fleet, (192, 192)), DetectionDataset(fleet, (192, 192), masks=True)
    for i in range(len(fleet)):
        (a, s), (b, t) = ours[i], plain[i]
        assert torch.equal(a, b) and torch.equal(s["masks"], t["masks"]) and torch.equal(s["boxes"], mask_boxes(t["masks"]))


@pytest.mark.parametrize("options", [dict(crop=64), dict(downsample=RandomDownsample(p=1, factor=(1.5, 3))), dict(crop=64, downsample=RandomDownsample(p=0.5, factor=(1.5, 3)))])
def test_targets_fit_their_images_whatever_is_done_to_them(fleet, options):
    data = VesselDataset(fleet, (192, 192), augment="d4", **options)
    for epoch in range(3):
        data.set_epoch(epoch)
        for i in range(len(fleet)):
            image, target = data[i]
            n = len(target["labels"])
            assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1 and max(image.shape[1:]) <= options.get("crop", 192)
            assert target["masks"].shape == (n, *image.shape[1:]) and target["masks"].dtype == torch.uint8 and len(target["iscrowd"]) == n
            assert torch.equal(target["boxes"], mask_boxes(target["masks"])) and target["labels"].dtype == torch.int64
    again = VesselDataset(fleet, (192, 192), augment="d4", **options)
    again.set_epoch(2)
    assert torch.equal(again[1][0], data[1][0]) and torch.equal(again[1][1]["masks"], data[1][1]["masks"])


def test_a_crop_shows_the_same_pixels_under_image_and_mask(fleet):
    i = int(fleet.counts.argmax())
    (whole, target), (part, cut) = VesselDataset(fleet, (192, 192))[i], VesselDataset(fleet, (192, 192), crop=64, crop_on_ship=1.0)[i]
    assert cut["masks"].any()
    places = [(y, x) for y in range(129) for x in range(129) if torch.equal(whole[:, y, x:x + 64], part[:, 0]) and torch.equal(whole[:, y:y + 64, x:x + 64], part)]
    assert len(places) == 1
    (y, x), = places
    there = target["masks"][:, y:y + 64, x:x + 64]
    assert torch.equal(there[there.flatten(1).any(1).bool()], cut["masks"])


def test_instances_are_disjoint_and_the_better_score_wins():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, soft = np.sort(rng.random(6))[::-1].copy(), rng.random((6, 1, 9, 11))
        labels, kept = instance_labels(dict(scores=torch.from_numpy(scores), masks=torch.from_numpy(soft)), 0.3, 0.6)
        for y, x in np.ndindex(9, 11):
            over = [k for k in range(6) if scores[k] >= 0.3 and soft[k, 0, y, x] >= 0.6]
            assert (labels[y, x] == 0) == (not over) and (not over or kept[labels[y, x] - 1] == over[0])


def test_thresholds_are_kept_at_equality():
    labels, kept = instance_labels(dict(scores=torch.tensor([0.5]), masks=torch.full((1, 1, 2, 2), 0.5)))
    assert labels.min() == 1 and kept.tolist() == [0]


def test_the_learner_lowers_the_loss_and_goes_on_where_it_stopped(fleet, tmp_path):
    cache = DecodedCache.open(fleet, (96, 96), folder=tmp_path/"cache")
    def learner(folder):
        model = small()
        data = VesselDataset(fleet, (96, 96), ["ship"], cache, "d4", RandomDownsample(p=0.5, factor=(1.5, 2)), 64, 1.0)
        loader = make_loader(data, ShipStratifiedSampler(fleet.counts, 2, batches_per_epoch=3))
        return Learner(model, detection_task(), build_optimizer("adam", model, 1e-3), None, folder, device="cpu", monitor="ap50", key="k"), loader
    one, loader = learner(tmp_path/"one")
    history = [row["loss"] for row in one.epochs(4, loader)]
    assert history[-1] < history[0]
    two, loader = learner(tmp_path/"two")
    for _ in two.epochs(2, loader): two.save()
    three, loader = learner(tmp_path/"two")
    assert three.resume() and three.epoch == 2
    for _ in three.epochs(4, loader): pass
    assert all(torch.equal(a, b) for a, b in zip(one.trained.state_dict().values(), three.trained.state_dict().values()))


# --- ONNX

def test_onnxruntime_answers_as_pytorch_does(tmp_path):
    """A fixed batch of two images of fixed, different sizes: the same detections; boxes to 0.01 pixel, scores and masks to 1e-4."""
    pytest.importorskip("onnxruntime")
    import onnx
    model, shapes = small(3).eval(), ((64, 96), (96, 64))
    torch.manual_seed(4)
    first, second = ([torch.rand(3, *o) for o in shapes] for _ in range(2))
    path = export_onnx(model, tmp_path/"small.onnx", first)
    assert onnx.load(path).opset_import[0].version == 11 and type(model) is type(small())
    for images in (first, second):
        with torch.no_grad(): ours = model(images)
        for a, b in zip(ours, run_onnx(path, images), strict=True):
            assert len(a["scores"]) == len(b["scores"]) > 0 and torch.equal(a["labels"], b["labels"])
            assert torch.allclose(a["boxes"], b["boxes"], atol=1e-2) and torch.allclose(a["scores"], b["scores"], atol=1e-4)
            # a mask is pasted at its box rounded to pixels, so a box that differs in the last digit may move a pixel at its rim
            assert a["masks"].shape == b["masks"].shape and ((a["masks"] - b["masks"]).abs() > 1e-4).float().mean() < 1e-3


def test_a_missing_onnx_is_named_with_its_extra(monkeypatch, tmp_path):
    def missing(name): raise ImportError(name)
    monkeypatch.setattr(maskrcnn, "import_module", missing)
    for call in (lambda: export_onnx(small().eval(), tmp_path/"no.onnx", []), lambda: run_onnx(tmp_path/"no.onnx", [])):
        with pytest.raises(ImportError, match=r"pip install 'shipnb\[onnx\]'"): call()
    assert not list(tmp_path.iterdir())


def test_the_extra_holds_what_is_named():
    from configparser import ConfigParser

    from shipnb.files import project_root
    config = ConfigParser(delimiters=["="])
    config.read(project_root()/"settings.ini")
    assert {o.split(">")[0] for o in config["DEFAULT"]["onnx_requirements"].split()} == {"onnx", "onnxruntime"}
