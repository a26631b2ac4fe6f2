"""The doctor: every planted ailment is found, the repository's defaults are left alone, and the patient stays as it was, bit by bit."""
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from shipnb import doctor
from shipnb.catalog import read_airbus
from shipnb.dataset import SegmentationDataset, make_loader, to_input, to_target
from shipnb.fleet import sample
from shipnb.fleet_tasks import make_steel
from shipnb.formats import read
from shipnb.losses import loss_bounds, make_loss
from shipnb.masks import rle_decode
from shipnb.optim import build_optimizer
from shipnb.overlaps import make_overlapping_fleet
from shipnb.sampler import ShipStratifiedSampler
from shipnb.tasks import Task, segmentation_task
from shipnb.training import Learner, Recipe, make_learner, make_loaders, split_by

SMALL = dict(encoder="tu-resnet10t", decoder=[32, 32, 16, 16, 16], batch_size=8)
DEMO = Path(__file__).parents[1]/"nbs"/"params"/"demo.yaml"


@pytest.fixture(scope="module")
def catalog(): return read_airbus(sample())


@pytest.fixture(scope="module")
def parts(catalog): return split_by(catalog)


def demo_recipe():
    given = yaml.safe_load(DEMO.read_text(encoding="utf-8"))["training"]
    given["preset"] = given.pop("preset_name")
    return Recipe(**{name: value for name, value in given.items() if name in {o.name for o in fields(Recipe)}})


class Reseeded(Sampler):
    """The source's habit: a new generator from the same seed in every epoch."""
    batch_size = 16

    def __init__(self, n, seed=0): self.n, self.seed = n, seed
    def __len__(self): return self.n // 16
    def seek(self, epoch, batch=0): pass
    def __iter__(self): return iter(np.random.default_rng(self.seed).permutation(self.n)[:len(self) * 16].reshape(-1, 16).tolist())


class Ends(torch.nn.Module):
    """A small network; `last` is what comes after its logits."""

    def __init__(self, last=None, bias=-4.0):
        super().__init__()
        self.body, self.head, self.last = torch.nn.Conv2d(3, 8, 5, padding=2), torch.nn.Conv2d(8, 1, 1), last or torch.nn.Identity()
        torch.nn.init.constant_(self.head.bias, bias)

    def forward(self, x): return self.last(self.head(torch.relu(self.body(x))))


def small_learner(model=None, task=None, lr=1e-2, **options):
    torch.manual_seed(0)
    model = model or Ends()
    return Learner(model, task or segmentation_task("bce"), build_optimizer("adam", model, lr), device="cpu", progress=False, **options)


