"""The loop against a flat re-implementation, and bit-equal continuation after a stop at any step."""
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shipnb import dataset
from shipnb.runs import read_parameters
from shipnb.tasks import Task
from shipnb.optim import build_optimizer, build_schedule
from shipnb.training import Learner, Recipe, StopRequest, make_learner, make_loaders, train_model


class Points(torch.utils.data.Dataset):
    """Twelve points of a line, as batches of {image, target, index}."""
    def __init__(self): self.epoch = 0
    def __len__(self): return 12
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitems__(self, indices):
        index = torch.tensor(indices)
        x = index[:, None].float() / 12 + 0.01 * self.epoch
        return dict(x=x, y=3 * x - 1, index=index)


class Order(torch.utils.data.Sampler):
    """Three batches of four, another order each epoch, with `seek`."""
    batch_size = 4
    def __init__(self): self.epoch, self.batch = 0, 0
    def seek(self, epoch, batch): self.epoch, self.batch = (epoch, batch) if batch < 3 else (epoch + 1, 0)   # as ShipStratifiedSampler does
    def __len__(self): return 3
    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for k in range(self.batch, 3): yield order[4 * k:4 * k + 4]


class Mean:
    """The mean squared error over what was seen."""
    def __init__(self): self.total, self.n = 0.0, 0
    def update(self, predictions, batch): self.total += float(((predictions - batch["y"])**2).sum()); self.n += len(batch["y"])
    def compute(self): return {"score": -self.total / self.n}


def loss(model, batch): return {"mse": nn.functional.mse_loss(model(batch["x"]), batch["y"]), "size": 1e-3 * sum((p**2).sum() for p in model.parameters())}


TASK = Task(loss, lambda model, batch: model(batch["x"]), Mean)


def loader():
    # its own generator, as make_loader gives: without one every iterator draws from the global state and dropout differs after a resume
    return torch.utils.data.DataLoader(Points(), batch_sampler=Order(), collate_fn=lambda o: o, generator=torch.Generator())


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


