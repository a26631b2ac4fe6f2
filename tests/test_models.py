"""Model folders: round trip, refusals, pretrained weights that cannot be had."""
import pytest
import torch
from safetensors.torch import save_file

from shipnb.models import DECODER, build_unet, load_card, load_model, save_model

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
