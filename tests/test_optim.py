"""Optimisers against a step in NumPy, schedules against formulas written by hand, frozen stages against a perturbation of each."""
import copy
import inspect
import io
import math
import warnings

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from shipnb.models import build_unet
from shipnb.optim import FUSED, OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule, clip_gradients, encoder_stages, freeze, parameter_groups


@pytest.fixture
def small():
    """A model of a convolution, a batch norm and a linear layer, in an "encoder" and a "head"."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Module()
    model.encoder, model.head = encoder, nn.Conv2d(4, 1, 1)
    model.forward = lambda x: model.head(model.encoder(x))
    return model


# --- one optimiser step, by hand in double

def by_hand(name, w, gradients, lr, decay, momentum):
    """The weight after one step per gradient: Kingma and Ba 2015, Loshchilov and Hutter 2019, Tieleman and Hinton 2012, Duchi et al. 2011, with torch's constants."""
    a = b = np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if name == "adamw": w = w * (1 - lr * decay)
        else: g = g + decay * w
        if name in ("adam", "adamw"):
            a, b = 0.9 * a + 0.1 * g, 0.999 * b + 0.001 * g * g
            w = w - lr * (a / (1 - 0.9**t)) / (np.sqrt(b / (1 - 0.999**t)) + 1e-8)
        elif name == "sgd":
            a = g if t == 1 else momentum * a + g
            w = w - lr * a
        elif name == "rmsprop":
            a = 0.99 * a + 0.01 * g * g
            b = momentum * b + g / (np.sqrt(a) + 1e-8)
            w = w - lr * b
        elif name == "adagrad":
            a = a + g * g
            w = w - lr * g / (np.sqrt(a) + 1e-10)
    return w


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_three_steps_are_the_published_rule(name, decay):
    """Of a weight, which decays, and of a bias, which does not; the encoder's rate is a tenth."""
    rng = np.random.default_rng(0)
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)}).double()
    start = {k: v.detach().numpy().copy() for k, v in model.named_parameters()}
    gradients = {k: rng.standard_normal((3, *v.shape)) for k, v in start.items()}
    opt = build_optimizer(name, model, 0.05, decay, {"encoder": 0.1}, momentum=0.8)
    for step in range(3):
        for k, v in model.named_parameters(): v.grad = torch.tensor(gradients[k][step])
        opt.step()
    for k, v in model.named_parameters():
        lr = 0.005 if k.startswith("encoder") else 0.05
        expected = by_hand(name, start[k], gradients[k], lr, 0.0 if k.endswith("bias") else decay, 0.8)
        assert np.allclose(v.detach().numpy(), expected, rtol=1e-12, atol=1e-14), k


def test_no_decay_for_any_norm_or_bias_of_a_unet_and_every_parameter_once():
    model = build_unet("resnet18")
    groups = parameter_groups(model, 1e-3, 0.1, {"encoder": 0.1, "encoder.layer4": 0.5})
    where = {id(p): g for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(where) == len(list(model.parameters()))
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    for name, p in model.named_parameters():
        assert where[id(p)]["weight_decay"] == (0.0 if id(p) in norms or name.endswith("bias") else 0.1)
        factor = 0.5 if name.startswith("encoder.layer4.") else 0.1 if name.startswith("encoder.") else 1.0
        assert where[id(p)]["lr"] == 1e-3 * factor
    assert groups[0]["name"] == "rest" and groups[0]["lr"] == 1e-3          # what a log shows as the learning rate


def test_without_decay_and_groups_it_is_one_group_as_torch_makes_it():
    model = nn.Linear(3, 2)
    (group,) = parameter_groups(model, 0.1)
    assert group["params"] == list(model.parameters())


def test_a_name_is_no_prefix_of_another():
    model = nn.ModuleDict({"enc": nn.Linear(1, 1), "encoder": nn.Linear(1, 1)})
    rates = {g["name"]: g["lr"] for g in parameter_groups(model, 1.0, groups={"enc": 0.5})}
    assert rates == {"rest": 1.0, "enc": 0.5}
    assert [o.shape for o in parameter_groups(model, 1.0, groups={"enc": 0.5, "encoder.bias": 2})[2]["params"]] == [(1,)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_where_torch_has_it(name):
    fused = lambda device, of="cpu": bool(build_optimizer(name, nn.Linear(1, 1, device=of), 0.1, device=device).defaults.get("fused"))
    assert [fused(None), fused("cpu"), fused("cuda")] == {"rmsprop": [False] * 3, "adagrad": [False, True, False]}.get(name, [True] * 3)
    assert not fused(None, "meta") and not fused("mps") and set(FUSED) == set(OPTIMIZERS) - {"rmsprop"}


def some_steps(model, opt, first, n):
    """Steps number `first` to `first + n - 1` on random batches of their own."""
    for k in range(first, first + n):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(k))
        opt.zero_grad()
        (model(x).sin() * x.cos()).mean().backward()
        opt.step()
    return torch.cat([o.detach().flatten() for o in model.parameters()])


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6))