def synthetic_batch(n=4, side=32, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((n, side, side), np.uint8)
    mask[:, 8:12, 5:20] = 1
    img = (rng.integers(20, 60, (n, side, side, 3)) + 120 * mask[..., None]).astype(np.uint8)
    return dict(image=torch.from_numpy(img), mask=torch.from_numpy(mask), index=torch.arange(n), has_ship=torch.ones(n, dtype=torch.bool))


def verdicts(found):
    found = found if isinstance(found, list) else found.to_dict("records")
    return {o["check"]: o["verdict"] for o in found}


# --- the whole diagnosis

@pytest.mark.parametrize("recipe", [demo_recipe(), Recipe()], ids=["demo", "defaults"])
def test_silent_on_the_defaults(catalog, parts, recipe):
    train, valid = make_loaders(catalog, parts, recipe)
    learner = make_learner(recipe, len(train), device="cpu")
    found = doctor.diagnose(learner, train, valid)
    assert not len(doctor.troubles(found)), doctor.troubles(found).to_string()
    assert set(found.loc[found["verdict"] == "skip", "check"]) == {"level of the loss"} and len(found) >= 17


def test_flags_the_settings_of_the_source(catalog, parts):
    """Sigmoid before a with-logits loss, a sampler that is seeded anew in every epoch, a learning rate of 1e-10."""
    recipe = Recipe(crop=64, **SMALL)
    train, valid = make_loaders(catalog, parts, recipe)
    learner = make_learner(recipe, len(train), device="cpu")
    model = torch.nn.Sequential(learner.model.module, torch.nn.Sigmoid())
    source = Learner(model, segmentation_task("focal"), build_optimizer("adam", model, 1e-10), device="cpu", progress=False)
    found = doctor.diagnose(source, make_loader(train.dataset, Reseeded(len(train.dataset))), valid)
    bad = verdicts(doctor.troubles(found))
    assert {"activation in the model": "fail", "learning rate": "fail", "batches of two epochs": "fail", "one batch by heart": "fail"}.items() <= bad.items()
    assert set(bad) <= {"activation in the model", "learning rate", "batches of two epochs", "one batch by heart", "loss at the start", "never drawn"}
    assert doctor.troubles(found)["advice"].str.len().gt(0).all()


def test_nothing_of_the_training_changes(catalog, parts):
    recipe = Recipe(crop=64, preset="color_jitter", ema=0.9, **SMALL)
    train, valid = make_loaders(catalog, parts, recipe)
    kept = []
    for examined in (False, True):
        learner = make_learner(recipe, len(train), device="cpu")
        train.batch_sampler.seek(0, 0)
        steps = iter(train)
        learner.model.train()
        learner.step([next(steps)])
        if examined:
            np.random.seed(3)
            before = np.random.get_state()[1].copy(), torch.get_rng_state()
            doctor.diagnose(learner, train, valid, images=8)
            assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
        learner.step([next(steps)])
        kept.append([*learner.model.state_dict().values(), *(v for s in learner.opt.state_dict()["state"].values() for v in s.values()), *learner.ema.state_dict().values()])
        assert train.dataset.epoch == 0 and train.batch_sampler.position == 2 and learner.model.training
    assert len(kept[0]) == len(kept[1]) > 200 and all(torch.equal(a, b) for a, b in zip(*kept))


# --- activation

def test_fingerprint_of_the_write_up_by_arithmetic():
    """With f = 0.005 and probabilities fed as logits: background says 0 -> 1/2, ship says 1 -> 0.7311."""
    f, s = 0.005, 1 / (1 + np.exp(-1))
    by_hand = {"bce": -(1 - f) * np.log(.5) - f * np.log(s), "focal": -(1 - f) * .25 * np.log(.5) - f * (1 - s) ** 2 * np.log(s),
               "dice": 1 - 2 * s * f / ((1 - f) / 2 + s * f + f), "lovasz": 1 - f}
    table = doctor.activation_floors(f)
    assert {name: round(value, 4) for name, value in by_hand.items()} == {"bce": .6912, "focal": .1725, "dice": .9856, "lovasz": .995}
    for name, value in by_hand.items(): assert table.at[name, "perfect_twice"] == pytest.approx(value, abs=3e-5)
    assert (table["perfect"] < 1e-4).all() and (table["perfect"] < table["constant"]).all()
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"): doctor.activation_floors(0)


@pytest.mark.parametrize("name", doctor.PLAIN)
def test_floors_agree_with_those_of_the_losses(name):
    bounds = loss_bounds(name, 0.005, pixels=2**16)
    row = doctor.activation_floors(round(0.005 * 2**16) / 2**16, pixels=2**16).loc[name]
    assert row["perfect_twice"] == pytest.approx(bounds.doubled_floor, abs=1e-5) and row["nothing_twice"] <= bounds.doubled_ceiling + 1e-6


def doubled(loss, first=torch.sigmoid):
    """The source's task: an activation, then a loss that applies it again."""
    parts = make_loss(loss)
    return Task(lambda model, batch: parts(first(model(to_input(batch["image"]))), to_target(batch["mask"])), None, None)


@pytest.mark.parametrize("loss", ["bce", "dice", "dice_with", "focal", "lovasz"])
def test_an_activation_in_the_task_is_found_for_every_loss(loss):
    batch = synthetic_batch()
    for task, verdict in ((segmentation_task(loss), "ok"), (doubled(loss), "fail")):
        patient = doctor.Patient(small_learner(task=task))
        assert doctor.check_task_activation(patient, batch, patient.look(batch)[1])["verdict"] == verdict, (loss, verdict)


def test_label_smoothing_is_no_second_activation():
    smooth = Task(lambda model, batch: {"bce": torch.nn.functional.binary_cross_entropy_with_logits(model(to_input(batch["image"])), to_target(batch["mask"]) * .9 + .05)}, None, None)
    patient, batch = doctor.Patient(small_learner(task=smooth)), synthetic_batch()
    assert doctor.check_task_activation(patient, batch, patient.look(batch)[1])["verdict"] == "ok"


def test_an_activation_in_the_model_is_found():
    for last, verdict in ((None, "ok"), (torch.nn.Sigmoid(), "fail"), (torch.nn.Hardtanh(0, 1), "fail"), (torch.nn.Tanh(), "ok")):
        assert doctor.check_model_activation(doctor.Patient(small_learner(Ends(last))), synthetic_batch())["verdict"] == verdict, last
    nearly = Ends(bias=0.5)                     # outputs within 0..1 by chance: only a stronger input tells
    nearly.head.weight.data.mul_(0.1)
    patient = doctor.Patient(small_learner(nearly))
    assert 0 <= patient.look(synthetic_batch(), False)[1].min() <= patient.look(synthetic_batch(), False)[1].max() <= 1
    assert doctor.check_model_activation(patient, synthetic_batch())["verdict"] == "ok"


def test_a_training_that_sits_on_the_wrong_floor():
    batch = synthetic_batch()
    model = Ends(torch.nn.Sigmoid())
    learner = small_learner(model)
    losses = []
    for _ in range(60):
        losses.append(float(learner.step([batch])[0]["bce"]))
    history = [dict(loss=o) for o in losses[-3:]]
    patient = doctor.Patient(learner)
    z = patient.look(batch)[1]
    assert doctor.check_loss_level(patient, batch, z, history)["verdict"] == "warn"
    assert doctor.check_loss_level(patient, batch, z, history[:2])["verdict"] == "skip"
    good = small_learner()
    history = [dict(loss=float(good.step([batch])[0]["bce"])) for _ in range(60)][-3:]
    assert doctor.check_loss_level(doctor.Patient(good), batch, z, history)["verdict"] == "ok"


# --- learning rate, gradients, first things

@pytest.mark.parametrize("rate", [1e-10, 1e-7, 1e-4])
def test_moved_weights_against_adam_by_hand(rate):
    """Adam's first step from a gradient g is lr g / (|g| + eps), in double precision here; then rounded to the type the weights are kept in."""
    learner, batch = small_learner(lr=rate), synthetic_batch()
    table = doctor.moved_weights(learner, batch)
    sum(learner.task.loss(learner.model, batch).values()).backward()
    for part in ("body", "head"):
        named = [(o.detach().numpy().ravel(), o.grad.numpy().ravel().astype(float)) for name, o in learner.model.module.named_parameters() if name.startswith(part)]
        w, g = (np.concatenate(o) for o in zip(*named))
        w, g = w[g != 0], g[g != 0]
        new = w.astype(float) - rate * g / (np.abs(g) + 1e-8)
        row = table.set_index("part").loc[part]
        assert row["float32"] == pytest.approx(np.mean(new.astype(np.float32) != w), abs=0.01) and row["reached"] == len(w)
        old16 = torch.from_numpy(w).bfloat16()
        new16 = (old16.double() + torch.from_numpy(new - w)).bfloat16()
        assert row["bf16"] == pytest.approx(float((new16 != old16).double().mean()), abs=0.01)
    learner.opt.step()                                                              # and against the real step
    moved = [float((a != b).sum()) for a, b in zip(learner.model.module.parameters(), small_learner(lr=rate).model.module.parameters())]
    assert sum(moved) == pytest.approx((table["float32"] * table["reached"]).sum(), abs=0.5)


def test_dead_learning_rate_has_a_verdict():
    for rate, verdict in ((1e-10, "fail"), (1e-3, "ok")):
        assert doctor.check_learning_rate(doctor.moved_weights(small_learner(), synthetic_batch(), rate))["verdict"] == verdict


def test_gradients_that_do_not_come_and_weights_that_nobody_holds():
    batch = synthetic_batch()

    class Cut(Ends):
        def forward(self, x): return self.head(torch.relu(self.body(x)).detach())

    def findings(model, opt=None):
        learner = small_learner(model)
        if opt is not None: learner.opt = opt
        patient = doctor.Patient(learner)
        patient.backward(batch)
        return verdicts(doctor.check_gradients(patient))

    assert findings(Ends()) == {"gradients": "ok", "weights in the optimiser": "ok"}
    assert findings(Cut())["gradients"] == "fail"
    model = Ends()
    assert findings(model, torch.optim.Adam(model.head.parameters(), 1e-3))["weights in the optimiser"] == "fail"
    model = Ends()
    model.head.bias.data.fill_(float("nan"))
    assert findings(model)["gradients"] == "fail"


def test_input_output_start_and_one_batch():
    image = synthetic_batch(8)["image"]
    x = to_input(image)
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    bad = x.clone()
    bad[0, 0, 0, 0] = float("inf")
    for value, verdict in ((x, "ok"), (image.permute(0, 3, 1, 2).float(), "fail"), ((x - mean) / std, "fail"), ((image.permute(0, 3, 1, 2) / 255 / 255 - mean) / std / 10, "fail"), (bad, "fail"), (None, "skip")):
        assert doctor.check_input(value)["verdict"] == verdict
    for z, verdict in ((torch.randn(4, 1, 8, 8), "ok"), (torch.full((4, 1, 8, 8), -4.6), "fail"), (torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), "fail"), (torch.full((2, 1, 4, 4), float("nan")), "fail")):
        assert doctor.check_output(z)["verdict"] == verdict
    batch = synthetic_batch()
    for bias, verdict in ((-2.5, "ok"), (3.0, "warn")):
        patient = doctor.Patient(small_learner(Ends(bias=bias)))
        z = patient.look(batch)[1]
        assert doctor.check_start(patient, batch, z, float(patient.loss(batch).detach()))["verdict"] == verdict
    for rate, verdict in ((1e-2, "ok"), (1e-10, "fail")):
        assert doctor.check_one_batch(doctor.Patient(small_learner(lr=rate)), batch)["verdict"] == verdict


