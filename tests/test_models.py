"""Model folders: round trip, refusals, pretrained weights that cannot be had."""
import pytest
import torch
from safetensors.torch import save_file

from shipnb.models import ANCHORS, DECODER, build_classifier, build_detector, build_unet, load_card, load_model, save_model

CARD = dict(architecture="unet", encoder="resnet18", classes=1, in_channels=3, size=[64, 64], window=[96, 96])


@pytest.fixture(scope="module")
def model(): return build_unet().eval()


def test_gives_logits_at_input_size(model):
    with torch.inference_mode(): z = model(torch.randn(2, 3, 64, 96))
    assert z.shape == (2, 1, 64, 96) and z.min() < 0 and not isinstance(model.segmentation_head[-1], torch.nn.Sigmoid)


def test_a_folder_is_a_model(model, tmp_path):
    save_model(tmp_path/"m", model, CARD)
    again, card = load_model(tmp_path/"m")
    assert card == CARD and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert sorted(o.name for o in (tmp_path/"m").iterdir()) == ["card.json", "model.safetensors"]


def test_a_narrow_decoder_comes_back(tmp_path):
    narrow = build_unet(decoder=[16, 8, 8, 4, 4]).eval()
    assert [o.conv2[0].out_channels for o in narrow.decoder.blocks] == [16, 8, 8, 4, 4]
    save_model(tmp_path/"m", narrow, CARD | {"decoder": [16, 8, 8, 4, 4]})
    again, x = load_model(tmp_path/"m")[0], torch.randn(1, 3, 64, 64)
    with torch.inference_mode(): assert torch.equal(again(x), narrow(x))
    save_model(tmp_path/"m", narrow, CARD | {"decoder": list(DECODER)})
    with pytest.raises(ValueError, match="does not fit its card"): load_model(tmp_path/"m")


def test_channels_last_weights_are_saved(model, tmp_path):
    save_model(tmp_path/"m", build_unet().to(memory_format=torch.channels_last), CARD)
    load_model(tmp_path/"m")


def test_weights_of_another_network_are_refused(model, tmp_path):
    save_model(tmp_path/"m", model, CARD | {"classes": 2})
    with pytest.raises(ValueError, match="does not fit its card"): load_model(tmp_path/"m")


@pytest.mark.parametrize("text,error", [("{", ValueError), ("[]", ValueError), ('{"architecture": "unet"}', ValueError)])
def test_bad_cards(model, tmp_path, text, error):
    save_model(tmp_path/"m", model, CARD)
    (tmp_path/"m"/"card.json").write_text(text)
    with pytest.raises(error): load_card(tmp_path/"m")


