"""Several processes against one: the same images, gradients, scores; bit-equal continuation; what happens when one is killed.

Most processes are copies of this one (`launch`); those of the last tests are started by torchrun, which runs this file as a script.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from shipnb import runs
from shipnb.catalog import read_airbus
from shipnb.checkpoints import list_checkpoints, read_checkpoint
from shipnb.fleet import make_fleet
from shipnb.losses import LOSSES
from shipnb.metrics import ClassificationMeter, DetectionMeter
from shipnb.optim import build_optimizer, build_schedule
from shipnb.parallel import Shard, by_first, deal, gather, in_order, launch, processes, shard, sum_step
from shipnb.sampler import BalancedSampler, ShipStratifiedSampler
from shipnb.tasks import Task, channels_task, crop_task, segmentation_task, softmax_task
from shipnb.thresholds import collect_evidence
from shipnb.training import Learner, Recipe, make_learner, make_loaders, quick_model, set_seeds, split_by, train_model

WORLDS = (1, 2, 4)


def on(function, world): return launch(function, world, "cpu")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A small catalog, its parts, and a recipe of ten images a batch: 4 processes have 3, 3, 2 and 2."""
    catalog = read_airbus(make_fleet(tmp_path_factory.mktemp("fleet")/"set", 40, seed=3))
    recipe = Recipe(size=32, batch_size=10, precision="32-true", epochs=2, encoder="tu-resnet10t", decoder=[8, 8, 8, 8, 8], crop=0, schedule="constant", lr=1e-3)
    parts = split_by(catalog, 0.4)
    make_loaders(catalog, parts, recipe)      # decodes once
    return catalog, parts, recipe


# --- 1. images

SAMPLERS = [lambda: ShipStratifiedSampler([0] * 30 + [1] * 20 + [2] * 11, 10, 0.25, 0.3, seed=5), lambda: ShipStratifiedSampler([0, 1, 2, 3, 0, 1, 1, 0], 7), lambda: BalancedSampler([0] * 9 + [1] * 30 + [2] * 14, 11)]


@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_shards_of_a_batch_are_the_batch(make, world):
    whole, shards = make(), [Shard(make(), rank, world) for rank in range(world)]
    for epoch, start in ((0, 0), (3, 1)):
        for one in (whole, *shards): one.seek(epoch, min(start, len(whole) - 1))
        batches = list(whole)
        assert batches and [len(list(o)) for o in shards] == [len(batches)] * world
        for one in shards: one.seek(epoch, min(start, len(whole) - 1))
        for images, parts in zip(batches, zip(*shards)):
            assert sorted(sum(parts, [])) == sorted(images)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_loaders_give_the_same_augmented_images(fleet):
    def seen():
        loader, _ = make_loaders(*fleet)
        loader.dataset.set_epoch(1), loader.batch_sampler.seek(1, 0)
        return [[(int(k), img.numpy().tobytes(), msk.numpy().tobytes()) for k, img, msk in zip(o["index"], o["image"], o["mask"])] for o in loader]
    def together(): return [sorted(sum(parts, [])) for parts in zip(*gather(seen()))]
    one = seen()
    assert len(one) >= 2 and all(len(o) == 10 for o in one)
    for world in WORLDS: assert on(together, world) == [sorted(o) for o in one]


def test_batches_smaller_than_the_processes_and_loaders_that_are_not_cut_are_refused(fleet):
    catalog, parts, recipe = fleet
    with pytest.raises(RuntimeError, match="a batch of 3 images cannot be shared by 4 processes"):
        on(lambda: make_loaders(catalog, parts, replace(recipe, batch_size=3)) and None, 4)
    with pytest.raises(RuntimeError, match="give its sampler to shipnb.parallel.shard"):
        on(lambda: [None for _ in learner().epochs(1, plain_loader())], 2)
    with pytest.raises(RuntimeError, match="quick_model trains in one process"): on(quick_model, 2)


# --- 2. gradients