# --- samplers

def loader_of(n, batch_sampler): return DataLoader(list(range(n)), batch_sampler=batch_sampler)


def shuffled(n, replacement=False, drop_last=True, generator=None):
    return loader_of(n, BatchSampler(RandomSampler(range(n), replacement=replacement, generator=generator), 16, drop_last))


COUNTS = np.random.default_rng(0).choice([0, 1, 2, 5], 190, p=[.4, .3, .2, .1])


@pytest.mark.parametrize("name, loader, bad", [
    ("stratified", loader_of(190, ShipStratifiedSampler(COUNTS, 16, 0.25, 0.3, seed=1)), {}),
    ("stratified without zero", loader_of(190, ShipStratifiedSampler(COUNTS, 16, 0, 0.3, seed=1)), {}),
    ("shuffled", shuffled(190), {}),
    ("shuffled by a generator", shuffled(190, generator=torch.Generator().manual_seed(4)), {}),
    ("in order", loader_of(190, BatchSampler(SequentialSampler(range(190)), 16, False)), {"batches of two epochs": "fail"}),
    ("seeded anew", loader_of(190, Reseeded(190)), {"batches of two epochs": "fail", "never drawn": "fail"}),
    ("with replacement", shuffled(190, replacement=True), {"drawn twice": "warn", "never drawn": "fail"}),
], ids=lambda o: o if isinstance(o, str) else "")
def test_samplers(name, loader, bad):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = verdicts(doctor.check_sampler(loader, COUNTS))
    assert {check: verdict for check, verdict in found.items() if verdict != "ok"} == bad
    assert torch.equal(torch.get_rng_state(), before)
    generator = getattr(getattr(loader.batch_sampler, "sampler", None), "generator", None)
    if generator is not None: assert torch.equal(generator.get_state(), torch.Generator().manual_seed(4).get_state())


