"""The crack document's classifier: its traps shown and absent here, pooling, the backbone used again, training that goes on, and scores equal to scikit-learn's."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import shipnb.classifiers as classifiers
from shipnb.classifiers import (CropRecipe, SigmoidClassifier, auc_draws, build_crop_classifier, classifier_scores, f1_draws, image_gate, log_odds, precision_draws, score_crops, sigmoid_task, train_classifier)
from shipnb.dataset_tasks import CropDataset
from shipnb.fleet_tasks import make_cracks
from shipnb.formats import read
from shipnb.models import body_names, build_classifier, load_model, save_model
from shipnb.optim import freeze
from shipnb.proposals import cut_crops, read_crops
from shipnb.tasks import crop_task
from shipnb.thresholds import bootstrap_ratio

FAST = CropRecipe(size=32, epochs=2, batch_size=8, patience=0)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cracks")
    catalog = read_crops(cut_crops(read(make_cracks(folder/"roads", images=4, seed=1)), folder/"cut", by="windows", most=12, size=32))
    assert set(catalog.images["category"]) == {"0", "1"}
    return catalog


def halves(crops): return np.arange(0, len(crops), 2), np.arange(1, len(crops), 2)


# --- the network

@pytest.mark.parametrize("name, features", [("resnet18", 512), ("resnext50_32x4d", 2048)])
def test_the_head_takes_the_backbone_s_features(name, features):
    model = build_classifier(name).eval()
    assert model.fc.in_features == features and model.fc.out_features == 2
    with torch.inference_mode(): assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_a_pool_is_the_mean_or_the_highest_of_the_last_stage(pool):
    torch.manual_seed(1)
    model, maps = build_classifier("resnet18", pool=pool).eval(), []
    model.layer4.register_forward_hook(lambda layer, given, out: maps.append(out))
    with torch.inference_mode():
        z = model(torch.rand(2, 3, 96, 64))
        features = maps[0].mean((2, 3)) if pool == "avg" else maps[0].amax((2, 3))
        assert maps[0].shape[2:] == (3, 2) and torch.allclose(z, model.fc(features), atol=1e-5)
    theirs = torchvision.models.resnet18(weights=None, num_classes=2).eval()
    theirs.load_state_dict(model.state_dict())                         # pooling has no weights
    with torch.inference_mode(): assert torch.equal(theirs(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64))) == (pool == "avg")


def test_keys_from_before_there_was_a_pool_hold():
    assert CropRecipe().key("x") == "3447d8443ed99b2d" and CropRecipe(size=192, epochs=15, precision="bf16-mixed").key("a", "b") == "73a97210fa0010be"
    assert len({CropRecipe(**o).key("x") for o in ({}, {"pool": "max"}, {"keep_head": True}, {"pool": "max", "keep_head": True})}) == 4


def test_a_card_keeps_the_pool_and_one_without_means_the_average(crops, tmp_path):
    train, valid = halves(crops)
    model, _, folder = train_classifier(crops, train, valid, replace(FAST, epochs=1, pool="max"), tmp_path)
    again, card = load_model(folder/"model")
    assert card["pool"] == "max" and np.array_equal(score_crops(again, crops, 32), score_crops(model, crops, 32))
    save_model(tmp_path/"old", model, {name: o for name, o in card.items() if name != "pool"})
    older, _ = load_model(tmp_path/"old")
    assert isinstance(older.avgpool, torch.nn.AdaptiveAvgPool2d) and not np.allclose(score_crops(older, crops, 64), score_crops(model, crops, 64))     # 2 x 2 cells; at 32 there is one
    save_model(tmp_path/"odd", model, card | {"pool": "median"})
    with pytest.raises(ValueError, match="card.json: pool must be one of avg, max"): load_model(tmp_path/"odd")


def test_a_head_that_is_kept_goes_on_from_where_it_was(crops, tmp_path):
    train, valid = halves(crops)
    model, _, folder = train_classifier(crops, train, valid, FAST, tmp_path)
    start = replace(FAST, weights=str(folder/"model"/"model.safetensors"), keep_head=True)
    network, _ = build_crop_classifier(start)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), network.state_dict().values()))
    still, _, _ = train_classifier(crops, train, valid, replace(start, epochs=1, lr=1e-12, frozen=True), tmp_path)
    assert np.allclose(score_crops(still, crops, 32), score_crops(model, crops, 32), atol=1e-4)
    with pytest.raises(ValueError, match="none does not exist"): build_crop_classifier(replace(FAST, keep_head=True))
    with pytest.raises(ValueError, match="replay"): build_crop_classifier(replace(FAST, head="sigmoid", pool="max"))


def test_asking_for_the_size_with_zeros_moves_batch_norm_and_building_does_not():
    theirs = torchvision.models.resnet18(weights=None)                 # in training mode, as it is built
    with torch.no_grad(): theirs(torch.zeros(2, 3, 64, 64))
    assert int(theirs.bn1.num_batches_tracked) == 1 and not torch.equal(theirs.bn1.running_var, torch.ones(64))
    for ours in (build_classifier("resnet18"), SigmoidClassifier("resnet18").feature_extractor):
        assert all(int(value) == 0 for name, value in ours.named_buffers() if name.endswith("num_batches_tracked"))
        assert torch.equal(ours.bn1.running_var, torch.ones(64)) and torch.equal(ours.bn1.running_mean, torch.zeros(64))


def test_the_replay_sits_on_the_imagenet_logits():
    model = SigmoidClassifier("resnet18")
    assert model.feature_extractor.fc.out_features == model.classifier[1].in_features == 1000
    with torch.inference_mode(): p = model.eval()(torch.randn(3, 3, 64, 64))
    assert p.shape == (3, 1) and (p > 0).all() and (p < 1).all()


def one_batch(n): return dict(image=torch.zeros(n, 64, 64, 3, dtype=torch.uint8), label=torch.arange(n) % 2, index=torch.arange(n))


def test_a_batch_of_one_breaks_squeeze_and_not_ours():
    p = torch.full((1, 1), 0.5)
    with pytest.raises(ValueError, match="size"): F.binary_cross_entropy(p.squeeze(), torch.ones(1))
    for model, task in ((SigmoidClassifier("resnet18").eval(), sigmoid_task()), (build_classifier("resnet18").eval(), crop_task(2))):
        (loss,), predicted = task.loss(model, one_batch(1)).values(), task.predict(model, one_batch(1))
        assert torch.isfinite(loss) and predicted.shape == (1, 2) and torch.allclose(predicted.sum(1), torch.ones(1))
        metric = task.metric()
        metric.update(predicted.detach(), one_batch(1))
        assert metric.compute()["n"] == 1


def test_the_replay_s_loss_is_bceloss_and_equals_the_loss_on_logits():
    model = SigmoidClassifier("resnet18").eval()
    batch = one_batch(4) | dict(image=torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        p = sigmoid_task().predict(model, batch)[:, 1]
        loss = float(sigmoid_task().loss(model, batch)["bce"])
    assert loss == pytest.approx(float(torch.nn.BCELoss()(p, batch["label"].float())), abs=1e-7)
    assert loss == pytest.approx(float(F.binary_cross_entropy_with_logits(torch.logit(p), batch["label"].float())), abs=1e-5)


def test_log_odds_of_both_heads():
    z = torch.tensor([[1.0, 3.0], [0.5, -2.0]])
    assert torch.allclose(log_odds(lambda x: z, None), torch.logit(z.softmax(1)[:, 1]), atol=1e-5)
    assert torch.allclose(log_odds(lambda x: torch.sigmoid(z[:, :1]), None), z[:, 0], atol=1e-5)


# --- the backbone, trained and used again

def test_a_frozen_backbone_stays_to_the_bit_under_a_new_head(crops, tmp_path):
    train, valid = halves(crops)
    model, _, folder = train_classifier(crops, train, valid, FAST, tmp_path)
    again, card = load_model(folder/"model")
    assert card["architecture"] == "classifier" and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    reused, _, _ = train_classifier(crops, train, valid, CropRecipe(**{**FAST.__dict__, "weights": str(folder/"model"/"model.safetensors"), "frozen": True, "seed": 3}), tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, reused.state_dict()[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_the_whole_backbone_is_trained_when_it_is_not_frozen():
    model = build_classifier("resnet18")
    names = body_names(model)
    assert freeze(model, names=names) == sum(o.numel() for name, o in model.named_parameters() if not name.startswith("fc"))
    assert [name for name, o in model.named_parameters() if o.requires_grad] == ["fc.weight", "fc.bias"]
    assert all(o.requires_grad for o in build_classifier("resnet18").parameters())


# --- training

class Stopped(Exception): pass


def test_a_stopped_training_ends_where_an_unbroken_one_does(crops, tmp_path, monkeypatch):
    train, valid = halves(crops)
    whole, table, _ = train_classifier(crops, train, valid, FAST, tmp_path/"whole")
    save, calls = classifiers.save_model, []

    def save_once(*args):
        calls.append(1)
        if len(calls) == 1: return save(*args)
        raise Stopped

    recipe = CropRecipe(**{**FAST.__dict__, "lr": FAST.lr})
    monkeypatch.setattr(classifiers, "save_model", save_once)
    monkeypatch.setattr(classifiers.Learner, "evaluate", lowering(classifiers.Learner.evaluate))
    with pytest.raises(Stopped): train_classifier(crops, train, valid, recipe, tmp_path/"stopped")
    monkeypatch.undo()
    other, log, _ = train_classifier(crops, train, valid, recipe, tmp_path/"stopped")
    assert log["loss"].tolist() == table["loss"].tolist()
    assert log["valid_loss"].tolist()[1:] == table["valid_loss"].tolist()[1:]
    if table["valid_loss"].argmin() == log["valid_loss"].argmin(): assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values()))


def lowering(evaluate):
    """Evaluation whose loss falls each time, so that every epoch is the best so far."""
    seen = []

    def falling(self, loader):
        seen.append(1)
        return evaluate(self, loader) | {"valid_loss": 100.0 - len(seen)}
    return falling


@pytest.mark.parametrize("losses, epochs, best", [([3, 2, 5, 6, 7, 1], 5, 1), ([5, 4, 3, 2, 1, 0], 6, 5), ([1, 2, 3, 4], 4, 0), ([1, 1, 1, 1, 1], 4, 0)])
def test_patience_of_three_keeps_the_lowest_loss(crops, tmp_path, monkeypatch, losses, epochs, best):
    """The document's EarlyStopping: the third epoch without a lower loss is the last."""
    given = iter(losses)
    monkeypatch.setattr(classifiers.Learner, "evaluate", lambda self, loader: {"valid_loss": float(next(given)), "balanced_accuracy": 0.5})
    monkeypatch.setattr(classifiers.Learner, "_train_epoch", lambda self, loader: setattr(self, "totals", {"ce": 1.0, "n": 1}))
    monkeypatch.setattr(classifiers.Learner, "save", lambda self, *args, **kw: None)
    train, valid = halves(crops)
    recipe = CropRecipe(**{**FAST.__dict__, "patience": 3, "epochs": len(losses)})
    _, table, folder = train_classifier(crops, train, valid, recipe, tmp_path, train_scores=False)
    assert len(table) == epochs and table["best"].tolist() == [k == best for k in range(epochs)]
    assert load_model(folder/"model")[1]["metrics"]["epoch"] in {k for k in range(epochs) if table["valid_loss"][k] == table["valid_loss"].min()}