def masks(n, classes=1, ignored=False):
    """Masks of n images, of which some hold nothing, with pixels to ignore if asked; images that go with them."""
    rng = np.random.default_rng(7)
    mask = (rng.random((n, 8, 8)) < rng.choice([0, 0, 0.2, 0.6], n)[:, None, None]).astype(np.uint8)
    if classes > 1: mask *= rng.integers(0, 2**classes, mask.shape, dtype=np.uint8)
    if ignored: mask[rng.random(mask.shape) < 0.3] = 255
    if ignored: mask[1] = 255
    return dict(image=torch.from_numpy(rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)), mask=torch.from_numpy(mask), index=torch.arange(n), has_ship=torch.from_numpy((mask == 1).any((1, 2))))


def crops(n):
    return masks(n) | {"label": torch.from_numpy(np.random.default_rng(3).integers(0, 3, n))}


class Pooled(nn.Module):
    def __init__(self): super().__init__(); self.net = conv(3)
    def forward(self, x): return self.net(x).mean((2, 3))


def conv(outputs=1):
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, outputs, 3, padding=1))


LINEAR = [o for o in LOSSES if o != "batch_dice"]
CASES = {name: (lambda name=name: (segmentation_task(name), conv(), masks(30))) for name in LINEAR}
CASES |= {f"{name}, ignored": (lambda name=name: (segmentation_task({name: {"ignore": 255}}), conv(), masks(30, ignored=True))) for name in LINEAR if name != "lovasz"}
CASES |= {"sum": lambda: (segmentation_task({"bce": 1, "dice_with": 0.7, "lovasz": 0.2}), conv(), masks(30)),
          "classes": lambda: (channels_task(2, {name: {"class_weights": [1, 3]} for name in ("bce", "dice_with", "dice", "focal")}), conv(2), masks(30, 2)),
          "softmax": lambda: (softmax_task(2, [0.3, 1, 2]), conv(3), masks(30, 2)),
          "crops": lambda: (crop_task(3, [1, 2, 5], 0.1), Pooled(), crops(30))}
SIZES = {1: [10], 2: [10, 9], 3: [10, 9, 11]}     # images of the whole batches of a step; none divides by 4


def gradients(names=tuple(CASES), split=1):
    """{(case, batches a step): (gradient, loss parts)} of one step, in this process or together with others."""
    (rank, world), found = processes(), {}
    for name in names:
        for accumulate, sizes in SIZES.items():
            task, model, images = CASES[name]()
            one = Learner(model, task, build_optimizer("sgd", model, 0.1), accumulate=accumulate, device="cpu", progress=False)
            one._update, one.split = lambda: None, split
            edges = np.cumsum([0, *sizes])
            parts, norm = one.step([{k: v[a:b][rank::world] for k, v in images.items()} for a, b in zip(edges, edges[1:])])
            found[name, accumulate] = torch.cat([o.grad.flatten() for o in model.parameters()]).numpy(), {k: float(v) for k, v in parts.items()}
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_and_losses_are_those_of_one_process(world):
    alone, together = gradients(), on(gradients, world)
    assert alone.keys() == together.keys() and len(alone) > 50
    for case, (gradient, parts) in alone.items():
        other, sums = together[case]
        assert np.abs(gradient).max() > 1e-4, f"{case}: a gradient of zero proves nothing"
        assert np.abs(other - gradient).max() < 1e-5 * max(1, np.abs(gradient).max()), case
        assert sums.keys() == parts.keys() and all(abs(sums[k] - parts[k]) < 1e-5 for k in parts), (case, parts, sums)


def test_gradients_with_batches_in_pieces_too():
    """Out of memory, each process cuts its own part of the batches."""
    names = ["bce", "dice_with", "classes"]
    alone, together = gradients(names), on(lambda: gradients(names, split=2), 2)
    for case, (gradient, _) in alone.items(): assert np.abs(together[case][0] - gradient).max() < 1e-5, case


def test_without_the_shares_gradients_would_be_others():
    """The comparison is not blind: equal weights for unequal parts miss by much more than 1e-5."""
    def careless():
        Learner._counts = lambda self, batch: {"index": 1}
        return gradients(["bce", "dice_with"])
    alone, together = gradients(["bce", "dice_with"]), on(careless, 4)
    assert all(np.abs(together[case][0] - alone[case][0]).max() > 1e-4 for case in alone)