def unfused(name, model):
    """The optimiser as torch gives it by itself."""
    return OPTIMIZERS[name](model.parameters(), lr=0.01, weight_decay=0.0, foreach=False, **({"momentum": 0.9} if name == "sgd" else {}))


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_kernel_does_what_the_plain_one_does(name):
    fused, plain = layers(), layers()
    ours = some_steps(fused, build_optimizer(name, fused, 0.01, device="cpu"), 0, 20)
    theirs = some_steps(plain, unfused(name, plain), 0, 20)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) and not torch.allclose(ours, torch.cat([o.detach().flatten() for o in layers().parameters()]), atol=1e-3)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_a_checkpoint_goes_on_as_it_was_made(name, before, tmp_path):
    """Bit-equal, whether its optimiser was fused (as now) or not (as Adagrad's were)."""
    make = lambda model: build_optimizer(name, model, 0.01, device="cpu") if before else unfused(name, model)
    model = layers()
    opt = make(model)
    some_steps(model, opt, 0, 5)
    torch.save([model.state_dict(), opt.state_dict()], tmp_path/"c.pt")
    whole = some_steps(model, opt, 5, 5)
    weights, state = torch.load(tmp_path/"c.pt", weights_only=True)
    again = layers(1)
    again.load_state_dict(weights)
    opt = build_optimizer(name, again, 0.01, device="cpu")
    opt.load_state_dict(state)
    assert bool(opt.param_groups[0].get("fused")) == before
    assert torch.equal(some_steps(again, opt, 5, 5), whole)


def test_optimizer_state_round_trips_through_a_weights_only_file(small):
    opt = build_optimizer("adamw", small, 1e-3, 0.1, {"encoder": 0.1})
    small.forward(torch.randn(2, 3, 8, 8)).mean().backward()
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = build_optimizer("adamw", small, 1e-3, 0.1, {"encoder": 0.1})
    again.load_state_dict(torch.load(file, weights_only=True))
    assert [g["name"] for g in again.param_groups] == ["rest", "rest, no decay", "encoder", "encoder, no decay"]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(opt.state.values(), again.state.values()))


# --- frozen stages

@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "mobilenet_v2", "tu-convnext_atto"])
def test_stages_by_moving_the_weights_of_each(encoder):
    """Features below a stage do not feel it, its own do, and nothing is left over: found by changing numbers, not by autograd."""
    torch.manual_seed(0)
    net = smp.encoders.get_encoder(encoder, weights=None).eval()
    stages = encoder_stages(net)
    names = [n for stage in stages for n in stage]
    assert len(set(names)) == len(names)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): plain = net(x)[1:]
    assert len(plain) == len(stages)
    for k, stage in enumerate(stages):
        if not stage: continue
        moved, parts = copy.deepcopy(net), set(stage)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                if name in parts: p.mul_(1.5).add_(0.1)
            equal = [torch.equal(a, b) for a, b in zip(plain, moved(x)[1:])]
        assert all(equal[:k]) and not equal[k], (encoder, k, equal)
    rest = set(dict(net.named_parameters())) - set(names)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if name in rest: p.add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(plain, moved(x)[1:])), "a parameter that matters is in no stage"


