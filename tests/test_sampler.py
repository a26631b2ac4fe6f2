"""The sampler: exact counts for any setting, streams without early repeats, random access, resuming, shards, and a simulation that tells the truth."""
import json
import math
import os
import pathlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from shipnb.sampler import (STRATA, ShipStratifiedSampler, balanced_multiple_ratio, coverage, image_strata, images_after, simulate,
                            stratum_shares)

decimals = st.integers(0, 10_000).map(lambda n: n / 10_000)


@st.composite
def share_triples(draw):
    """Any three exact shares with sum 1: decimals, awkward quotients, zeros."""
    if draw(st.booleans()):
        first, second = sorted((draw(decimals), draw(decimals)))
        first, second = Fraction(str(first)), Fraction(str(second))
        return draw(st.permutations([first, second - first, 1 - second]))
    parts = draw(st.lists(st.integers(0, 50_000), min_size=3, max_size=3).filter(any))
    return [Fraction(part, sum(parts)) for part in parts]


@settings(max_examples=400, deadline=None)
@given(share_triples(), st.sampled_from([1, 2, 3, 4, 5, 7, 9, 16, 25, 64, 1000]), st.integers(0, 10 ** 12))
def test_totals_are_exact_shares_rounded_and_batches_are_whole(shares, batch, start):
    before = images_after(start, batch, shares)
    for t in range(start + 1, start + 40):
        total = images_after(t, batch, shares)
        assert sum(total) == t * batch
        for share, now, then in zip(shares, total, before):
            exact = t * batch * share                       # Fraction arithmetic: an oracle without rounding
            assert abs(now - exact) < 1 and now >= then
            assert now - then in (math.floor(batch * share), math.ceil(batch * share))
            if exact.denominator == 1: assert now == exact
        before = total


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_small_batches_over_every_share_in_tenths(batch):
    for a in range(11):
        for b in range(11 - a):
            shares = [Fraction(a, 10), Fraction(b, 10), Fraction(10 - a - b, 10)]
            totals = np.array([images_after(t, batch, shares) for t in range(101)])
            steps = np.diff(totals, axis=0)
            assert (steps >= 0).all() and (steps.sum(1) == batch).all()
            assert (np.abs(10 * steps - batch * np.array([a, b, 10 - a - b])) < 10).all()
            exact = np.arange(101)[:, None] * batch * np.array([a, b, 10 - a - b])       # tenths of images
            assert (np.abs(10 * totals - exact) < 10).all()
            assert (totals[10] == np.array([a, b, 10 - a - b]) * batch).all()            # after ten batches nothing is left over


def test_cumulative_rounding_would_take_images_back():
    """The rule the notebook rejects does fail there, and ours does not."""
    bounds = [[int(t * s) for s in (Fraction(2, 5), Fraction(3, 5), 1)] for t in range(8)]
    middle = [b[1] - b[0] for b in bounds]
    assert min(np.diff(middle)) < 0
    ours = [images_after(t, 1, (Fraction(2, 5), Fraction(1, 5), Fraction(2, 5)))[1] for t in range(8)]
    assert min(np.diff(ours)) >= 0


def test_no_float_drift_over_a_million_batches():
    shares = stratum_shares((10, 10, 10), 0.1, 0.3629)
    assert images_after(1_000_000, 16, shares) == (1_600_000, 8_593_600, 5_806_400)


@given(st.lists(st.integers(1, 40), min_size=3, max_size=3), st.integers(1, 12), st.one_of(st.none(), decimals), st.one_of(st.none(), decimals),
       st.integers(0, 2 ** 40))
@settings(max_examples=60, deadline=None)
def test_each_image_once_before_any_repeats(sizes, batch, zero, multiple, seed):
    counts = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], sizes))
    if (zero or 0) + (multiple or 0) > 1: zero = multiple = None
    sampler = ShipStratifiedSampler(counts, batch, zero, multiple, seed=seed)
    drawn = Counter()
    for t, images in zip(range(60), (images for _ in range(60) for images in sampler)):
        assert len(images) == batch and all(type(i) is int for i in images)
        drawn.update(images)
        shown = np.array([drawn[i] for i in range(len(counts))])
        for k in range(3):
            mine = shown[np.minimum(counts, 2) == k]
            assert mine.max() - mine.min() <= 1
            assert mine.sum() == images_after(t + 1, batch, sampler.shares)[k]


