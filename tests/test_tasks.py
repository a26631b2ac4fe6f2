"""One loop, three tasks: losses equal to the plain ones, evaluation without traces, and bit-equal continuation after a stop at any step."""
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shipnb.catalog import Catalog
from shipnb.dataset import DecodedCache, make_loader, to_target, turn
from shipnb.dataset_tasks import CropDataset, DetectionDataset, turn_boxes
from shipnb.fleet_tasks import make_chips, make_tanks
from shipnb.formats import fill_boxes, read
from shipnb.metrics import average_precision, dice
from shipnb.models import build_classifier, build_detector
from shipnb.optim import build_optimizer, build_schedule
from shipnb.sampler import BalancedSampler, ShipStratifiedSampler
from shipnb.tasks import Task, channels_task, crop_task, detection_task, first_class, losses_without_traces, softmax_task
from shipnb.training import Learner

SIZE = (64, 64)


@pytest.fixture(scope="module")
def tanks(tmp_path_factory): return read(make_tanks(tmp_path_factory.mktemp("tasks")/"tanks", images=10, seed=1, valid=0.2))


@pytest.fixture(scope="module")
def chips(tmp_path_factory): return read(make_chips(tmp_path_factory.mktemp("tasks")/"chips", images=18, seed=1), "folders")


def small_detector(kind="fasterrcnn", seed=0):
    torch.manual_seed(seed)
    return build_detector(kind, min_size=64, max_size=64, channels=16, head=32, proposals=20, most=20)


# --- datasets

@pytest.mark.parametrize("code", range(8))
def test_boxes_turn_as_their_masks_do(code):
    rng = np.random.default_rng(code)
    for _ in range(30):
        shape = tuple(rng.integers(8, 40, 2).tolist())
        y, x = (np.sort(rng.choice(o + 1, 2, replace=False)) for o in shape)
        mask = np.zeros(shape, bool)
        mask[y[0]:y[1], x[0]:x[1]] = True
        rows, columns = np.nonzero(turn(mask, code))
        assert turn_boxes([[x[0], y[0], x[1], y[1]]], code, shape).tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]


def test_the_batch_is_torchvision_s(tanks):
    dataset = DetectionDataset(tanks, (128, 256), augment="flips")
    (batch,) = make_loader(dataset, batch_size=10)
    assert [o.shape for o in batch["image"]] == [(3, 128, 256)] * 10 and all(o.dtype == torch.float32 and 0 <= o.min() and o.max() <= 1 for o in batch["image"])
    assert [len(o["boxes"]) for o in batch["target"]] == tanks.counts.tolist() and 0 in tanks.counts and batch["index"].tolist() == list(range(10))
    for target in batch["target"]:
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape[1:] == (4,) and target["labels"].dtype == torch.int64
        assert (target["labels"] == 1).all() and (target["boxes"][:, 2:] > target["boxes"][:, :2]).all() and (target["boxes"] >= 0).all()
        assert (target["boxes"] <= torch.tensor([256, 128, 256, 128])).all()


def test_boxes_are_scaled_with_their_image(tanks):
    i = int(tanks.counts.argmax())
    name = tanks.images["image"].iat[i]
    want = tanks.objects.loc[tanks.objects["image"] == name, ["x0", "y0", "x1", "y1"]].to_numpy(float) * [0.25, 0.5, 0.25, 0.5]
    assert np.allclose(DetectionDataset(tanks, (256, 128))[i][1]["boxes"].numpy(), want, atol=1e-4)
    own = DetectionDataset(tanks, None)
    assert own[i][0].shape == (3, 512, 512) and np.array_equal(own[i][1]["boxes"].numpy(), want * [4, 2, 4, 2])


def test_cache_workers_and_order_change_nothing(tanks, chips, tmp_path):
    for dataset, again in ((DetectionDataset(tanks, SIZE, augment="d4"), DetectionDataset(tanks, SIZE, cache=DecodedCache.open(tanks, SIZE, tmp_path/"a"), augment="d4")),
                           (CropDataset(chips, SIZE, augment="d4"), CropDataset(chips, SIZE, cache=DecodedCache.open(chips, SIZE, tmp_path/"b"), augment="d4"))):
        dataset.set_epoch(3), again.set_epoch(3)
        plain, workers = ([o for o in make_loader(d, [[3, 0], [5, 1]], workers=w)] for d, w in ((dataset, 0), (again, 2)))
        same(plain, workers)
        first = [dataset[i] for i in (5, 0)]
        dataset.set_epoch(4)
        moved = [dataset[i] for i in range(8)]
        dataset.set_epoch(3)
        same([dataset[i] for i in (5, 0)], first)
        assert any(differs(a, b) for a, b in zip(moved, [dataset[i] for i in range(8)])), "no epoch augments differently"


