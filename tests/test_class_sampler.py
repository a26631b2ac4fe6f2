"""Answers to imbalance: torch's own draws, exact shares, what is shown counted twice, and the document's list."""
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from shipnb.class_sampler import (STRATEGIES, FileOrder, ReplacementSampler, check_labels, class_sampler, class_weights, expected_distinct, hardest_negatives, loss_weights, random_negatives,
                                  sample_weights, shown_table)

LABELS = np.repeat([0, 1], [83, 17])


def batches(sampler, epochs=2): return [sampler.batch(e, b) for e in range(epochs) for b in range(len(sampler))]


def test_weights_are_samples_over_count():
    counted = Counter(LABELS.tolist())
    assert class_weights(LABELS) == {k: len(LABELS) / n for k, n in counted.items()} == dict(enumerate(loss_weights(LABELS)))
    assert sample_weights(LABELS).tolist() == [len(LABELS) / counted[o] for o in LABELS.tolist()]


def test_a_weight_in_the_loss_is_a_sample_s_share_of_it():
    """The weighted mean of torch's loss gives each class the same say."""
    z = torch.randn(len(LABELS), 2, generator=torch.Generator().manual_seed(0))
    each = torch.nn.functional.cross_entropy(z, torch.from_numpy(LABELS), reduction="none")
    whole = torch.nn.functional.cross_entropy(z, torch.from_numpy(LABELS), torch.tensor(loss_weights(LABELS), dtype=torch.float32))
    assert torch.isclose(whole, (each[LABELS == 0].mean() + each[LABELS == 1].mean()) / 2)


def test_draws_are_torch_s_own():
    sampler = ReplacementSampler(LABELS, 10, seed=4)
    for epoch in (0, 3):
        seed = int(np.random.SeedSequence([4, epoch]).generate_state(1)[0])
        theirs = list(WeightedRandomSampler(sample_weights(LABELS).tolist(), 100, replacement=True, generator=torch.Generator().manual_seed(seed)))
        assert sum([sampler.batch(epoch, b) for b in range(10)], []) == theirs


def test_both_classes_come_alike_in_the_mean_and_repeat():
    drawn = np.concatenate(batches(ReplacementSampler(LABELS, 50, seed=1, batches_per_epoch=100), 2))
    assert abs(LABELS[drawn].mean() - 0.5) < 0.02
    assert max(Counter(drawn.tolist()).values()) > 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_epoch_goes_on_and_processes_share_each_batch(strategy):
    make = lambda **kw: class_sampler(strategy, LABELS, 12, seed=7)[0]
    one, again = make(), make()
    first = list(one) + list(one)
    again.seek(1, 3)
    assert list(again) == first[len(one) + 3:]
    again.load_state_dict(dict(make().state_dict(), epoch=0, position=2))
    assert list(again) == first[2:len(one)]
    with pytest.raises(ValueError, match="another sampler"): class_sampler(strategy, LABELS, 12 if strategy != "in order" else 13, seed=8)[0].load_state_dict(one.state_dict())


@pytest.mark.parametrize("kind", [ReplacementSampler, FileOrder])
def test_the_processes_parts_make_the_batch(kind):
    whole, parts = kind(LABELS, 12, seed=3), [kind(LABELS, 4, seed=3, rank=r, world_size=3) for r in range(3)]
    for epoch in range(2):
        for b in range(len(whole)): assert sorted(whole.batch(epoch, b)) == sorted(sum([o.batch(epoch, b) for o in parts], []))
    with pytest.raises(ValueError, match="rank must be below"): kind(LABELS, 4, rank=3, world_size=3)


def test_all_but_in_order_have_the_same_number_of_batches():
    assert {o: len(class_sampler(o, LABELS, 12)[0]) for o in STRATEGIES} == dict(natural=8, weights=8, replacement=8, balanced=8) | {"in order": 9}
    assert [class_sampler(o, LABELS, 12)[1] for o in STRATEGIES] == [None, tuple(loss_weights(LABELS)), None, None, None]