def test_a_batch_can_be_asked_for_without_the_earlier_ones():
    counts = np.random.default_rng(3).integers(0, 4, 200)
    walked = ShipStratifiedSampler(counts, 6, 0.1, 0.35, seed=5)
    epochs = [list(walked) for _ in range(6)]
    fresh = ShipStratifiedSampler(counts, 6, 0.1, 0.35, seed=5)
    assert fresh.batch(5, 3) == epochs[5][3] and fresh.batch(2, 0) == epochs[2][0]
    fresh.set_epoch(4)
    assert list(fresh) == epochs[4] and list(fresh) == epochs[5] and fresh.epoch == 6
    assert len({str(sorted(sum(e, []))) for e in epochs}) > 1 and epochs[0] != epochs[1]
    assert list(ShipStratifiedSampler(counts, 6, 0.1, 0.35, seed=6)) != epochs[0]


def test_places_inside_a_batch_tell_nothing_of_the_stratum():
    """Shuffled inside: over many batches each place sees each stratum at its share (the slack is five standard errors)."""
    counts = np.repeat([0, 1, 2], [400, 400, 400])
    sampler = ShipStratifiedSampler(counts, 8, 0.25, 0.25, batches_per_epoch=2000)
    place = np.minimum(counts, 2)[np.array(list(sampler))]
    for k, share in enumerate((0.25, 0.5, 0.25)):
        assert np.abs((place == k).mean(0) - share).max() < 5 * (share * (1 - share) / 2000) ** 0.5


