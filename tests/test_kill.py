"""A training that is killed anywhere, even while a checkpoint is being written, and continued ends bit-equal to one that was not.

Ten points by default, all of them (over 200) with SHIPNB_SLOW=1. Each training runs in a process of its own, which kills itself.
"""
import io
import itertools
import json
import multiprocessing
import os
import signal

import pytest
import torch
from test_training import kept, learner, loader, weights

from shipnb import checkpoints

SETUPS = {"plain": dict(accumulate=1, sched="onecycle"), "average": dict(accumulate=2, sched="plateau", ema=0.7), "momentum": dict(accumulate=3, sched="cosine", opt="sgd")}
STEPS = {"plain": 12, "average": 8, "momentum": 4}             # optimiser steps of four epochs of three batches
MOMENTS = ("before", "backward", "updated", "counted", "writing", "written", "renamed", "pruned")
POINTS = [(name, moment, step) for name in SETUPS for moment in MOMENTS for step in range(1, STEPS[name] + 1)] + \
         [(name, moment, step) for name in SETUPS for moment in ("evaluating", "yielded") for step in range(1, 5)]


def die(): os.kill(os.getpid(), signal.SIGKILL)


def kill_at(one, moment, step):
    """Make a Learner kill its own process at one moment of one step (of one epoch, for "evaluating")."""
    def before(function, count=itertools.count(1)):
        return lambda *o, **k: die() if next(count) == step else function(*o, **k)

    def after(function, count=itertools.count(1)):
        return lambda *o, **k: (function(*o, **k), die() if next(count) == step else None)[0]

    def half(state, path):
        whole = io.BytesIO()
        save(state, whole)
        path.write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])

    save = torch.save
    if moment == "before": one.step = before(one.step)
    if moment == "backward": one._backward = after(one._backward)
    if moment == "updated": one._update = after(one._update)
    if moment == "counted": one._count = after(one._count)
    if moment == "evaluating": one.evaluate = before(one.evaluate)
    if moment == "writing": checkpoints.torch.save = lambda *o, count=itertools.count(1): (half(*o), die()) if next(count) == step else save(*o)
    if moment == "written": checkpoints.sha256_file = after(checkpoints.sha256_file)
    if moment == "renamed": checkpoints._sync_folder = before(checkpoints._sync_folder)
    if moment == "pruned": one.save = after(one.save)


def run(folder, name, moment=None, step=0):
    """Start or continue the training of one setup, saving after every step and every epoch; be killed on the way if asked."""
    torch.set_num_threads(1)
    one = learner(folder, save_every=1, log_every=1, **SETUPS[name])
    if moment: kill_at(one, moment, step)
    if folder.exists(): one.resume()
    for k, _ in enumerate(one.epochs(4, loader(), loader()), 1):
        if moment == "yielded" and k == step: die()
        one.save()
    return one


@pytest.fixture(scope="module")
def start():
    """Start a process that trains: from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "lightning.fabric", "shipnb.training"])   # not the test modules: the server does not see their folder
    def started(*args):
        process = context.Process(target=run, args=args)
        process.start()
        process.join(120)
        return process.exitcode
    return started


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each setup gives when nobody disturbs it."""
    return {name: end(run(tmp_path_factory.mktemp("whole")/name, name)) for name in SETUPS}


def end(one):
    """Everything that must be equal at the end."""
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in one.history]
    lines = [json.loads(o) for o in (one.folder/"steps.jsonl").read_text().splitlines()]
    return weights(one), kept(one), history, lines, one.opt.state_dict(), {k: v for k, v in one.state().items() if k in ("epoch", "batch", "steps", "split", "skipped", "recent", "sched")}


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def killed(start, folder, name, *points):
    """Kill a training at each of the points in turn, continuing between; then let it end in this process."""
    for moment, step in points: assert start(folder, name, moment, step) == -signal.SIGKILL, f"{moment} {step} was not reached"
    assert not [o for o in folder.glob("last-*") if not checkpoints.NAME.fullmatch(o.name)]
    return end(run(folder, name))


SOME = POINTS if os.environ.get("SHIPNB_SLOW") == "1" else [("plain", "before", 1), ("plain", "writing", 1), ("plain", "pruned", 3), ("plain", "evaluating", 4), ("average", "backward", 5), ("average", "written", 8),
                                                            ("average", "renamed", 2), ("average", "yielded", 2), ("momentum", "updated", 4), ("momentum", "counted", 3)]


def test_there_are_two_hundred_points():
    assert len(POINTS) >= 200 and set(SOME) <= set(POINTS)


@pytest.mark.parametrize("name, moment, step", SOME)
def test_killed_and_continued_it_ends_bit_equal(start, whole, tmp_path, name, moment, step):
    assert same(killed(start, tmp_path/"run", name, (moment, step)), whole[name])


def test_killed_twice(start, whole, tmp_path):
    assert same(killed(start, tmp_path/"run", "average", ("writing", 3), ("backward", 2)), whole["average"])
    assert same(killed(start, tmp_path/"again", "plain", ("renamed", 1), ("renamed", 1), ("counted", 1)), whole["plain"])


def test_a_difference_would_be_seen(whole, tmp_path):
    """The comparison is not blind: one bit of one weight, or one line of the log, makes it fail."""
    one = end(run(tmp_path/"run", "plain"))
    assert same(one, whole["plain"])
    one[0].view(torch.int32)[3] ^= 1
    assert not same(one, whole["plain"])
    other = end(run(tmp_path/"other", "plain"))
    other[3][5]["loss"] += 1e-12
    assert not same(other, whole["plain"])