def leaves(value):
    """All tensors in nested lists and dicts."""
    if isinstance(value, torch.Tensor): return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [leaf for o in parts for leaf in leaves(o)]


def differs(a, b): return any(not torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def same(a, b): assert leaves(a) and not differs(a, b)


def test_masks_stay_in_their_boxes_and_turn(tanks):
    filled = fill_boxes(tanks)
    dataset = DetectionDataset(filled, (128, 128), augment="d4", masks=True)
    i = int(tanks.counts.argmax())
    for epoch in range(6):
        dataset.set_epoch(epoch)
        target = dataset[i][1]
        assert target["masks"].shape == (tanks.counts[i], 128, 128) and target["masks"].dtype == torch.uint8
        for mask, box in zip(target["masks"].numpy(), target["boxes"].numpy()):
            rows, columns = np.nonzero(mask)
            assert np.abs(np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - box).max() <= 1
    empty = int(np.flatnonzero(tanks.counts == 0)[0])
    assert dataset[empty][1]["masks"].shape == (0, 128, 128)


def test_bad_boxes_and_strange_labels_are_refused(tanks):
    flat = tanks.objects.copy()
    flat.loc[flat.index[2], "x1"] = flat["x0"].iloc[2]
    with pytest.raises(ValueError, match=f"{flat['image'].iloc[2]}.*has no area"): DetectionDataset(Catalog(tanks.images, flat, tanks.root), SIZE)
    with pytest.raises(ValueError, match="the label 'tank' is not one of ship, boat"): DetectionDataset(tanks, SIZE, ["ship", "boat"])
    with pytest.raises(ValueError, match="unknown augment"): DetectionDataset(tanks, SIZE, augment="spin")


def test_an_image_without_a_class_is_refused(chips):
    images = chips.images.copy()
    images.loc[3, "category"] = ""
    with pytest.raises(ValueError, match=f"{images['image'].iat[3]}: no class"): CropDataset(Catalog(images, chips.objects, chips.root))


# --- the balanced sampler

@pytest.mark.parametrize("sizes, size, world", [((40, 8, 4), 6, 1), ((7, 30), 4, 2), ((5, 5, 5, 9), 3, 1), ((3,), 2, 1)])
def test_balanced_batches(sizes, size, world):
    labels = np.repeat(np.arange(len(sizes)) * 3, sizes)
    ranks = [BalancedSampler(labels, size, seed=2, rank=r, world_size=world) for r in range(world)]
    batches = [sum((o.batch(epoch, b) for o in ranks), []) for epoch in range(8) for b in range(len(ranks[0]))]
    assert all(len(o) == size * world for o in batches)
    shown = np.bincount(labels[np.concatenate(batches)] // 3, minlength=len(sizes))
    assert shown.max() - shown.min() <= 1
    times = np.bincount(np.concatenate(batches), minlength=len(labels))
    for k in range(len(sizes)): assert np.ptp(times[labels == 3 * k]) <= 1, "an image came again before all of its class had come"


def test_the_balanced_sampler_goes_on_where_it_stood():
    labels = np.repeat([0, 1], [20, 9])
    one = BalancedSampler(labels, 4, seed=1)
    assert list(one) != list(one), "two epochs are the same"
    one.seek(3, 2)
    rest = list(one)
    assert rest == [one.batch(3, b) for b in range(2, len(one))] and one.epoch == 4
    again = BalancedSampler(labels, 4, seed=1)
    again.load_state_dict(one.state_dict(3, 2))
    assert list(again) == rest
    with pytest.raises(ValueError, match="another sampler"): BalancedSampler(labels, 4, seed=2).load_state_dict(one.state_dict())


# --- tasks

@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_the_loss_is_the_model_s_own_and_crowds_are_no_examples(tanks, kind):
    batch = DetectionDataset(tanks, SIZE).__getitems__(range(4))
    model = small_detector(kind)
    torch.manual_seed(5)
    ours = detection_task().loss(model, batch)
    torch.manual_seed(5)
    plain = [{k: o[k] for k in ("boxes", "labels")} for o in batch["target"]]
    theirs = small_detector(kind)
    torch.manual_seed(5)
    theirs = theirs(batch["image"], plain)
    assert {f"loss_{k}" if f"loss_{k}" in theirs else k: v.item() for k, v in ours.items()} == pytest.approx({k: v.item() for k, v in theirs.items()}, rel=1e-5)
    for target in batch["target"]: target["iscrowd"][:] = True
    none = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)) for _ in plain]
    torch.manual_seed(5)
    crowds = detection_task().loss(small_detector(kind).eval(), batch)
    with losses_without_traces(small_detector(kind).eval()) as frozen: empty = frozen(batch["image"], none)
    assert sum(crowds.values()).item() == pytest.approx(sum(empty.values()).item(), rel=1e-5)