def test_a_healthy_sampler_is_not_blamed_over_many_seeds():
    for seed in range(40):
        torch.manual_seed(seed)
        assert set(verdicts(doctor.check_sampler(shuffled(190))).values()) == {"ok"}, seed
        assert set(verdicts(doctor.check_sampler(loader_of(190, ShipStratifiedSampler(COUNTS, 16, seed=seed, batches_per_epoch=9)), COUNTS)).values()) == {"ok"}, seed


def test_images_that_a_subset_leaves_out():
    some = torch.utils.data.SubsetRandomSampler(range(150))
    assert verdicts(doctor.check_sampler(loader_of(190, BatchSampler(some, 16, True))))["never drawn"] == "fail"


def test_a_stream_has_no_batches_to_foretell():
    with pytest.raises(ValueError, match="no batch sampler"): doctor.batches_of(DataLoader(list(range(4)), batch_size=None))


# --- labels, augmentation, classes, leaks

def shifted(catalog, by):
    """As `label_fits`, with every mask moved by (rows, columns)."""
    return doctor.label_fits(catalog, 30, decode=lambda code, shape: np.roll(rle_decode(code, shape), by, (0, 1)))


@pytest.mark.parametrize("by", [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (2, -1)])
def test_labels_shifted_by_a_pixel(catalog, by):
    fits = shifted(catalog, by)
    offset, error = doctor.label_offset(fits)
    assert np.abs(offset - by).max() < 0.4 and error.max() < 0.2
    found = doctor.check_label_offset(fits)
    assert found["verdict"] == ("fail" if any(by) else "ok") and ("1-based" in found["advice"]) == (by == (1, 0))


def test_one_based_starts_read_as_zero_based(catalog):
    """The Severstal source's mistake itself, by plain arithmetic on the codes: start - 1 is forgotten."""
    def forgetful(code, shape):
        flat, numbers = np.zeros(shape[0] * shape[1], np.uint8), list(map(int, code.split()))
        for start, length in zip(numbers[::2], numbers[1::2]): flat[start:start + length] = 1
        return flat.reshape(shape[::-1]).T

    found = doctor.check_label_offset(doctor.label_fits(catalog, 30, decode=forgetful))
    assert found["verdict"] == "fail" and "1-based" in found["advice"]