def test_batch_dice_is_that_of_each_process_s_part():
    """A ratio over the whole batch is no mean: it differs, and is the mean of the parts' ratios, as the notebook says."""
    CASES["batch_dice"] = lambda: (segmentation_task("batch_dice"), conv(), masks(30))
    try:
        alone, together = (o["batch_dice", 1] for o in (gradients(["batch_dice"]), on(lambda: gradients(["batch_dice"]), 4)))
    finally: task, model, images = CASES.pop("batch_dice")()
    parts = [{k: v[:10][rank::4] for k, v in images.items()} for rank in range(4)]
    expected = sum(float(task.loss(model, o)["batch_dice"]) * len(o["index"]) / 10 for o in parts)
    assert abs(together[1]["batch_dice"] - expected) < 1e-6 and abs(alone[1]["batch_dice"] - expected) > 1e-4


def test_parameters_without_a_gradient():
    """One that no process reaches keeps none; one that some reach has the sum in all."""
    def step():
        rank, _ = processes()
        net = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))
        for o in net.parameters(): nn.init.constant_(o, 1.0)
        loss = net[0](torch.ones(1, 2)).sum() + (net[1](torch.ones(1, 2)).sum() if rank == 1 else 0)
        loss.backward()
        sum_step(net, {"loss": loss.detach()}, 0.5)
        return gather([None if o.grad is None else o.grad.flatten().tolist() for o in net.parameters()])
    assert on(step, 2) == [[[2.0, 2.0], [2.0], [1.0, 1.0], [1.0], None, None]] * 2


# --- 3. scores

def score(one, loader): return {k: np.float64(v).tobytes() for k, v in one.evaluate(loader).items()}


def test_scores_are_bit_equal(fleet):
    catalog, parts, recipe = fleet
    recipe = replace(recipe, batch_size=5)
    def scores():
        one = make_learner(recipe, 3, device="cpu")
        torch.manual_seed(1)
        nn.init.normal_(one.model.module.segmentation_head[0].weight, std=1.0)
        for o in one.model.module.modules():
            if isinstance(o, nn.BatchNorm2d): nn.init.normal_(o.running_mean)
        _, valid = make_loaders(catalog, parts, recipe)
        return gather((score(one, valid), len(valid)))
    found = [o for world in WORLDS for o in on(scores, world)]
    assert len(found) == 7 and all(o == found[0] for o in found) and found[0][1] >= 3
    assert 0.001 < np.frombuffer(found[0][0]["dice_with"])[0] < 0.98, "a model that finds something, and not all"


def test_evidence_is_bit_equal(fleet, tmp_path):
    catalog = fleet[0].subset(np.arange(13))
    def evidence(together=True):
        torch.manual_seed(2)
        model = conv()
        found = collect_evidence(model, catalog, (64, 64), (96, 96), batch_size=3, together=together)
        assert [o.image for o in found.records] == catalog.images["image"].tolist()
        path = tmp_path/f"{processes()}.npz"
        found.save(path)
        return gather(path.read_bytes())
    whole = [o for world in WORLDS for o in on(evidence, world)]
    assert len(whole) == 7 and all(o == whole[0] for o in whole)
    assert on(lambda: evidence(together=False), 2) == whole[:2], "each for itself, without talking"