def test_evaluation_leaves_no_trace(tanks):
    loader, model = make_loader(DetectionDataset(tanks, SIZE), batch_size=4), small_detector()
    opt = build_optimizer("sgd", model, 0.01)
    one = Learner(model, detection_task(), opt, device="cpu", monitor="ap50", progress=False)
    one.model.train()
    before, state = {k: v.clone() for k, v in one.model.state_dict().items()}, torch.get_rng_state()
    first, second = one.evaluate(loader), one.evaluate(loader)
    assert first == pytest.approx(second, nan_ok=True) and first["valid_loss"] > 0 and first["n"] == 10
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in one.model.state_dict().items())
    assert not any(o.requires_grad and o.grad is not None for o in model.parameters())


def test_an_error_inside_the_evaluation_restores_the_modes():
    model = small_detector().eval()
    model.backbone.body.layer1.train()
    with pytest.raises(RuntimeError), losses_without_traces(model): raise RuntimeError("no")
    assert not model.training and model.backbone.body.layer1.training


def test_boxes_are_not_rounded_by_autocast():
    """Fabric casts every float argument to bfloat16; at 200 pixels that is a pixel. The loss must be that of the exact boxes."""
    seen = {}
    model = small_detector()
    def watch(rpn, args): seen["boxes"], seen["features"] = args[2][0]["boxes"], next(iter(args[1].values())).dtype
    model.rpn.register_forward_pre_hook(watch)
    one = Learner(model, detection_task(), build_optimizer("sgd", model, 0.01), device="cpu", precision="bf16-mixed", progress=False)
    target = dict(boxes=torch.tensor([[40.3, 33.7, 60.9, 58.1]]), labels=torch.tensor([1]), iscrowd=torch.tensor([False]))
    losses = detection_task().loss(one.model, dict(image=[torch.rand(3, 64, 64)], target=[target], index=torch.tensor([0])))
    assert torch.equal(seen["boxes"], target["boxes"]) and seen["features"] == torch.float32
    assert model.backbone.mixed and all(torch.isfinite(o) for o in losses.values())
    with pytest.raises(TypeError, match="bfloat16"): one.model([torch.rand(3, 64, 64)], [{k: target[k] for k in ("boxes", "labels")}])   # what Exact is for


def test_predictions_are_scored_as_average_precision(tanks):
    batch = DetectionDataset(tanks, SIZE).__getitems__(range(10))
    truth = [dict(o, scores=torch.ones(len(o["boxes"]))) for o in batch["target"]]
    metric = detection_task().metric()
    metric.update(truth, batch)
    assert metric.compute()["ap"] == 1 == average_precision(truth, batch["target"])["ap"]


def test_channels_and_softmax_against_the_plain_losses():
    rng = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 8, (3, 6, 5), generator=rng, dtype=torch.uint8)
    y = torch.stack([(mask >> k) & 1 for k in range(3)], 1).float()
    assert torch.equal(to_target(mask, classes=3), y)
    batch = dict(image=torch.randint(0, 255, (3, 6, 5, 3), dtype=torch.uint8, generator=rng), mask=mask)
    z = torch.randn(3, 3, 6, 5, generator=rng)
    fixed = Fixed(z)
    assert channels_task(3).loss(fixed, batch)["bce"].item() == pytest.approx(F.binary_cross_entropy_with_logits(z, y).item(), rel=1e-6)
    metric = channels_task(3).metric()
    metric.update(channels_task(3).predict(fixed, batch), batch)
    want = dice((torch.sigmoid(z) >= 0.5), y.bool())
    assert metric.compute()["dice"] == pytest.approx(want.mean().item()) and metric.compute()["dice_2"] == pytest.approx(want[:, 1].mean().item())
    volume = dice((torch.sigmoid(z) >= 0.5).flatten(1, 2), y.bool().flatten(1, 2))
    assert metric.compute()["dice_volume"] == pytest.approx(volume.mean().item())

    kinds = torch.tensor([[next((k + 1 for k in range(3) if v >> k & 1), 0) for v in row] for row in mask.flatten(1).tolist()]).view(mask.shape)
    assert torch.equal(first_class(y), kinds)
    z, weights = torch.randn(3, 4, 6, 5, generator=rng), [0.1, 1, 2, 3]
    task = softmax_task(3, weights)
    assert task.loss(Fixed(z), batch)["ce"].item() == pytest.approx(F.cross_entropy(z, kinds, torch.tensor(weights)).item(), rel=1e-6)
    metric = task.metric()
    metric.update(task.predict(Fixed(z), batch), batch)
    per_class = torch.stack([dice(z.argmax(1) == k, kinds == k) for k in (1, 2, 3)], 1)
    assert metric.compute()["dice"] == pytest.approx(per_class.mean().item())