def test_resume_at_the_next_batch_through_json():
    counts = np.random.default_rng(0).integers(0, 3, 90)
    sampler = ShipStratifiedSampler(counts, 7, seed=2)
    full = [list(ShipStratifiedSampler(counts, 7, seed=2))]
    for images in sampler:
        if sampler.position == 5: break
    assert (sampler.epoch, sampler.position) == (0, 5)
    state = json.loads(json.dumps(sampler.state_dict()))
    other = ShipStratifiedSampler(counts, 7, seed=2)
    other.load_state_dict(state)
    assert list(other) == full[0][5:] and (other.epoch, other.position) == (1, 0)
    assert list(sampler) == full[0][5:]                                    # the loop broken off goes on, too
    sampler.load_state_dict(sampler.state_dict(epoch=0, position=len(sampler)))
    assert (sampler.epoch, sampler.position) == (1, 0)                     # saved at the very end: the next epoch, not an empty one
    with pytest.raises(ValueError, match="strata_crc32"): ShipStratifiedSampler(counts[::-1].copy(), 7, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 3, saved 2"): ShipStratifiedSampler(counts, 7, seed=3).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_loader_with_prefetch(workers):
    counts = np.repeat([0, 1, 2], [50, 30, 20])
    sampler = ShipStratifiedSampler(counts, 5, 0.2, 0.4, seed=1)
    loader = DataLoader(list(range(100)), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(sampler)
    epochs = [[b.tolist() for b in loader] for _ in range(2)]
    assert epochs == [[sampler.batch(e, b) for b in range(len(sampler))] for e in range(2)]
    sampler.seek(3)
    for trained, b in enumerate(loader, 1):
        if trained == 2: break
    state = sampler.state_dict(3, trained)                                 # workers may have taken more than was trained
    assert sampler.position >= 2 or sampler.epoch > 3
    sampler.load_state_dict(state)
    assert [b.tolist() for b in loader] == [sampler.batch(3, b) for b in range(2, len(sampler))]


def test_fabric_leaves_the_place_alone():
    fabric_module = pytest.importorskip("lightning.fabric")
    sampler = ShipStratifiedSampler(np.repeat([0, 1, 2], 20), 6, seed=1)
    loader = fabric_module.Fabric(accelerator="cpu", devices=1).setup_dataloaders(DataLoader(list(range(60)), batch_sampler=sampler),
                                                                                 use_distributed_sampler=False)
    sampler.seek(7, 3)
    assert [b.tolist() for b in loader] == [sampler.batch(7, b) for b in range(3, len(sampler))]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_each_whole_batch(world):
    counts = np.random.default_rng(1).integers(0, 3, 300)
    whole = ShipStratifiedSampler(counts, 12, 0.25, 0.3)
    shards = [ShipStratifiedSampler(counts, 12 // world, 0.25, 0.3, rank=r, world_size=world) for r in range(world)]
    assert {len(s) for s in shards} == {len(whole)}
    for parts, images in zip(zip(*shards), whole):
        assert [len(p) for p in parts] == [12 // world] * world
        assert sorted(sum(parts, [])) == sorted(images) and parts[0] == images[::world]
    shards[0].load_state_dict(whole.state_dict())                          # resuming on another number of processes


def brute_force(counts, sampler, epochs):
    batches = [b for e in range(epochs) for b in (sampler.batch(e, i) for i in range(len(sampler)))]
    strata = np.minimum(counts, 2)
    shown = np.zeros((epochs + 1, len(counts)), int)
    for e in range(epochs): shown[e + 1] = shown[e] + np.bincount(np.concatenate(batches[e * len(sampler):(e + 1) * len(sampler)]), minlength=len(counts))
    return np.array([np.bincount(strata[b], minlength=3) for b in batches]), shown, strata


@pytest.mark.parametrize("zero,multiple,batch,length", [(None, None, 10, None), (0.15, None, 16, None), (0, 0.3629, 16, None), (0.5, 0.5, 7, 20),
                                                       (0.001, 0.05, 4, 1), (1, None, 9, 13), (0.25, 0.5, 8, None)])
def test_simulation_agrees_with_drawing(zero, multiple, batch, length):
    counts = np.random.default_rng(8).permutation(np.repeat([0, 1, 2, 3, 9], [97, 60, 20, 11, 3]))
    epochs = 9
    table = simulate(counts, batch, zero, multiple, epochs=epochs, batches_per_epoch=length)
    sampler = ShipStratifiedSampler(counts, batch, zero, multiple, batches_per_epoch=length)
    per_batch, shown, strata = brute_force(counts, sampler, epochs)
    curve = coverage(sampler, epochs)
    assert (table["batches_per_epoch"] == len(sampler)).all() and len(per_batch) == epochs * len(sampler)
    for k, name in enumerate(STRATA):
        row, mine = table.loc[name], shown[:, strata == k]
        assert row["images"] == (strata == k).sum() and row["share_delivered"] == pytest.approx(per_batch[:, k].sum() / per_batch.sum(), abs=1e-12)
        assert (row["batch_min"], row["batch_max"]) == (per_batch[:, k].min(), per_batch[:, k].max())
        assert (row["shown_min"], row["shown_max"]) == (mine[-1].min(), mine[-1].max())
        assert row["coverage"] == pytest.approx((mine[-1] > 0).mean())
        assert curve[name].to_numpy() == pytest.approx((mine > 0).mean(1))
        full = np.flatnonzero((mine > 0).all(1))
        if len(full): assert row["epochs_to_coverage"] == full[0]
        else: assert pd.isna(row["epochs_to_coverage"]) or row["epochs_to_coverage"] > epochs
    assert table.loc["all", "coverage"] == pytest.approx((shown[-1] > 0).mean())
    assert table.loc["all", "images"] == len(counts) and table.loc["all", "share_delivered"] == pytest.approx(1)


def test_epochs_to_coverage_is_the_first_epoch():
    counts = np.repeat([0, 1, 2], [7, 31, 5])
    for share in (0.01, 0.037, 0.1, 0.333):
        sampler = ShipStratifiedSampler(counts, 3, share, 0.2, batches_per_epoch=2)
        e = int(simulate(counts, 3, share, 0.2, epochs=1, batches_per_epoch=2).loc["zero", "epochs_to_coverage"])
        assert sampler.drawn(e)[0] >= 7 > sampler.drawn(e - 1)[0]


def test_expected_ships_is_the_mean_over_seeds():
    counts = np.array([0, 0, 0, 1, 1, 1, 1, 2, 5, 9])
    expected = simulate(counts, 4, 0.25, 0.3, epochs=1, batches_per_epoch=3).loc["all", "ships_per_batch"]
    means = [np.mean([counts[b].sum() for b in ShipStratifiedSampler(counts, 4, 0.25, 0.3, seed=s, batches_per_epoch=3)]) for s in range(1500)]
    assert abs(np.mean(means) - expected) < 4 * np.std(means) / 1500 ** 0.5


def test_numbers_of_the_write_up():
    counts = np.repeat([1, 2], [21445, 12217])
    x = balanced_multiple_ratio(counts)
    assert x == Fraction(12217, 33662) and f"{float(x):.4f}" == "0.3629"
    table = simulate(counts, 16, 0, 0.3629, epochs=1)
    assert (table["batches_per_epoch"] == 2103).all() and table.loc["all", "shown_max"] == 1
    used = table["batch_mean"] * 2103
    assert (used["single"], used["multiple"]) == (pytest.approx(21437, abs=1), pytest.approx(12211, abs=1))
    # a larger share repeats the several-ship pool within the single-ship pool's epoch, a smaller one shortens the use of it
    assert len(ShipStratifiedSampler(counts, 16, 0, 0.5)) == 12217 // 8
    assert len(ShipStratifiedSampler(np.repeat([0, 1, 2], [150000, 21445, 12217]), 16, 0.25)) == 33662 // 12


@pytest.mark.parametrize("zero,multiple,message", [(-0.1, None, "from 0 to 1"), (1.01, None, "from 0 to 1"), (float("nan"), None, "nan"),
    (float("inf"), None, "inf"), (0.6, 0.5, "sum to 1.1"), (True, None, "True"), ("0.2", None, "'0.2'"), (None, -1, "multiple_ships_ratio_per_batch")])
def test_impossible_ratios(zero, multiple, message):
    with pytest.raises(ValueError, match=message): ShipStratifiedSampler([0, 0, 1, 2], 4, zero, multiple)


@pytest.mark.parametrize("counts,zero,multiple,message", [([1, 2], 0.5, None, "zero_ships_ratio_per_batch is 0.5, but no image"),
    ([0, 1], None, 0.5, "multiple_ships_ratio_per_batch is 0.5, but no image"), ([0, 2], 0.5, 0.2, "0.3 is left for single"),
    ([0, 0], 0.5, None, "left for single or multiple"), ([2, 2], None, 0.5, "left for zero or single"), ([], None, None, "n >= 1"),
    ([[0, 1]], None, None, "shape"), ([0, 1.5], None, None, r"counts\[1\] is 1.5"), ([0, -2], None, None, "-2"), (["1"], None, None, "whole numbers")])
def test_impossible_data(counts, zero, multiple, message):
    with pytest.raises(ValueError, match=message): ShipStratifiedSampler(counts, 4, zero, multiple)


def test_edges_that_are_possible():
    assert list(ShipStratifiedSampler([0], 1)) == [[0]]
    assert sorted(ShipStratifiedSampler([2, 2], 5).batch(0, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])     # fewer images than a batch
    only_ships = ShipStratifiedSampler([0, 1, 1, 2], 3, 0)
    assert only_ships.shares == (0, Fraction(2, 3), Fraction(1, 3)) and sorted(only_ships.batch(0, 0)) == [1, 2, 3]
    assert ShipStratifiedSampler([0, 0, 1], 2, 0, 0).shares == (0, 1, 0)
    assert ShipStratifiedSampler(pd.Series([0.0, 1.0, 2.0]), np.int64(3), np.float32(0.3), Fraction(1, 3)).shares[0] == Fraction(3, 10)
    assert image_strata(np.array([0, 1, 65535], np.uint16)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="0 to 0, not 1"): ShipStratifiedSampler([0, 1], 2).batch(0, 1)


@pytest.mark.skipif(not os.environ.get("SHIPNB_REAL_DATA"), reason="SHIPNB_REAL_DATA is not set: the real label counts are not at hand")
def test_real_label_counts():
    table = pd.read_csv(pathlib.Path(os.environ["SHIPNB_REAL_DATA"])/"airbus"/"labels"/"train_image_counts.csv.gz")
    counts = table[next(c for c in table.columns if c.lower() in ("ships", "count", "n_ships"))].to_numpy()
    result = simulate(counts, 16, 0.25, 0.3, epochs=3)
    assert result.loc["all", "images"] == 192_556 and result.loc["zero", "images"] == 150_000
    assert result["share_delivered"].iloc[:3].to_numpy() == pytest.approx([0.25, 0.45, 0.3], abs=1e-4)