def test_scores_are_those_of_the_dataset_s_images(crops, tmp_path):
    train, valid = halves(crops)
    model, _, _ = train_classifier(crops, train, valid, CropRecipe(**{**FAST.__dict__, "epochs": 1}), tmp_path)
    scores, gate = score_crops(model, crops, 32), image_gate(model, 32)
    data = CropDataset(crops, (32, 32), ["0", "1"])
    p = torch.cat([crop_task(2).predict(model, data.__getitems__([i])) for i in range(6)])[:, 1]
    assert np.allclose(torch.logit(p).detach().numpy(), scores[:6], atol=1e-4)
    assert np.allclose([gate(crops.read_image(i)) for i in range(6)], scores[:6], atol=1e-4)


def test_name_and_iou_are_at_hand_for_looking_into_a_batch(crops):
    batch = CropDataset(crops, (32, 32), ["0", "1"]).__getitems__([5, 1])
    rows = crops.images.iloc[batch["index"].numpy()]
    assert rows["category"].astype(int).tolist() == batch["label"].tolist()
    assert [float(o.split(".")[2].replace("_", ".")) for o in rows["image"]] == rows["iou"].tolist()


# --- scores

@pytest.mark.parametrize("seed", range(6))
def test_precision_of_resamples_is_scikit_learn_s(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    labels, scores, groups = rng.integers(0, 2, n), np.round(rng.normal(0, 1, n), int(rng.integers(0, 3))), rng.integers(0, 9, n)
    labels[0] = 1
    member = np.unique(groups.astype(str), return_inverse=True)[1]
    k = member.max() + 1
    times = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), 40)
    for got, weights in zip(precision_draws(scores, labels, groups, 40, seed, chunk=7), times):
        keep = weights[member] > 0
        if not (labels[keep] == 1).any(): assert np.isnan(got)
        else: assert got == pytest.approx(average_precision_score(labels[keep], scores[keep], sample_weight=weights[member][keep]), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_areas_of_resamples_are_scikit_learn_s(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    labels, scores, groups = rng.integers(0, 2, n), np.round(rng.normal(0, 1, n), int(rng.integers(0, 3))), rng.integers(0, 9, n)
    labels[:2] = 0, 1
    member = np.unique(groups.astype(str), return_inverse=True)[1]
    k = member.max() + 1
    times = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), 40)[:, member]
    for got, weights in zip(auc_draws(scores, labels, groups, 40, seed), times):
        keep = weights > 0
        if len(set(labels[keep])) < 2: assert np.isnan(got)
        else: assert got == pytest.approx(roc_auc_score(labels[keep], scores[keep], sample_weight=weights[keep]), abs=1e-12)