def test_telling_the_stages_changes_nothing():
    model = build_unet("resnet18", in_channels=4)
    model.encoder.conv1.weight.requires_grad_(False)
    model.encoder.layer1.eval()
    state, modes, rng = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    with torch.inference_mode(False), torch.no_grad(): stages = encoder_stages(model.encoder)
    assert stages[0] == ["conv1.weight", "bn1.weight", "bn1.bias"] and all(n.startswith("layer4.") for n in stages[4])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert modes == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["encoder.conv1.weight"]


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_frozen_stages_stay_bit_equal(name):
    """Weights, running statistics and counts, over three steps in training mode with weight decay, an average of the weights, and a copy."""
    torch.manual_seed(0)
    model = build_unet("resnet18", decoder=[8, 8, 8, 8, 8])
    held = freeze(model, stages=3, names=["segmentation_head"])
    assert held == sum(p.numel() for m in (model.encoder.conv1, model.encoder.bn1, model.encoder.layer1, model.encoder.layer2, model.segmentation_head) for p in m.parameters())
    start = copy.deepcopy(model.state_dict())
    opt = build_optimizer(name, model, 1e-2, 0.1, {"encoder": 0.1})
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        model.train()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        opt.step(), opt.zero_grad(set_to_none=True)
        average.update_parameters(model)
    frozen = ("encoder.conv1.", "encoder.bn1.", "encoder.layer1.", "encoder.layer2.", "segmentation_head.")
    still = {k for k, v in model.state_dict().items() if torch.equal(v, start[k])}
    assert still == {k for k in start if k.startswith(frozen)}
    assert all(torch.equal(average.module.state_dict()[k], start[k]) for k in still)
    assert all(p.grad is None for p in model.segmentation_head.parameters())
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(model).train()                                     # the hook goes with the copy
    twin(x)
    assert torch.equal(twin.encoder.bn1.running_mean, start["encoder.bn1.running_mean"])


def test_without_the_hook_a_frozen_batch_norm_drifts():
    """The trap is real: parameters frozen, statistics moving."""
    model = build_unet("resnet18", decoder=[8, 8, 8, 8, 8])
    model.encoder.requires_grad_(False)
    before = model.encoder.bn1.running_mean.clone()
    model.train()(torch.randn(2, 3, 32, 32))
    assert not torch.equal(before, model.encoder.bn1.running_mean)


def test_freezing_twice_adds_one_hook_and_a_detector_freezes_by_name():
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, norm_layer=nn.BatchNorm2d, num_classes=2)
    freeze(model, names=["backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"])
    freeze(model, names=["backbone.body.layer1"])
    assert len(model.backbone.body.bn1._forward_pre_hooks) == 1 and not model.backbone.body.layer2[0].bn1._forward_pre_hooks
    before = model.backbone.body.layer1[0].bn1.running_mean.clone()
    model.train().backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(before, model.backbone.body.layer1[0].bn1.running_mean)


# --- clipping

def test_clipping_by_norm_and_by_value():
    rng = np.random.default_rng(0)
    for norm, value in ((0.5, None), (1e6, None), (None, 0.3), (None, None)):
        model = nn.Linear(3, 2).double()
        grads = [rng.standard_normal(p.shape) for p in model.parameters()]
        for p, g in zip(model.parameters(), grads): p.grad = torch.tensor(g)
        length = math.sqrt(sum((g**2).sum() for g in grads))
        assert float(clip_gradients(model, norm, value)) == pytest.approx(length, rel=1e-12)
        for p, g in zip(model.parameters(), grads):
            want = np.clip(g, -value, value) if value else g * min(1, (norm or math.inf) / (length + 1e-6))   # torch's guard against a norm of 0
            assert np.allclose(p.grad.numpy(), want, rtol=1e-12)
    assert clip_gradients([nn.Parameter(torch.ones(1))], norm=1.0) == 0     # nothing has a gradient