def test_the_exact_sampler_shows_all_of_a_class_before_any_twice():
    drawn = batches(class_sampler("balanced", LABELS, 10, seed=2)[0], 3)
    assert [int(LABELS[o].sum()) for o in drawn] == [5] * 30
    for stop in range(1, 31):
        for kind in (0, 1):
            times = np.bincount(np.concatenate(drawn[:stop]), minlength=len(LABELS))[LABELS == kind]
            assert times.max() - times.min() <= 1


def test_file_order_gives_every_sample_once_and_a_last_batch_of_one():
    sampler = FileOrder(LABELS[:25], 8)
    assert [len(o) for o in sampler] == [8, 8, 8, 1] and sum(batches(sampler, 1), []) == list(range(25)) == sum(batches(sampler, 2)[4:], [])


@pytest.mark.parametrize("strategy", ["natural", "replacement", "balanced"])
def test_what_is_shown_is_counted_right(strategy):
    sampler = class_sampler(strategy, LABELS, 9, seed=1)[0]
    table, drawn = shown_table(sampler, LABELS, 3), batches(sampler, 3)
    times = Counter(sum(drawn, []))
    for kind in (0, 1):
        own = {k: n for k, n in times.items() if LABELS[k] == kind}
        row = table.loc[str(kind)]
        inside = [sum(LABELS[o] == kind for o in b) for b in drawn]
        assert (row.samples, row.shown, row.most, row.batch_least, row.batch_most) == ((LABELS == kind).sum(), sum(own.values()), max(own.values()), min(inside), max(inside))
        assert row.distinct == len(own) / (LABELS == kind).sum()
    assert table.shown["all"] == table.shown["0"] + table.shown["1"] == 3 * len(sampler) * 9


def test_the_expected_share_of_distinct_samples_is_what_is_drawn():
    found = np.mean([shown_table(ReplacementSampler(LABELS, 20, seed=s), LABELS).distinct[["0", "1"]] for s in range(200)], 0)
    expected = expected_distinct(LABELS, 100)
    assert np.allclose(found, [expected[0], expected[1]], atol=0.01) and expected[0] < 0.5 < 0.9 < expected[1]


def as_the_document_lists(names, most):
    """Positives, then the negatives by falling IoU, of (name, IoU, label)."""
    positive, negative = [], []
    for name, iou, label in names:
        if label == 1: positive.append(name)
        else: negative.append((name, iou))
    return positive + [name for name, _ in sorted(negative, key=lambda o: o[1], reverse=True)[:most]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [0, 7, 800])
def test_hardest_negatives_are_the_document_s_list(seed, most):
    rng = np.random.default_rng(seed)
    ious = np.round(rng.random(60), 1)
    labels = (ious > 0.5).astype(int)
    assert hardest_negatives(labels, ious, most).tolist() == as_the_document_lists(list(zip(range(60), ious, labels)), most)


def test_random_negatives_keep_all_positives_and_no_negative_twice():
    found = random_negatives(LABELS, 30, seed=1)
    assert found[:17].tolist() == list(range(83, 100)) and len(set(found[17:].tolist())) == 30 and (LABELS[found[17:]] == 0).all()


@pytest.mark.parametrize("labels", [[], [0.5, 1], [-1, 0], [[0, 1]], ["a"]])
def test_labels_are_classes(labels):
    with pytest.raises(ValueError, match="whole numbers >= 0"): check_labels(labels)
    with pytest.raises(ValueError, match="whole numbers >= 0"): ReplacementSampler(labels, 2)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, not 0"): ReplacementSampler(LABELS, 0)
    with pytest.raises(ValueError, match="class 1 has no sample"): loss_weights([0, 2])
    with pytest.raises(ValueError, match="strategy must be one of"): class_sampler("undersampling", LABELS, 2)
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"): hardest_negatives([0], [1.5], 1)