class Fixed(nn.Module):
    """A model that answers `z`, whatever it is asked."""
    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(z)
    def forward(self, x): return self.z


def test_crop_loss_is_cross_entropy(chips):
    batch = CropDataset(chips, SIZE).__getitems__([0, 5, 17])
    z = torch.randn(3, 2)
    assert crop_task(2, [1, 3], 0.1).loss(Fixed(z), batch)["ce"].item() == pytest.approx(F.cross_entropy(z, batch["label"], torch.tensor([1.0, 3]), label_smoothing=0.1).item())
    metric = crop_task(2).metric()
    metric.update(crop_task(2).predict(Fixed(F.one_hot(batch["label"], 2).float()), batch), batch)
    assert metric.compute()["accuracy"] == 1


# --- the same Learner goes on bit-equal

def detection_run(tanks, folder, precision="32-true", ema=0.0):
    data = DetectionDataset(tanks, SIZE, augment="d4", seed=1)
    train = make_loader(data, ShipStratifiedSampler(tanks.counts, 3, 0.25, batches_per_epoch=2))
    model = small_detector()
    opt = build_optimizer("adamw", model, 1e-3)
    one = Learner(model, detection_task(), opt, build_schedule("onecycle", opt, 4), folder, device="cpu", monitor="ap50", progress=False, precision=precision, clip=5.0, ema=ema)
    return one, train, make_loader(DetectionDataset(tanks.subset([0, 1]), SIZE), batch_size=2)


def crop_run(chips, folder, precision="32-true", ema=0.0):
    data = CropDataset(chips, SIZE, augment="d4", seed=1)
    torch.manual_seed(0)
    model = build_classifier("resnet18", 2)
    opt = build_optimizer("adamw", model, 1e-3)
    one = Learner(model, crop_task(2), opt, build_schedule("onecycle", opt, 4), folder, device="cpu", monitor="balanced_accuracy", progress=False, precision=precision, ema=ema)
    return one, make_loader(data, BalancedSampler(data.labels, 4, batches_per_epoch=2)), make_loader(CropDataset(chips, SIZE), batch_size=9)


def stop_at(one, at):
    """Ask for a stop, as Ctrl+C does, in training step number `at`."""
    task, steps = one.task, []
    def loss(model, batch):
        if model.training:
            steps.append(0)
            if len(steps) == at: os.kill(os.getpid(), signal.SIGINT)
        return task.loss(model, batch)
    one.task = Task(loss, task.predict, task.metric)


@pytest.mark.parametrize("name, run, precision, ema, stops", [("tanks", detection_run, "32-true", 0.0, (1, 2, 3, 4)), ("tanks", detection_run, "bf16-mixed", 0.9, (3,)),
                                                              ("chips", crop_run, "32-true", 0.0, (1,)), ("chips", crop_run, "bf16-mixed", 0.9, (3,))])
def test_stopped_at_any_step_it_goes_on_bit_equal(request, tmp_path, name, run, precision, ema, stops):
    data = request.getfixturevalue(name)
    whole, train, valid = run(data, None, precision, ema)
    for _ in whole.epochs(2, train, valid): pass
    for at in stops:
        first, train, valid = run(data, tmp_path/str(at), precision, ema)
        stop_at(first, at)
        with pytest.raises(KeyboardInterrupt, match="Run the same again"):
            for _ in first.epochs(2, train, valid): pass
        again, train, valid = run(data, tmp_path/str(at), precision, ema)
        torch.rand(7)                       # whatever else has drawn in between
        assert again.resume()
        for _ in again.epochs(2, train, valid): pass
        assert all(torch.equal(a, b) for a, b in zip(whole.trained.state_dict().values(), again.trained.state_dict().values())), f"stopped at step {at}"
        drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        assert repr(drop(whole.history)) == repr(drop(again.history)), f"stopped at step {at}"