def test_few_or_noisy_images_are_said_to_tell_nothing():
    assert doctor.check_label_offset(np.ones((3, 9, 9), np.float32))["verdict"] == "skip"
    found = doctor.check_label_offset(np.random.default_rng(0).random((20, 9, 9)).astype(np.float32))
    assert found["verdict"] == "skip" and "images would do" in found["advice"]


class Apart(SegmentationDataset):
    """Half of the images are flipped, or all are moved by up to `far` pixels; the masks are not."""
    far = 0

    def arrays(self, i):
        img, msk = super().arrays(i)
        rng = np.random.default_rng(i)
        if self.far: return np.roll(img, tuple(rng.integers(-self.far, self.far + 1, 2)), (0, 1)), msk
        return (img[:, ::-1] if rng.random() < 0.5 else img), msk


@pytest.mark.parametrize("kind, far, verdict", [(SegmentationDataset, 0, "ok"), (Apart, 0, "fail"), (Apart, 3, "fail")], ids=["together", "flipped", "moved"])
def test_augmentation_that_moves_the_image_alone(catalog, kind, far, verdict):
    dataset = kind(catalog, (256, 256), augment="d4")
    dataset.far = far
    ships = np.flatnonzero(catalog.counts > 0)[:40]
    plain = SegmentationDataset(catalog, (256, 256))
    assert doctor.check_apart(doctor.item_fits(dataset, ships), doctor.item_fits(plain, ships))["verdict"] == verdict
    if not far: assert doctor.check_apart(doctor.item_fits(dataset, ships))["verdict"] == verdict   # a flip is seen without comparison
    assert doctor.check_apart(np.ones((5, 3)))["verdict"] == "skip"


def test_classes_swapped_between_the_parts(tmp_path):
    catalog = read(make_steel(tmp_path/"steel", 150, seed=2))
    half = np.arange(len(catalog)) < len(catalog) // 2
    train, valid = doctor.class_features(catalog.subset(half)), doctor.class_features(catalog.subset(~half))
    assert doctor.check_classes(train, valid)["verdict"] == "ok"
    names = sorted(np.unique(valid[1]), key=lambda o: -(valid[1] == o).sum())[:2]
    other = np.where(valid[1] == names[0], names[1], np.where(valid[1] == names[1], names[0], valid[1]))
    found = doctor.check_classes(train, (valid[0], other))
    assert found["verdict"] == "fail" and f"{names[0]} looks like {names[1]}" in found["measured"]
    assert doctor.check_classes(train, (valid[0][:3], valid[1][:3]))["verdict"] == "skip"


def test_mask_inside_out():
    batch = synthetic_batch()
    assert doctor.check_fraction([batch])["verdict"] == "ok"
    assert doctor.check_fraction([batch | {"mask": 1 - batch["mask"]}])["verdict"] == "fail"
    assert doctor.check_fraction([batch | {"mask": 0 * batch["mask"]}])["verdict"] == "fail"


def test_leaks(catalog, parts):
    train, valid = catalog.subset(parts == "train"), catalog.subset(parts == "valid")
    assert doctor.check_leak(train, valid)["verdict"] == "ok"
    named = doctor.check_leak(train, catalog.subset(np.arange(len(catalog)) < 20))
    assert named["verdict"] == "fail" and "images are in the training part" in named["measured"]
    torn = np.arange(len(catalog)) % 2 == 0
    assert "groups are in both parts" in doctor.check_leak(catalog.subset(torn), catalog.subset(~torn))["measured"]


def test_leak_on_the_pixels(tmp_path):
    make_overlapping_fleet(tmp_path/"fleet", 1, seed=1, windows=6)
    catalog = read_airbus(tmp_path/"fleet")
    catalog.images["group"] = ""
    half = np.arange(len(catalog)) < 3
    assert doctor.check_leak(catalog.subset(half), catalog.subset(~half))["verdict"] == "ok"
    assert doctor.check_leak(catalog.subset(half), catalog.subset(~half), pixels=True)["verdict"] == "fail"


def test_real_labels_are_not_blamed(real_data):
    catalog = read_airbus(real_data/"airbus")
    fits = doctor.label_fits(catalog, 109)
    assert len(fits) > 100 and doctor.check_label_offset(fits)["verdict"] in ("ok", "skip")


def test_unknown_verdict():
    with pytest.raises(ValueError, match="unknown verdict 'good'"): doctor.finding("a", "good", "")