def test_meters_of_detection_and_crops_merge_in_order():
    rng = np.random.default_rng(0)
    boxes = lambda n: np.cumsum(rng.random((n, 2, 2)) * 20, 1).reshape(n, 4)
    batches = [[(dict(boxes=boxes(6), scores=rng.integers(0, 3, 6) / 2, labels=rng.integers(0, 2, 6)), dict(boxes=boxes(4), labels=rng.integers(0, 2, 4))) for _ in range(3)] for _ in range(7)]
    chips = [(torch.from_numpy(rng.random((5, 3))), torch.from_numpy(rng.integers(0, 3, 5))) for _ in range(6)]
    def merged():
        boxes, crops = DetectionMeter(), ClassificationMeter(3)
        def one(batch):
            meter = DetectionMeter()
            meter.update(*zip(*batch))
            return meter
        def chip(batch):
            meter = ClassificationMeter(3)
            meter.update(*batch)
            return meter
        for o in in_order(one(batch) for batch in deal(batches)): boxes.merge(o)
        for o in in_order(chip(batch) for batch in deal(chips)): crops.merge(o)
        return boxes.compute(), crops.compute()
    alone = DetectionMeter()
    for batch in batches: alone.update(*zip(*batch))
    assert alone.compute()["ap50"] > 0
    for world in WORLDS: assert on(merged, world)[0] == alone.compute() and on(merged, world)[1] == on(merged, 1)[1]


# --- 4. batch norm

def test_batch_norm_sees_a_process_s_part_and_its_statistics_are_averaged():
    def statistics():
        (rank, world), images = processes(), masks(10)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3, padding=2))
        one = Learner(model, segmentation_task("bce"), build_optimizer("sgd", model, 0.1), device="cpu", progress=False)
        one.step([{k: v[rank::world] for k, v in images.items()}])
        return gather([o.tolist() for o in (model[1].running_mean, model[1].running_var, model[0].weight.flatten())])
    alone, together = on(statistics, 1)[0], on(statistics, 4)
    assert all(o == together[0] for o in together), "all processes hold the same"
    assert np.allclose(alone[0], together[0][0], atol=1e-6), "the mean of the means is the mean"
    assert not np.allclose(alone[1], together[0][1], atol=1e-6) and np.allclose(alone[1], together[0][1], rtol=0.1), "the variances lack what lies between the parts"
    assert not np.allclose(alone[2], together[0][2], atol=1e-7)


def test_synchronised_batch_norm_is_for_cuda():
    with pytest.raises(ValueError, match="sync_batchnorm needs CUDA"): make_learner(Recipe(sync_batchnorm=True, encoder="tu-resnet10t"), 1, device="cpu")


# --- 5. continuing

class Points:
    """Thirty points of a plane, as batches of {x, y, index}."""
    epoch = 0
    def __len__(self): return 30
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitems__(self, indices):
        index = torch.tensor(indices)
        x = torch.stack([index / 15 - 1, torch.sin(index + 0.01 * self.epoch)], 1)
        return dict(x=x, y=x.prod(1, keepdim=True), index=index)


class Squares:
    """The mean squared error over what was seen."""
    def __init__(self): self.total, self.n = 0.0, 0
    def update(self, p, batch): self.total, self.n = self.total + float(((p - batch["y"])**2).sum()), self.n + len(p)
    def merge(self, other): self.total, self.n = self.total + other.total, self.n + other.n
    def compute(self): return {"score": -self.total / self.n}


class Once:
    """A process's own signal to itself (or to all of them) in one step."""
    def __init__(self, at=0, number=0, rank=0): self.at, self.number, self.rank = at, number, rank


def plain_loader(): return torch.utils.data.DataLoader(Points(), batch_sampler=ShipStratifiedSampler([0, 1, 2] * 10, 10), collate_fn=lambda o: o, generator=torch.Generator())


def loaders():
    """Three batches of ten an epoch, cut for this process; and seven whole ones in order."""
    train = torch.utils.data.DataLoader(Points(), batch_sampler=shard(ShipStratifiedSampler([0, 1, 2] * 10, 10)), collate_fn=lambda o: o, generator=torch.Generator())
    return train, torch.utils.data.DataLoader(Points(), batch_size=4, collate_fn=lambda o: o, generator=torch.Generator())