def test_the_resamples_are_the_house_s():
    groups, scores = np.array(list("aabbcc")), np.arange(6.0)
    assert bootstrap_ratio(scores, np.ones(6), groups, 50, 3).tolist() == [np.average(scores, weights=w[[0, 0, 1, 1, 2, 2]]) for w in np.random.default_rng(3).multinomial(3, np.full(3, 1 / 3), 50)]


def test_f1_of_resamples_is_scikit_learn_s():
    rng = np.random.default_rng(1)
    labels, scores, groups = rng.integers(0, 2, 40), rng.normal(0, 1, 40), np.repeat(np.arange(8), 5)
    times = np.random.default_rng(2).multinomial(8, np.full(8, 1 / 8), 30)
    assert np.allclose(f1_draws(scores, labels, groups, 30, 2), [f1_score(np.repeat(labels, w[groups]), np.repeat(scores >= 0, w[groups])) for w in times], atol=1e-12)


def test_a_strategy_s_gain_is_over_the_first():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 2, 200), np.repeat(np.arange(20), 10)
    good, bad = labels + rng.normal(0, 0.5, 200), rng.normal(0, 1, 200)
    table = classifier_scores({"bad": [bad], "good": [good, good]}, labels, groups, 300)
    assert table.gain["bad"] == 0 and table.gain_low["good"] > 0 and table.average_precision["good"] == pytest.approx(average_precision_score(labels, good))
    assert len(table.f1_seeds["good"]) == 2 and table.average_precision_low["good"] <= table.average_precision["good"] <= table.average_precision_high["good"]


# --- real images

@pytest.mark.filterwarnings("ignore:37 images")
def test_real_crops_keep_images_apart(real_data, tmp_path):
    roads = read(real_data/"crackforest").subset(np.arange(4))
    catalog = read_crops(cut_crops(roads, tmp_path/"cut", most=30, size=32))
    assert len(catalog) == 120 and set(catalog.images["group"]) == {o.split(".")[0] for o in roads.images["image"]}
    assert 0 < (catalog.images["category"] == "1").sum() < 30