def test_encoder_weights_from_a_file(model, tmp_path):
    save_file(dict(model.encoder.state_dict()), tmp_path/"encoder.safetensors")
    again = build_unet(encoder_weights=str(tmp_path/"encoder.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.state_dict().values(), again.encoder.state_dict().values()))
    with pytest.raises(ValueError, match="does not fit"): build_unet("resnet34", encoder_weights=str(tmp_path/"encoder.safetensors"))


def test_a_download_that_fails_says_what_to_use(monkeypatch):
    import segmentation_models_pytorch.encoders as encoders
    def offline(*args, **kwargs): raise ConnectionError("no internet")
    monkeypatch.setattr(encoders, "get_encoder", offline)
    import segmentation_models_pytorch.decoders.unet.model as unet
    monkeypatch.setattr(unet, "get_encoder", offline)
    with pytest.raises(ValueError, match="could not be downloaded.*encoder_weights='none'"): build_unet(encoder_weights="imagenet")


# --- detectors and classifiers

IMAGES = [torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.mark.parametrize("kind, build", [("fasterrcnn", {"channels": 16, "proposals": 30}), ("retinanet", {"channels": 16}), ("maskrcnn", {"channels": 16, "head": 32, "proposals": 30})])
def test_a_detector_trains_and_its_folder_is_the_detector(tmp_path, kind, build):
    torch.manual_seed(0)
    one = build_detector(kind, classes=2, min_size=64, max_size=96, score_threshold=0.0, **build)
    boxes = torch.tensor([[8.0, 8, 30, 24]])
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 8:24, 8:30] = 1
    targets = [dict(boxes=boxes, labels=torch.tensor([2]), masks=mask), dict(boxes=boxes[:0], labels=torch.zeros(0, dtype=torch.int64), masks=mask[:0])]
    losses = one(IMAGES, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(o) for o in losses.values()) and all(torch.isfinite(p.grad).all() for p in one.parameters() if p.grad is not None)
    trained = [o for o in one.modules() if isinstance(o, torch.nn.BatchNorm2d)]
    assert trained and all(o.weight.requires_grad and int(o.num_batches_tracked) == 1 for o in trained), "batch norm is frozen"
    card = dict(architecture=kind, encoder="resnet18", classes=2, in_channels=3, size=[64, 96], window=[64, 96], build=build | {"score_threshold": 0.0})
    save_model(tmp_path/"m", one, card)
    again, found = load_model(tmp_path/"m")
    assert found == card and not again.training
    with torch.inference_mode():
        for a, b in zip(one.eval()(IMAGES), again(IMAGES)): assert len(a["boxes"]) and all(torch.equal(a[k], b[k]) for k in a)
    save_model(tmp_path/"m", one, card | {"classes": 3})
    with pytest.raises(ValueError, match="does not fit its card"): load_model(tmp_path/"m")
    save_model(tmp_path/"m", one, card | {"build": {"chanels": 16}})
    with pytest.raises(ValueError, match="card.json: .*chanels"): load_model(tmp_path/"m")


def test_the_detector_is_torchvision_s_on_the_same_weights():
    """Our builder only chooses numbers: torchvision's own class with the same parts gives the same boxes."""
    from torchvision.models.detection import FasterRCNN
    one = build_detector(min_size=64, max_size=96, channels=16, score_threshold=0.0).eval()
    theirs = FasterRCNN(one.backbone, rpn_anchor_generator=one.rpn.anchor_generator, num_classes=None, box_roi_pool=one.roi_heads.box_roi_pool, box_head=one.roi_heads.box_head,
                        box_predictor=one.roi_heads.box_predictor, min_size=64, max_size=96, rpn_pre_nms_top_n_test=400, rpn_post_nms_top_n_test=200, box_score_thresh=0.0).eval()
    theirs.load_state_dict(one.state_dict())
    with torch.inference_mode():
        for a, b in zip(one(IMAGES), theirs(IMAGES)): assert all(torch.equal(a[k], b[k]) for k in a)


def test_small_objects_have_an_anchor():
    """Every square of 6 to 180 pixels in the middle of a step's cell overlaps some anchor by more than the 0.3 below which it would be background."""
    sizes = torch.tensor(ANCHORS, dtype=torch.float64)
    for side in range(6, 181): assert (torch.minimum(sizes, torch.tensor(side))**2 / torch.maximum(sizes, torch.tensor(side))**2).max() > 0.3


def test_a_copy_of_a_detector_runs_by_itself():
    """The moving average of the weights copies the model; the copy must not run the original's layers."""
    import copy
    one = build_detector(min_size=64, max_size=64, channels=16).eval()
    other = copy.deepcopy(one)
    with torch.no_grad():
        for p in one.parameters(): p.zero_()
        assert next(iter(one.backbone(torch.rand(1, 3, 64, 64)).values())).abs().max() == 0
        assert next(iter(other.backbone(torch.rand(1, 3, 64, 64)).values())).abs().max() > 0


def test_a_classifier_s_folder_is_the_classifier(tmp_path):
    one = build_classifier("resnet18", 3).eval()
    save_model(tmp_path/"m", one, dict(architecture="classifier", encoder="resnet18", classes=3, in_channels=3, size=[80, 80], window=[80, 80], labels=["a", "b", "c"]))
    again, card = load_model(tmp_path/"m")
    x = torch.rand(2, 3, 80, 80)
    with torch.inference_mode(): assert torch.equal(one(x), again(x)) and card["labels"] == ["a", "b", "c"]


def test_a_classifier_starts_from_a_file_of_another_number_of_classes(tmp_path):
    one = build_classifier("resnet18", 5)
    torch.save(one.state_dict(), tmp_path/"w.pt")
    again = build_classifier("resnet18", 2, str(tmp_path/"w.pt"))
    assert torch.equal(one.layer4[1].conv2.weight, again.layer4[1].conv2.weight) and again.fc.out_features == 2
    with pytest.raises(ValueError, match="does not fit"): build_classifier("resnet34", 2, str(tmp_path/"w.pt"))
    detector = build_detector(weights=str(tmp_path/"w.pt"), channels=16)
    assert torch.equal(detector.backbone.body.layer4[1].conv2.weight, one.layer4[1].conv2.weight)


def test_a_torchvision_download_that_fails_says_what_to_use(monkeypatch):
    import torchvision
    def offline(*args, **kwargs): raise ConnectionError("no internet")
    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    with pytest.raises(ValueError, match="could not be downloaded.*use 'none'"): build_classifier(weights="imagenet")
    with pytest.raises(ValueError, match="could not be downloaded.*use 'none'"): build_detector(weights="imagenet")