def learner(folder=None, accumulate=1, sched="onecycle", ema=0.0, once=None, opt="adam", **options):
    """Some 20,000 weights with dropout, so that their order in a sum matters and the processes' random numbers do."""
    set_seeds(0)
    model = nn.Sequential(nn.Linear(2, 128), nn.Dropout(0.2), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    steps = 0
    def loss(model, batch):
        nonlocal steps
        steps += model.training
        if once and model.training and steps == once.at and processes()[0] == once.rank: os.kill(os.getpid(), once.number)
        return {"mse": nn.functional.mse_loss(model(batch["x"]), batch["y"])}
    task = Task(loss, lambda model, batch: model(batch["x"]), Squares)
    optimiser = build_optimizer(opt, model, 0.01)
    sched = build_schedule(sched, optimiser, 4 * -(-3 // accumulate), **({"warmup_steps": 2} if sched == "cosine" else {}))
    return Learner(model, task, optimiser, sched, folder, accumulate=accumulate, device="cpu", key="k", monitor="score", progress=False, ema=ema, save_every=int(folder is not None), log_every=1, **options)


SETUPS = {"plain": {}, "average": dict(accumulate=2, sched="plateau", ema=0.7), "momentum": dict(sched="cosine", opt="sgd", clip=0.1)}


def train(folder, name="plain", until=4, stop_after=None, once=None):
    """Start or continue a training; stop after a step as a process that is killed would, all at once and without saving more."""
    one = learner(folder, once=once, **SETUPS[name])
    one.resume()
    count = one._count
    def counted(*o):
        count(*o)
        if one.steps == stop_after:
            one.save()
            raise StopIteration
    one._count = counted
    train_loader, valid_loader = loaders()
    try:
        for _ in one.epochs(until, train_loader, valid_loader): one.save()
    except (StopIteration, RuntimeError) as error:
        if stop_after is None or "StopIteration" not in repr(error): raise
    return end(one)


def end(one):
    """Everything that must be equal at the end, of all processes."""
    plain = {k: v for k, v in one.state().items() if k in ("epoch", "batch", "steps", "skipped", "recent", "sched", "rng")}
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in one.history]
    tensors = [o.detach() for o in (*one.model.module.state_dict().values(), *one.trained.state_dict().values())]
    moments = [o[k] for o in one.opt.state_dict()["state"].values() for k in sorted(o) if isinstance(o[k], torch.Tensor)]
    return plain_bytes([tensors, moments, plain, history, gather([o.numpy().tobytes() for o in tensors])])


def plain_bytes(value):
    """Tensors as bytes, so that == compares bits."""
    if isinstance(value, torch.Tensor): return value.numpy().tobytes()
    if isinstance(value, dict): return {k: plain_bytes(v) for k, v in value.items()}
    return [plain_bytes(o) for o in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", SETUPS)
def test_continued_it_ends_bit_equal(tmp_path, world, name):
    whole = on(lambda: train(tmp_path/"whole", name), world)
    assert len(whole[2]["rng"]) == world and len({o["torch"] for o in whole[2]["rng"]}) == world, "each process has random numbers of its own"
    assert all(o == whole[4][0] for o in whole[4]) and len(whole[4]) == world, "all hold the same weights"
    assert whole == on(lambda: train(tmp_path/"again", name), world), "twice the same"
    for at in range(1, 8 if name == "average" else 12, 1 if (world, name) == (4, "plain") else 4):
        on(partial(train, tmp_path/str(at), name, stop_after=at), world)
        assert on(partial(train, tmp_path/str(at), name), world) == whole, f"stopped after step {at}"


def test_the_first_process_alone_writes_and_reads(tmp_path):
    def own(until): return train(tmp_path/f"rank{processes()[0]}", until=until) and None
    on(lambda: own(2), 2)
    on(lambda: own(4), 2)      # the others' folders do not exist, as on another machine
    assert [o.name for o in tmp_path.iterdir()] == ["rank0"]
    lines = [json.loads(o)["step"] for o in (tmp_path/"rank0"/"steps.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 13)) and len((tmp_path/"rank0"/"log.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("before, after", [(2, 4), (4, 1), (1, 2)])
def test_on_another_number_of_processes_it_goes_on_with_the_same_batches(tmp_path, before, after, capfd):
    def seen(stop_after=None):
        one, images = learner(tmp_path), []
        one.resume()
        backward, count = one._backward, one._count
        def watched(group):
            images.append((one.epoch, one.batch, sorted(sum(gather([k for o in group for k in o["index"].tolist()]), []))))
            return backward(group)
        def counted(*o):
            count(*o)
            if one.steps == stop_after: one.save(); raise StopIteration
        one._backward, one._count = watched, counted
        try:
            for _ in one.epochs(4, *loaders()): one.save()
        except (StopIteration, RuntimeError): assert stop_after
        return images, one.history
    first, _ = on(lambda: seen(5), before)
    rest, history = on(seen, after)
    sampler = ShipStratifiedSampler([0, 1, 2] * 10, 10)
    assert first + rest == [(e, b, sorted(sampler.batch(e, b))) for e in range(4) for b in range(3)]
    assert f"{after} from here on" in capfd.readouterr().err and history[-1]["score"] > history[0]["score"] - 0.1


def test_one_process_s_checkpoint_is_as_ever(tmp_path):
    one = learner(tmp_path)
    one.save()
    state = read_checkpoint(list_checkpoints(tmp_path)[0])
    assert isinstance(state["rng"], dict) and not one.many


def test_a_step_that_is_not_finite_in_one_process_is_left_out_in_all():
    def steps():
        one = learner(skip_nonfinite=1)
        loss, n = one.task.loss, 0
        def bad(model, batch):
            nonlocal n
            n += model.training
            parts = loss(model, batch)
            return {k: v * float("nan") for k, v in parts.items()} if n == 2 and processes()[0] == 1 else parts
        one.task = replace(one.task, loss=bad)
        train_loader, valid_loader = loaders()
        rows = list(one.epochs(2, train_loader, valid_loader))
        return gather((one.skipped, plain_bytes(list(one.model.module.parameters())[0].detach()), rows[-1]["score"]))
    found = on(steps, 2)
    assert found[0] == found[1] and found[0][0] == 1 and np.isfinite(found[0][2])


# --- 6. stopping, and being killed

def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    whole = on(lambda: train(tmp_path/"whole"), 2)
    with pytest.raises(KeyboardInterrupt, match="Run the same again"):
        on(lambda: train(tmp_path/"run", once=Once(5, signal.SIGTERM, rank=1)), 2)
    assert read_checkpoint(list_checkpoints(tmp_path/"run")[0])["steps"] == 5
    assert on(lambda: train(tmp_path/"run"), 2) == whole


def test_a_killed_copy_ends_the_others(tmp_path):
    begun = time.time()
    with pytest.raises(RuntimeError, match="one of 2 processes failed, the others were ended.*SIGKILL"):
        on(lambda: train(tmp_path, once=Once(5, signal.SIGKILL, rank=1)), 2)
    assert time.time() - begun < 25
    assert on(lambda: train(tmp_path)[2]["steps"], 2) == 12


def test_an_error_of_the_first_is_one_of_all():
    def broken():
        try: by_first(lambda: open("/nowhere/at/all", "w"))
        except FileNotFoundError as error: return gather(error.filename)
    assert on(broken, 2) == ["/nowhere/at/all"] * 2


def torchrun(world, *words, where=("--standalone",)):
    command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(world), *map(str, words)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, seconds=150):
    try: text, _ = process.communicate(timeout=seconds)
    finally: process.kill()
    return process.returncode, text


def test_torchrun_killed_and_stopped_and_run_again(tmp_path):
    """SIGKILL of one process ends the job; SIGTERM to the job finishes the step and saves once. Continued on two machines (here: two torchruns), the end is that of a job that nobody disturbed."""
    whole = on(lambda: train(tmp_path/"whole"), 2)
    code, text = finish(torchrun(2, __file__, tmp_path/"run", "kill", 5))
    assert code and "Signal 9 (SIGKILL)" in text, text
    assert read_checkpoint(list_checkpoints(tmp_path/"run")[0])["steps"] == 4
    job = torchrun(2, __file__, tmp_path/"run", "wait", 8)
    while not (tmp_path/"run"/"waiting").exists() and job.poll() is None: time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    code, text = finish(job)
    assert code and len(re.findall("^Stopped in .* snapshot saved", text, re.M)) == 1, text
    assert read_checkpoint(list_checkpoints(tmp_path/"run")[0])["steps"] == 8, text
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [torchrun(1, __file__, tmp_path/"run", "end", 0, where=["--nnodes", "2", "--node-rank", str(k), "--master-addr", "127.0.0.1", "--master-port", str(port)]) for k in range(2)]
    for code, text in map(finish, machines): assert code == 0, text
    assert on(lambda: train(tmp_path/"run"), 2) == whole


# --- 7. notebooks and the whole training

def test_train_model_on_two_devices(fleet, tmp_path):
    catalog, parts, recipe = fleet
    one = train_model(catalog, parts, recipe, tmp_path/"two", device="cpu", progress=False, devices=2)
    assert one.epoch == 2 and not one.many and (tmp_path/"two"/"model"/"model.safetensors").is_file()
    state = read_checkpoint(list_checkpoints(tmp_path/"two")[0])
    assert len(state["rng"]) == 2 and [o["epoch"] for o in one.history] == [0, 1]
    alone = train_model(catalog, parts, recipe, tmp_path/"one", device="cpu", progress=False)
    assert abs(alone.history[-1]["loss"] - one.history[-1]["loss"]) < 0.2 * alone.history[-1]["loss"], "batch norm differs, the training hardly"


def test_the_command_line_in_two_processes(fleet, tmp_path):
    """`shipnb train` under torchrun: a model folder, one writer; and the notebook's own parameters are refused."""
    catalog, parts, recipe = fleet
    words = [o for name, value in dict(data=Path(catalog.root).parent, epochs=1, size=32, crop=0, encoder=recipe.encoder, decoder="[8, 8, 8, 8, 8]", valid=0.4).items() for o in ("-p", f"{name}={value}")]
    code, text = finish(torchrun(2, Path(sys.executable).parent/"shipnb", "train", *words, "--out", tmp_path/"run", where=["--standalone", "--no-python"]))
    assert code == 0 and text.count("run/model: ") == 1, text
    state = read_checkpoint(list_checkpoints(tmp_path/"run")[0])
    assert len(state["rng"]) == 2 and state["epoch"] == 1 and (tmp_path/"run"/"model"/"card.json").is_file()
    assert runs.main(["train", "-p", "histograms=true", "--out", str(tmp_path/"no")]) == 2


def test_from_a_notebook(tmp_path):
    """In a kernel, as JupyterLab has it, also after it has computed in threads of its own."""
    cells = ["import torch\nfrom torch import nn\nfrom shipnb.parallel import launch, processes, sum_step, total\ntorch.set_num_threads(2)\nfirst = (torch.randn(512, 512) @ torch.randn(512, 512)).sum()",
             "def job():\n    net = nn.Linear(3, 1)\n    nn.init.ones_(net.weight)\n    net(torch.ones(2, 3) * (processes()[0] + 1)).sum().backward()\n    sum_step(net, {'loss': torch.tensor(1.0)}, 0.5)\n    return net.weight.grad.tolist(), total([1])\nprint(launch(job, 2, 'cpu'))"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in cells])
    nbclient.NotebookClient(nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [o["text"].strip() for o in nb.cells[1].outputs if o.get("name") == "stdout"]       # Fabric says on the other stream that it has started
    assert said == ["([[6.0, 6.0, 6.0]], [2.0])"]


def main(folder, mode, at):
    """What torchrun's processes do: train; on the way kill the second process, or wait in a step until the job is told to stop."""
    folder, at = Path(folder), int(at)
    torch.set_num_threads(1)
    if mode == "wait":
        def hold(number=None, frame=None):
            if processes()[0] == 0: (folder/"waiting").touch()
            time.sleep(4)
        signal.signal(signal.SIGUSR1, hold)
    state = read_checkpoint(list_checkpoints(folder)[0])["steps"] if list_checkpoints(folder) else 0
    once = {"kill": Once(at, signal.SIGKILL, 1), "wait": Once(at - state, signal.SIGUSR1, 0)}.get(mode)
    train(folder, once=once)


if __name__ == "__main__": main(*sys.argv[1:])