def learner(folder=None, opt="adam", sched="onecycle", accumulate=1, epochs=4, key="k", clip=None, ema=0.0, **options):
    model = net()
    optimiser = build_optimizer(opt, model, 0.05)
    steps = epochs * -(-3 // accumulate)
    return Learner(model, TASK, optimiser, build_schedule(sched, optimiser, steps, **({"warmup_steps": 2} if sched == "cosine" else {})), folder, accumulate=accumulate, device="cpu", key=key,
                   monitor="score", clip=clip, progress=False, ema=ema, **options)


def weights(one): return torch.cat([p.detach().flatten() for p in one.model.parameters()])


def kept(one): return torch.cat([p.detach().flatten() for p in one.trained.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("opt", ["adam", "adamw", "rmsprop", "adagrad", "sgd"])
def test_the_loop_is_the_flat_loop(opt, accumulate):
    ours = learner(opt=opt, accumulate=accumulate)
    for _ in ours.epochs(4, loader()): pass
    model = net()
    optimiser = build_optimizer(opt, model, 0.05)
    sched = build_schedule("onecycle", optimiser, 4 * -(-3 // accumulate))
    data = loader()
    for epoch in range(4):
        data.dataset.set_epoch(epoch)
        data.batch_sampler.seek(epoch, 0)
        batches = list(data)
        for start in range(0, 3, accumulate):
            group = batches[start:start + accumulate]
            for batch in group: (sum(loss(model, batch).values()) / len(group)).backward()
            optimiser.step(), optimiser.zero_grad(), sched.step()
    assert torch.equal(weights(ours), torch.cat([p.detach().flatten() for p in model.parameters()]))


class StopAt:
    """A task that asks for a stop (as Ctrl+C does) during step number `at`."""
    def __init__(self, at): self.at, self.n = at, 0
    def loss(self, model, batch):
        if model.training:
            self.n += 1
            if self.n == self.at: os.kill(os.getpid(), signal.SIGINT)
        return loss(model, batch)


def test_the_moving_average_is_the_recurrence_and_is_what_is_evaluated(tmp_path):
    one, expected, decay = learner(ema=0.6, folder=tmp_path), None, 0.6
    update = one._update

    def watched():
        nonlocal expected
        update()
        n, now = int(one.ema.n_averaged) - 1, weights(one)
        share = 1 - min(decay, (1 + n) / (10 + n))
        expected = now if expected is None else expected + share * (now - expected)

    one._update = watched
    rows = list(one.epochs(3, loader(), loader()))
    assert torch.allclose(kept(one), expected, atol=1e-6) and not torch.allclose(kept(one), weights(one), atol=1e-4)
    other = net()
    torch.nn.utils.vector_to_parameters(expected, other.parameters())
    batch = next(iter(loader()))
    one.averaged.eval(), other.eval()
    assert torch.allclose(one.averaged(batch["x"]), other(batch["x"]), atol=1e-6)
    metric = Mean()
    with torch.no_grad():
        for batch in loader(): metric.update(other(batch["x"]), batch)
    assert rows[-1]["score"] == pytest.approx(metric.compute()["score"], rel=1e-4)


@pytest.mark.parametrize("sched", ["onecycle", "plateau", "cosine"])
@pytest.mark.parametrize("accumulate, ema", [(1, 0.0), (2, 0.0), (1, 0.7)])
def test_stopped_at_any_step_it_goes_on_bit_equal(tmp_path, sched, accumulate, ema):
    whole = learner(sched=sched, accumulate=accumulate, ema=ema)
    for _ in whole.epochs(4, loader(), loader()): pass
    for at in range(1, 13):
        folder = tmp_path/str(at)
        first = learner(folder, sched=sched, accumulate=accumulate, ema=ema)
        object.__setattr__(first, "task", Task(StopAt(at).loss, TASK.predict, TASK.metric))
        with pytest.raises(KeyboardInterrupt, match="Run the same again"):
            for _ in first.epochs(4, loader(), loader()): pass
        again = learner(folder, sched=sched, accumulate=accumulate, ema=ema)
        assert again.resume()
        for _ in again.epochs(4, loader(), loader()): again.save()
        assert torch.equal(weights(whole), weights(again)), f"stopped at step {at}"
        assert torch.equal(kept(whole), kept(again)), f"stopped at step {at}"
        drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        assert drop(whole.history) == drop(again.history)


def test_sigkill_between_epochs_goes_on_bit_equal(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_training import *\n" \
           f"one = learner({str(tmp_path)!r})\nfor row in one.epochs(4, loader()):\n    one.save()\n    if row['epoch'] == 1: os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    whole, again = learner(), learner(tmp_path)
    for _ in whole.epochs(4, loader()): pass
    assert again.resume() and again.epoch == 2
    for _ in again.epochs(4, loader()): pass
    assert torch.equal(weights(whole), weights(again))


def test_training_learns_and_the_history_tells():
    one = learner(sched="constant", epochs=60)
    rows = list(one.epochs(60, loader(), loader()))
    assert rows[-1]["valid_loss"] < 0.2 * rows[0]["valid_loss"] and one.best["score"] == max(o["score"] for o in rows)
    assert set(rows[0]) >= {"epoch", "lr", "loss", "loss_mse", "loss_size", "seconds", "valid_loss", "score"}


def test_a_loss_that_is_not_finite_names_epoch_and_images():
    one = learner()
    object.__setattr__(one, "task", Task(lambda model, batch: {"bad": model(batch["x"]).sum() * float("nan")}, TASK.predict, TASK.metric))
    with pytest.raises(FloatingPointError, match=r"epoch 0, batch 0.*bad.*positions \[.*no checkpoint yet"):
        for _ in one.epochs(1, loader()): pass


def broken(at, value=float("nan"), task=TASK):
    """The task with a loss whose gradient is not finite at the given steps (the loss itself stays finite where `value` is infinite)."""
    n = 0
    def bad(model, batch):
        nonlocal n
        n += 1
        parts = task.loss(model, batch)
        if n in at:
            first = next(model.parameters())
            parts["bad"] = value * first.sum() if value != float("inf") else (first - first.detach()).abs().sum().sqrt()   # 0 with an infinite slope
        return parts
    return Task(bad, task.predict, task.metric)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_step_that_is_not_finite_is_never_saved(tmp_path, value, lazy):
    """Step 5 is bad (epoch 1, batch 1). On the CPU it is found before the weights are touched, on a GPU before the next checkpoint."""
    one = learner(tmp_path, save_every=2)
    one.lazy = lazy
    object.__setattr__(one, "task", broken({5}, value))
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 1: .*gradient norm.*last-00000004-") as error:
        for _ in one.epochs(4, loader()): one.save()
    batches = Order()
    batches.seek(1, 0)
    assert f"positions {list(batches)[1]}" in str(error.value)
    if not lazy: assert torch.isfinite(weights(one)).all()
    again = learner(tmp_path, save_every=2)
    assert again.resume() and again.steps == 4 and torch.isfinite(weights(again)).all()


def test_steps_may_be_left_out_up_to_a_number():
    one = learner(skip_nonfinite=2, sched="constant")
    object.__setattr__(one, "task", broken({1, 2, 3, 4}))
    before = weights(one)
    with pytest.raises(FloatingPointError, match="epoch 0, batch 2"):
        for _ in one.epochs(4, loader()): pass
    assert torch.equal(weights(one), before)
    one, rows = learner(skip_nonfinite=2, sched="constant"), []
    object.__setattr__(one, "task", broken({1, 3}))
    for row in one.epochs(2, loader()): rows.append(row)
    assert [row["skipped"] for row in rows] == [2, 2] and torch.isfinite(weights(one)).all() and not torch.equal(weights(one), before)
    assert one.steps == 6


class Narrow:
    """A task that runs out of memory when it is given more than `most` images."""
    def __init__(self, most, message=None): self.most, self.seen, self.message = most, [], message
    def loss(self, model, batch):
        if len(batch["index"]) > self.most: raise torch.OutOfMemoryError("CUDA out of memory") if self.message is None else RuntimeError(self.message)
        if model.training: self.seen += batch["index"].tolist()
        return loss(model, batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("most, pieces", [(4, 1), (2, 2), (1, 4)])
def test_out_of_memory_halves_the_batches_and_changes_nothing_else(tmp_path, most, pieces, accumulate):
    """The loss is a mean over images, so pieces of equal size give the same gradient; dropout is off, for it draws per piece."""
    def run(task, folder=None):
        one = learner(folder, accumulate=accumulate, opt="sgd", sched="constant")
        one.model.module[1].p = 0.0
        object.__setattr__(one, "task", Task(task.loss, TASK.predict, TASK.metric))
        rows = list(one.epochs(2, loader()))
        return one, rows
    narrow, wide = Narrow(most), Narrow(4)
    (one, rows), (plain, _) = run(narrow, tmp_path), run(wide)
    assert wide.seen == narrow.seen[-len(wide.seen):] and set(narrow.seen[:len(narrow.seen) - len(wide.seen)]) <= set(wide.seen[:8])
    assert torch.allclose(weights(one), weights(plain), atol=1e-6)
    assert [row.get("pieces", 1) for row in rows] == [pieces, pieces]
    one.save()
    again = learner(tmp_path, accumulate=accumulate, opt="sgd", sched="constant")
    assert again.resume() and again.split == pieces


def test_out_of_memory_with_one_image_is_one_sentence():
    one = learner()
    object.__setattr__(one, "task", Task(Narrow(0).loss, TASK.predict, TASK.metric))
    with pytest.raises(RuntimeError, match="out of memory with single images in epoch 0, batch 0; use smaller crops"):
        for _ in one.epochs(1, loader()): pass


def test_another_error_is_not_taken_for_a_lack_of_memory():
    one = learner()
    object.__setattr__(one, "task", Task(Narrow(0, "shapes differ").loss, TASK.predict, TASK.metric))
    with pytest.raises(RuntimeError, match="shapes differ"):
        for _ in one.epochs(1, loader()): pass


def test_lines_of_the_log(tmp_path):
    """Every line holds the mean of the last 50 steps' losses; lines written after the last checkpoint of a killed run are not kept."""
    losses, one = [], learner(tmp_path, epochs=40, log_every=7)
    backward = one._backward
    def watched(group):
        parts = backward(group)
        losses.append(sum(float(o) for o in parts.values()))
        return parts

    one._backward = watched
    for row in one.epochs(25, loader()):
        if row["epoch"] == 20: one.save()
    lines = [json.loads(o) for o in (tmp_path/"steps.jsonl").read_text().splitlines()]
    assert [o["step"] for o in lines] == list(range(7, 76, 7))
    for o in lines: assert o["loss"] == pytest.approx(sum(losses[max(0, o["step"] - 50):o["step"]]) / min(50, o["step"]), rel=1e-9)
    with open(tmp_path/"steps.jsonl", "a") as f: f.write('{"step": 77, "torn')
    again = learner(tmp_path, epochs=40, log_every=7)
    assert again.resume() and again.steps == 63
    assert [json.loads(o)["step"] for o in (tmp_path/"steps.jsonl").read_text().splitlines()] == list(range(7, 64, 7))
    for _ in again.epochs(25, loader()): pass
    assert [json.loads(o) for o in (tmp_path/"steps.jsonl").read_text().splitlines()] == lines


def test_clipping_bounds_the_step():
    steps = []
    for clip in (None, 1e-3):
        one = learner(opt="sgd", sched="constant", clip=clip)
        before = weights(one)
        for _ in one.epochs(1, loader()): break
        steps.append(float((weights(one) - before).norm()))
    assert steps[1] < 3 * 0.05 * 1e-3 * 3 < steps[0]


def test_damaged_foreign_and_other_checkpoints(tmp_path):
    one = learner(tmp_path)
    assert not one.resume()
    first = one.save()
    for _ in one.epochs(1, loader()): pass
    second = one.save()
    with pytest.raises(ValueError, match="another configuration"): learner(tmp_path, key="other").resume()
    second.write_bytes(second.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=f"{second.name} is damaged.*going on from {first.name}"): assert one.resume()
    assert one.steps == 0
    first.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no whole checkpoint is left"): one.resume()


def named_by_its_hash(folder, content):
    torch.save(content, folder/"x")
    path = folder/f"last-00000001-{hashlib.sha256((folder/'x').read_bytes()).hexdigest()[:16]}.pt"
    (folder/"x").rename(path)


def test_a_foreign_file_is_refused(tmp_path):
    named_by_its_hash(tmp_path, {"model": {}})
    with pytest.raises(ValueError, match="not a checkpoint of shipnb"): learner(tmp_path).resume()


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"evil"),)
    named_by_its_hash(tmp_path, {"shipnb": 1, "x": Evil()})
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"): learner(tmp_path).resume()
    assert not (tmp_path/"evil").exists()


def test_the_second_signal_ends_at_once(request):
    # a shell starts background jobs with SIGINT ignored, and Python then keeps it so; here the usual handler is meant
    request.addfinalizer(lambda old=signal.signal(signal.SIGINT, signal.default_int_handler): signal.signal(signal.SIGINT, old))
    with pytest.raises(KeyboardInterrupt):
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_goes_on_from_a_model_folder(tmp_path):
    from shipnb.models import build_unet, save_model
    torch.manual_seed(1)
    model = build_unet()
    save_model(tmp_path, model, dict(architecture="unet", encoder="resnet18", classes=1, in_channels=3, size=[256, 256], window=[768, 768]))
    started = make_learner(Recipe(init=str(tmp_path), seed=5), 1).model.module
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), started.state_dict().values()))
    key = Recipe(init=str(tmp_path)).key("a")
    save_model(tmp_path, build_unet(), dict(architecture="unet", encoder="resnet18", classes=1, in_channels=3, size=[256, 256], window=[768, 768]))
    assert Recipe(init=str(tmp_path)).key("a") != key, "other weights are another configuration"


def test_a_start_built_otherwise_is_refused(tmp_path):
    from shipnb.models import build_unet, save_model
    save_model(tmp_path, build_unet(decoder=[16, 8, 8, 4, 4]), dict(architecture="unet", encoder="resnet18", decoder=[16, 8, 8, 4, 4], classes=1, in_channels=3, size=[256, 256], window=[768, 768]))
    with pytest.raises(ValueError, match="make them equal"): make_learner(Recipe(init=str(tmp_path)), 1)
    assert make_learner(Recipe(init=str(tmp_path), decoder=[16, 8, 8, 4, 4]), 1).model.module.decoder.blocks[0].conv2[0].out_channels == 16


def test_the_notebook_s_defaults_are_the_recipe_s():
    """What a parameter file leaves out must mean the same to `shipnb run training` and to a study that reads it as a Recipe."""
    found = {name: o.default for name, o in read_parameters(Path(__file__).parents[1]/"nbs"/"20_training.ipynb").items()}
    found["preset"] = found.pop("preset_name")
    short = ("epochs", "crop")   # the default run takes a minute
    assert {k: found[k] for k in asdict(Recipe()) if k not in short} == {k: v for k, v in asdict(Recipe()).items() if k not in short}


def test_what_is_left_at_its_default_is_no_part_of_the_key():
    @dataclass(frozen=True)
    class Later(Recipe):
        later: int = 7
    # a field that a later version adds must not make the checkpoints of this one foreign
    assert Recipe(lr=1e-3).key("a") == Later(lr=1e-3).key("a")


def test_a_recipe_is_its_key():
    assert Recipe().key("a") == Recipe().key("a") != Recipe(lr=1e-3).key("a") != Recipe(lr=1e-3).key("b")


def test_a_training_that_ended_early_is_not_taken_up_again(tmp_path, monkeypatch):
    from shipnb.catalog import read_airbus
    from shipnb.fleet import make_fleet
    from shipnb.training import split_by, train_model
    catalog = read_airbus(make_fleet(tmp_path/"fleet", 12, seed=1))
    parts = split_by(catalog, 0.4)
    recipe = Recipe(size=32, batch_size=2, precision="32-true", epochs=9, patience=2, lr=1e-9, encoder="tu-resnet10t", decoder=[8, 8, 8, 8, 8], schedule="constant")
    one = train_model(catalog, parts, recipe, tmp_path/"run", progress=False)
    assert one.epoch == 3 and len(one.history) == 3, "a learning rate of 1e-9 improves nothing: the first look is the best, and two more end it"
    before = {o.name: o.read_bytes() for o in (tmp_path/"run"/"model").iterdir()}
    again = train_model(catalog, parts, recipe, tmp_path/"run", progress=False)
    assert again.history == one.history and again.epoch == 3
    assert {o.name: o.read_bytes() for o in (tmp_path/"run"/"model").iterdir()} == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_seed_gives_one_model(deterministic):
    from shipnb.training import set_seeds
    def trained():
        set_seeds(4, deterministic)
        one = learner(epochs=2)
        for _ in one.epochs(2, loader()): pass
        return weights(one)
    try: assert torch.equal(trained(), trained()) and torch.are_deterministic_algorithms_enabled() == deterministic
    finally: torch.use_deterministic_algorithms(False)


def tiny(**options):
    """A recipe whose trainings take seconds."""
    return Recipe(**dict(size=32, batch_size=2, encoder="tu-resnet10t", decoder=[8, 8, 8, 8, 8], epochs=2, crop=0) | options)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    from shipnb.catalog import read_airbus
    from shipnb.fleet import make_fleet
    from shipnb.training import split_by
    catalog = read_airbus(make_fleet(tmp_path_factory.mktemp("fleet")/"fleet", 12, seed=1))
    return catalog, split_by(catalog, 0.4)


def trained(fleet, recipe, folder):
    one = train_model(*fleet, recipe, folder, progress=False, device="cpu")
    return one, {name: o for name, o in one.trained.state_dict().items()}, [{k: v for k, v in row.items() if k != "seconds"} for row in one.history]


@pytest.mark.parametrize("options", [dict(augment="d4"), dict(augment="d4", size=64, crop=32, crop_on_ship=0.7, ema=0.5)])
def test_training_from_a_cache_on_the_device_is_bit_equal(fleet, tmp_path, monkeypatch, options):
    """Where the cache fits, the loop takes its batches there by itself: the same weights and scores, also when a training changes from one to the other between epochs."""
    recipe, made = tiny(**options), []
    _, plain, rows = trained(fleet, recipe, tmp_path/"plain")
    monkeypatch.setattr(dataset, "free_memory", lambda device: 1e12)
    take = dataset.DeviceCache.take
    monkeypatch.setattr(dataset.DeviceCache, "take", lambda *o: made.append(1) or take(*o))
    _, there, others = trained(fleet, recipe, tmp_path/"there")
    assert len(made) > 4 and rows == others and all(torch.equal(plain[name], there[name]) for name in plain)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "free_memory", lambda device: 0)
        train, valid = make_loaders(*fleet, recipe)
        assert not isinstance(train.dataset, dataset.DeviceDataset)
        first = make_learner(recipe, len(train), tmp_path/"change", device="cpu")
        for _ in first.epochs(1, train, valid): first.save()
    train, valid = make_loaders(*fleet, recipe)
    assert isinstance(train.dataset, dataset.DeviceDataset) and isinstance(valid.dataset, dataset.DeviceDataset)
    again = make_learner(recipe, len(train), tmp_path/"change", device="cpu")
    assert again.resume()
    for _ in again.epochs(2, train, valid): pass
    assert all(torch.equal(plain[name], o) for name, o in again.trained.state_dict().items())


class Reads(TorchDispatchMode):
    """Notes the tensors of which a number is asked: on a GPU each such question waits for all that is queued."""
    def __init__(self): super().__init__(); self.asked = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::_unique2"): self.asked.append(args[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(ema=0.9), dict(optimiser="sgd", clip=1.0, schedule="cosine", precision="32-true"), dict(optimiser="adamw", accumulate=2, loss={"bce": 1.0, "lovasz": 1.0})])
def test_nothing_within_a_step_asks_for_a_number(fleet, options):
    train, valid = make_loaders(*fleet, tiny(**options), device="cpu")
    one = make_learner(tiny(**options), 100, device="cpu")
    one.lazy = True                        # as on a GPU
    one.model.train()
    batches = [next(iter(train)) for _ in range(one.accumulate)]
    one.step(batches)
    count = [one.ema.n_averaged] if one.ema is not None else []      # a counter that stays with the processor: nobody waits for it
    with Reads() as reads:
        for _ in range(3): one._count(*one.step(batches), batches, one._bar(train, len(train)))
    assert all(any(o is c for c in count) for o in reads.asked) and len(reads.asked) == 3 * len(count)
    with Reads() as reads: float(one.step(batches)[1])
    assert len(reads.asked) == 1 + len(count), "the test is not blind"
    one.log_every, before = 1, len(one.taken)
    with Reads() as reads: one._count(*one.step(batches), batches, one._bar(train, len(train)))
    assert reads.asked and before and not one.taken, "a line of the log is where numbers are asked for"


def test_an_evaluation_makes_one_pass_and_waits_at_its_end(fleet):
    """One forward pass a batch; the same numbers as loss and predictions asked for one after the other."""
    train, valid = make_loaders(*fleet, tiny(), device="cpu")
    one, passes = make_learner(tiny(), 100, device="cpu"), []
    one.model.module.register_forward_hook(lambda *o: passes.append(1))
    scores = one.evaluate(valid)
    assert len(passes) == len(valid) > 1
    one.task = Task(one.task.loss, one.task.predict, one.task.metric)
    assert one.evaluate(valid) == scores and len(passes) == 3 * len(valid)
    class There(torch.Tensor):             # says that it is not on the processor, as a meter sees it
        device = torch.device("cuda")
    meter, batch = one.task.metric().meter, next(iter(valid))
    p = torch.rand(len(batch["index"]), 1, 32, 32)
    there = lambda p: meter.update(p.as_subclass(There), batch["mask"].as_subclass(There), batch["has_ship"])
    with Reads() as reads: there(p)
    assert not reads.asked and len(meter.waiting) == 1
    expected = one.task.metric().meter
    expected.update(p, batch["mask"], batch["has_ship"])
    assert meter.compute() == expected.compute() and not meter.waiting
    there(torch.full_like(p, float("nan")))
    with pytest.raises(ValueError, match="not finite in image 0"): meter.compute()


def test_a_compiled_training_has_the_names_and_the_resume_of_a_plain_one(fleet, tmp_path, monkeypatch):
    """With a backend that compiles in seconds: checkpoints have the same names, and a plain Learner reads them; stopped and continued it ends bit-equal."""
    modes, compile = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append(mode) or compile(self, backend="aot_eager"))
    train, valid = make_loaders(*fleet, tiny(ema=0.5), device="cpu")
    def run(folder, n, compiled=True):
        one = make_learner(tiny(ema=0.5, compile=compiled), len(train), folder, device="cpu")
        one.resume()
        for _ in one.epochs(n, train, valid): one.save()
        return one
    plain, whole = run(tmp_path/"plain", 2, False), run(tmp_path/"whole", 2)
    assert modes == ["default", "default"] and whole.model.module._compiled_call_impl is not None and plain.model.module._compiled_call_impl is None
    assert plain.state()["model"].keys() == whole.state()["model"].keys() and plain.state()["ema"].keys() == whole.state()["ema"].keys()
    run(tmp_path/"parts", 1)
    again = run(tmp_path/"parts", 2)
    assert all(torch.equal(o, again.trained.state_dict()[name]) for name, o in whole.trained.state_dict().items())
    assert make_learner(tiny(ema=0.5), len(train), tmp_path/"whole", device="cpu").resume()
    assert Recipe(compile=True).key("a") != Recipe().key("a")