# --- schedules

def dot(lr=1.0, name="sgd", groups=None, **options):
    model = nn.ModuleDict({"encoder": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    for p in model.parameters(): p.grad = torch.ones_like(p)
    return build_optimizer(name, model, lr, groups=groups or {"encoder": 0.1}, **options)


def run(opt, sched, steps, per_epoch=5, score=lambda epoch: 0.5, first=0):
    """[rates of all groups at each step], stepping the schedule where it says."""
    found = []
    for step in range(first, steps):
        found.append([g["lr"] for g in opt.param_groups])
        opt.step()
        if sched.per == "step": sched.step()
        elif step % per_epoch == per_epoch - 1: sched.step(score(step // per_epoch), step // per_epoch)
    return found


def up_and_down(step, steps, rise=0.3, start=25.0, end=1e4):
    """Smith's one cycle with cosines, torch's positions: the top at step rise * steps - 1, the bottom at the last step."""
    blend = lambda a, b, share: b + (a - b) * (1 + math.cos(math.pi * share)) / 2
    top, last = rise * steps - 1, steps - 1
    return blend(1 / start, 1, step / top) if step <= top else blend(1, 1 / start / end, (step - top) / (last - top))


def warm_cosine(step, steps, base, warm, n):
    """object_detection/utils/learning_schedules.py, cosine_decay_with_warmup, as a formula."""
    if step < n: return (base - warm) / n * step + warm
    return 0.5 * base * (1 + math.cos(math.pi * (step - n) / (steps - n)))


CASES = {
    "constant": ({}, lambda step: 2.0), "onecycle": ({}, lambda step: 2 * up_and_down(step, 60)), "cosine": ({}, lambda step: 1 + math.cos(math.pi * step / 60)),
    "cosine, warm": ({"warmup_steps": 7, "warmup_lr": 0.5}, lambda step: warm_cosine(step, 60, 2.0, 0.5, 7)),
    "onecycle, narrow": ({"rise": 0.5, "start": 4, "end": 10}, lambda step: 2 * up_and_down(step, 60, 0.5, 4, 10)),
    "staged": ({"rates": [2.0, 0.3, 1e-10], "lengths": [10, 20, 30]}, lambda step: 2.0 if step < 10 else 0.3 if step < 30 else 1e-10),
    "staged, epochs": ({"rates": [1.0, 0.5], "lengths": [3, 1], "steps_per_epoch": 5}, lambda step: 1.0 if step < 15 else 0.5),
    "plateau": ({"factor": 0.5}, lambda step: 2.0 * 0.5**max(0, (step // 5 - 1) // 2)),      # flat: worse looks after epochs 1, 2 | 3, 4 | ...
}


@pytest.mark.parametrize("case", CASES)
def test_rates_are_the_closed_form(case):
    options, formula = CASES[case]
    opt = dot(2.0)
    sched = build_schedule(case.split(",")[0], opt, 60, **options)
    got = np.array(run(opt, sched, 60))
    want = np.array([formula(step) for step in range(60)])
    assert np.allclose(got[:, 0], want, rtol=1e-9, atol=1e-15) and np.allclose(got[:, 1], 0.1 * want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case,name", [(case, "adam") for case in CASES] + [("onecycle", "sgd"), ("plateau", "rmsprop")])
def test_stopped_at_any_step_the_rates_go_on_bit_for_bit(case, name):
    """Optimiser and schedule are built anew and loaded from a weights-only file; momentum, which one-cycle moves, included."""
    options, _ = CASES[case]
    make = lambda: (opt := dot(2.0, name), build_schedule(case.split(",")[0], opt, 60, **options))
    score = lambda epoch: [0.1, 0.3, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4][epoch]
    whole_opt, whole_sched = make()
    whole = run(whole_opt, whole_sched, 60, score=score)
    for stop in range(60):
        opt, sched = make()
        run(opt, sched, stop, score=score)
        file = io.BytesIO()
        torch.save((opt.state_dict(), sched.state_dict()), file)
        file.seek(0)
        opt, sched = make()
        for o, state in zip((opt, sched), torch.load(file, weights_only=True)): o.load_state_dict(state)
        assert run(opt, sched, 60, score=score, first=stop) == whole[stop:], stop
        assert [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] == [{k: v for k, v in g.items() if k != "params"} for g in whole_opt.param_groups]


def test_the_oil_storage_configuration():
    opt = dot(0.0025)
    sched = build_schedule("cosine", opt, 15_000, warmup_steps=1_500, warmup_lr=0.00083333)
    for step in (0, 1, 1_499, 1_500, 1_501, 8_000, 14_999): assert sched.rate(step) == pytest.approx(warm_cosine(step, 15_000, 0.0025, 0.00083333, 1_500), rel=1e-12)
    assert sched.rate(15_000) == sched.rate(99_999) == 0
    assert opt.param_groups[0]["lr"] == 0.00083333 and opt.param_groups[1]["lr"] == pytest.approx(0.000083333)


def test_staged_rates_are_exactly_the_numbers_given():
    """1e-10 must be 1e-10, not 1e-4 times a quotient."""
    rates = [1e-4, 1e-5, 1e-9, 1e-10]
    opt = dot(3e-4)
    sched = build_schedule("staged", opt, 8, rates=rates, lengths=[2, 2, 2, 2])
    assert [o[0] for o in run(opt, sched, 8)] == [o for o in rates for _ in range(2)]


def plain_plateau(scores, lr, mode, factor, patience, threshold, min_lr=0.0):
    """ReduceLROnPlateau as a loop: the rate after each score."""
    best, bad, found = -math.inf if mode == "max" else math.inf, 0, []
    for o in scores:
        better = o > best * (1 + threshold) if mode == "max" else o < best * (1 - threshold)
        best, bad = (o, 0) if better else (best, bad + 1)
        if bad > patience: lr, bad = max(lr * factor, min_lr), 0
        found.append(lr)
    return found


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_its_rule(mode, patience):
    for seed in range(5):
        scores = np.random.default_rng(seed).uniform(0.4, 0.6, 40).round(2)
        opt = dot(1e-4)
        sched = build_schedule("plateau", opt, 1, mode=mode, factor=0.1, patience=patience, min_lr=1e-13)
        got = [(sched.step(o, i), opt.param_groups[0]["lr"])[1] for i, o in enumerate(scores)]
        assert got == pytest.approx(plain_plateau(scores, 1e-4, mode, 0.1, patience, 1e-4, 1e-13), rel=1e-12)
        assert got[-1] < 1e-6


def test_plateau_of_scores_of_either_sign():
    """torch's own rule asks of a negative score that it be worse; of others ours is torch's to the bit."""
    worse = [-2.0, -2.0001, -2.0002, -2.0003]
    for ours, want in ((False, 1.0), (True, 0.1)):
        opt = dot(1.0)
        sched = build_schedule("plateau", opt, 1, patience=2) if ours else torch.optim.lr_scheduler.ReduceLROnPlateau(opt, "max", 0.1, 2)
        for o in worse: sched.step(o)
        assert opt.param_groups[0]["lr"] == pytest.approx(want)
    for mode in ("min", "max"):
        for seed in range(5):
            scores = np.random.default_rng(seed).uniform(0, 1, 60)
            pairs = [(opt := dot(1.0), build_schedule("plateau", opt, 1, mode=mode, factor=0.7)), (opt := dot(1.0), torch.optim.lr_scheduler.ReduceLROnPlateau(opt, mode, 0.7, 1, eps=0))]
            for o in scores:
                for _, sched in pairs: sched.step(o)
                assert pairs[0][0].param_groups[0]["lr"] == pairs[1][0].param_groups[0]["lr"]
            mirrored = build_schedule("plateau", dot(1.0), 1, mode="max" if mode == "min" else "min", factor=0.7)
            for o in scores: mirrored.step(-o)
            assert mirrored.optimizer.param_groups[0]["lr"] == pairs[0][0].param_groups[0]["lr"]


def test_plateau_is_stepped_once_per_epoch():
    opt = dot(1.0)
    sched = build_schedule("plateau", opt, 1)
    sched.step(0.5, 0)
    for again in (0, -1):
        with pytest.raises(ValueError, match="it is stepped once per epoch, not again for epoch"): sched.step(0.5, again)
    assert sched.num_bad_epochs == 0 and opt.param_groups[0]["lr"] == 1.0     # the refused looks counted nothing
    kept = sched.state_dict()
    sched = build_schedule("plateau", opt, 1)
    sched.load_state_dict(kept)
    with pytest.raises(ValueError, match="has seen epoch 0"): sched.step(0.5, 0)   # also after a resume
    sched.step(0.5, 3)                                                        # scored every third epoch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sched.step(torch.tensor(0.5))                                         # without an epoch each call counts
    assert sched.seen == 4 and opt.param_groups[0]["lr"] == pytest.approx(0.1)


def test_plateau_moves_tiny_rates_where_torch_does_not():
    for eps, want in ((0.0, 1e-9), (1e-8, 1e-8)):
        opt = dot(1e-8)
        sched = build_schedule("plateau", opt, 1, patience=0, eps=eps)
        sched.step(0.5), sched.step(0.5)
        assert opt.param_groups[0]["lr"] == pytest.approx(want)


def test_one_cycle_moves_momentum_only_where_there_is_some():
    for name, options, key, want in (("sgd", {}, "momentum", 0.95), ("sgd", {"momentum": 0.0}, "momentum", 0.0), ("rmsprop", {}, "momentum", 0.95), ("adagrad", {}, "lr_decay", 0)):
        opt = dot(1.0, name, **options)
        build_schedule("onecycle", opt, 10)
        assert opt.param_groups[0][key] == want
    opt = dot(1.0, "adam")
    sched = build_schedule("onecycle", opt, 10)
    betas = [(opt.param_groups[0]["betas"][0], opt.step(), sched.step())[0] for _ in range(10)]
    assert betas[2] == pytest.approx(0.85) and betas[0] == betas[-1] == pytest.approx(0.95)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_says_when_it_is_stepped(name):
    sched = build_schedule(name, dot(), 10, **({"rates": [1.0], "lengths": [1]} if name == "staged" else {}))
    assert sched.per == ("epoch" if name == "plateau" else "step")
    assert ("once per epoch" if sched.per == "epoch" else "after every step of the optimiser") in inspect.getdoc(type(sched))

# --- inside the Learner

@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learner_stopped_at_any_step_goes_on_bit_equal(tmp_path, name):
    """Groups, decay, schedule and momentum all come from here; the loop, the data and the stop from the Learner's own tests."""
    from test_training import TASK, StopAt, Task, loader, net, weights

    from shipnb.training import Learner
    options = {"staged": dict(rates=[0.05, 0.01], lengths=[2, 2], steps_per_epoch=3), "cosine": dict(warmup_steps=3, warmup_lr=0.01), "plateau": dict(patience=0, threshold=0.5)}

    def learner(folder=None):
        model = net()
        opt = build_optimizer("adamw", model, 0.05, 0.1, {"0": 0.1})
        return Learner(model, TASK, opt, build_schedule(name, opt, 12, **options.get(name, {})), folder, device="cpu", key="k", monitor="score", progress=False)

    whole = learner()
    for _ in whole.epochs(4, loader(), loader()): pass
    for at in (1, 3, 5, 9, 12):
        first = learner(tmp_path/str(at))
        object.__setattr__(first, "task", Task(StopAt(at).loss, TASK.predict, TASK.metric))
        with pytest.raises(KeyboardInterrupt):
            for _ in first.epochs(4, loader(), loader()): pass
        again = learner(tmp_path/str(at))
        assert again.resume()
        for _ in again.epochs(4, loader(), loader()): pass
        assert torch.equal(weights(whole), weights(again)) and [g["lr"] for g in whole.opt.param_groups] == [g["lr"] for g in again.opt.param_groups]
    if name == "plateau": assert whole.lr < 0.05


def test_frozen_stages_stay_bit_equal_in_the_learner():
    """Autocast, channels-last, the average of the weights, and a training mode that is set anew each epoch."""
    from test_training import Order

    from shipnb.tasks import segmentation_task
    from shipnb.training import Learner

    class Images(torch.utils.data.Dataset):
        def __len__(self): return 12
        def set_epoch(self, epoch): pass
        def __getitems__(self, index):
            image = torch.stack([torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8) for i in index])
            return dict(image=image, mask=(image[..., 0] > 200).byte(), has_ship=torch.ones(len(index), dtype=torch.bool), index=torch.tensor(index))

    torch.manual_seed(0)
    model = build_unet("resnet18", decoder=[8, 8, 8, 8, 8])
    freeze(model, stages=4)
    start = copy.deepcopy(model.state_dict())
    opt = build_optimizer("adam", model, 1e-2, groups={"encoder": 0.1})
    one = Learner(model, segmentation_task({"bce": 1, "jaccard": 1}), opt, build_schedule("onecycle", opt, 6), precision="bf16-mixed", clip=1.0, device="cpu", progress=False, ema=0.5)
    data = torch.utils.data.DataLoader(Images(), batch_sampler=Order(), collate_fn=lambda o: o, generator=torch.Generator())
    rows = list(one.epochs(2, data, data))
    frozen = ("encoder.conv1.", "encoder.bn1.", "encoder.layer1.", "encoder.layer2.", "encoder.layer3.")
    for state in (one.model.module.state_dict(), one.trained.state_dict()):
        assert {k for k in start if torch.equal(state[k], start[k])} == {k for k in start if k.startswith(frozen)}
    assert rows[1]["loss"] < rows[0]["loss"]


# --- bad parameters

line = nn.Linear(1, 1)
BAD = [
    (lambda: build_optimizer("adm", line, 1), "unknown optimiser 'adm'; known are adam, adamw, rmsprop, adagrad, sgd"),
    (lambda: build_optimizer("adam", line, 0), "lr must be positive, not 0"), (lambda: build_optimizer("adam", line, float("nan")), "lr must be positive, not nan"),
    (lambda: build_optimizer("adam", line, "1e-3"), "lr must be positive, not '1e-3'"),                    # what YAML makes of 1e-3
    (lambda: build_optimizer("adam", line, 1, -1), "weight_decay must be at least 0, not -1"),
    (lambda: build_optimizer("sgd", line, 1, momentum=1), "momentum must be at least 0 and below 1, not 1"),
    (lambda: build_optimizer("adam", line, 1, groups={"weight": 0}), "the factor of group 'weight' must be positive, not 0"),
    (lambda: build_optimizer("adam", line, 1, groups={"wight": 1}), "the model has no parameters 'wight'"),
    (lambda: build_optimizer("adam", nn.Linear(1, 1).requires_grad_(False), 1), "the model has no parameter that is trained: everything is frozen"),
    (lambda: build_optimizer("adam", frozen_bias(), 1, groups={"bias": 0.1}), "group 'bias' holds no parameter that is trained"),
    (lambda: freeze(line, stages=1), "stages are those of model.encoder, and this model has none"), (lambda: freeze(line, stages=-1), "stages must be a whole number of at least 0"),
    (lambda: freeze(line, stages=1.0), "stages must be a whole number of at least 0, not 1.0"), (lambda: freeze(line, names=["nothing"]), "no parameters 'nothing'"),
    (lambda: encoder_stages(nn.Sequential(nn.Conv2d(3, 1, 99))), "the stages of this encoder cannot be told"),
    (lambda: clip_gradients(line, norm=0), "norm must be positive, not 0"), (lambda: clip_gradients(line, value=-1), "value must be positive, not -1"),
    (lambda: clip_gradients(line, 1, 1), "clip by norm or by value, not by both"),
    (lambda: build_schedule("step", dot(), 10), "unknown schedule 'step'; known are constant, onecycle, cosine, staged, plateau"),
    (lambda: build_schedule("constant", dot(), 0), "steps must be a whole number of at least 1, not 0"), (lambda: build_schedule("constant", dot(), 10, warm=1), "has no option 'warm'; it has none"),
    (lambda: build_schedule("cosine", dot(), 10, warmup_steps=10), "warmup_steps must be below the 10 steps of the training, not 10"),
    (lambda: build_schedule("cosine", dot(), 10, warmup_steps=-1), "warmup_steps must be a whole number of at least 0"),
    (lambda: build_schedule("cosine", dot(), 10, warmup_steps=2, warmup_lr=3), "warmup_lr must be between 0 and the highest rate 1.0, not 3"),
    (lambda: build_schedule("onecycle", dot(), 10, rise=1), "rise must be between 0 and 1, not 1"), (lambda: build_schedule("onecycle", dot(), 10, end=0.5), "end must be at least 1"),
    (lambda: build_schedule("staged", dot(), 10), "schedule 'staged' needs rates and lengths"),
    (lambda: build_schedule("staged", dot(), 10, rates=[1], lengths=[1, 2]), "two lists of equal length"), (lambda: build_schedule("staged", dot(), 10, rates=[], lengths=[]), "two lists"),
    (lambda: build_schedule("staged", dot(), 10, rates=[0], lengths=[1]), "a rate must be positive, not 0"), (lambda: build_schedule("staged", dot(), 10, rates=[1], lengths=[0]), "a length must be"),
    (lambda: build_schedule("staged", dot(), 10, rates=[1, 2], lengths=[5, 5], steps_per_epoch=2), "the last stage begins at step 10, and the training has 10 steps"),
    (lambda: build_schedule("plateau", dot(), 10, mode="up"), "mode must be 'min' or 'max', not 'up'"), (lambda: build_schedule("plateau", dot(), 10, factor=1), "factor must be between 0 and 1, not 1"),
    (lambda: build_schedule("plateau", dot(), 10, threshold=1), "threshold must be at least 0 and below 1, not 1"),
    (lambda: build_schedule("plateau", dot(), 10, patience=1.5), "patience must be a whole number of at least 0, not 1.5"),
    (lambda: build_schedule("plateau", dot(), 10).step(float("nan")), "the score of the plateau schedule must be a finite number, not nan"),
]


def frozen_bias():
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("call,message", BAD, ids=[o[1][:40] for o in BAD])
def test_bad_parameters_are_one_clear_sentence(call, message):
    with pytest.raises(ValueError) as caught: call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_cuda_a_model_that_moved_after_the_optimiser_was_built_steps_as_on_the_cpu(name):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))]
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(8, 4)
    for model, device in zip(models, ("cpu", "cuda")):
        opt = build_optimizer(name, model, 1e-2, 0.1, {"0": 0.1})
        model.to(device)
        for _ in range(3):
            model(x.to(device)).square().mean().backward()
            clip_gradients(model, norm=0.1)
            opt.step(), opt.zero_grad()
    for a, b in zip(*(m.parameters() for m in models)): assert torch.allclose(a, b.cpu(), atol=1e-5)
