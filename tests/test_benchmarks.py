"""The plain ways of nbs/studies/benchmarks give what the package gives. Nothing here looks at a clock."""
import json
import linecache
import os
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from shipnb import dataset, masks, metrics, models, optim, tasks, thresholds, training
from shipnb.catalog import read_airbus

NOTEBOOK = Path(__file__).parents[1]/"nbs"/"studies"/"benchmarks.ipynb"
MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.integers(0, 1))


def definitions():
    """The names of the notebook's cells before its parameters, and what its worker processes import."""
    names = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []): break
        if cell["cell_type"] != "code": continue
        name, lines = f"<cell {cell['id']}>", "".join(cell["source"]).splitlines(keepends=True)
        linecache.cache[name] = len(cell["source"]), None, lines, name      # the workers' programs are made of these sources
        exec(compile("".join(lines), name, "exec"), names)
    exec(names["IMPORTS"], names)
    return names


plain = definitions()


@st.composite
def ships(draw, apart=False):
    """Codes of one to three objects in one image, which overlap unless `apart`, and the image's shape."""
    labels = draw(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 3)))
    codes = [masks.rle_encode(labels == k) for k in (1, 2, 3)]
    if not apart: codes.append(masks.rle_encode(labels > draw(st.integers(0, 3))))
    return [o for o in codes if o], labels.shape


@given(MASKS)
def test_codes(mask):
    code = plain["plain_encode"](mask)
    assert code == masks.rle_encode(mask)
    assert (plain["plain_decode"](code, mask.shape) == masks.rle_decode(code, mask.shape)).all() and (plain["plain_decode"](code, mask.shape) == mask).all()


@given(MASKS)
def test_instance_codes(mask):
    labels, _ = masks.label_instances(mask)
    assert plain["plain_codes"](labels) == masks.encode_instances(labels)
    published = plain["plain_codes"](plain["skimage"].measure.label(mask))
    theirs, n = ndimage.label(mask, np.ones((3, 3)))
    assert sorted(published) == sorted(masks.encode_instances(labels)) == sorted(masks.rle_encode(theirs == k + 1) for k in range(n))


@given(ships(), st.tuples(st.integers(1, 24), st.integers(1, 24)))
@settings(deadline=None)
def test_the_exact_mask_is_the_package_s_truth(image, size):
    codes, shape = image
    assert (plain["exact_mask"](codes, shape, size) == masks.render_mask(codes, shape, size)).all()


@given(ships(apart=True))
def test_plain_masks_are_the_union_looked_at_from_the_top_left(image):
    codes, (height, width) = image
    codes = [masks.rle_encode(np.kron(masks.rle_decode(o, (height, width)), np.ones((3, 3), np.uint8))) for o in codes]   # a third of it is the original
    union = masks.decode_labels(codes, (3 * height, 3 * width)) > 0
    for name in ("plain_mask", "plain_joined_mask"):
        assert (plain[name](codes, union.shape, (height, width)) == union[::3, ::3]).all()
    assert (masks.render_mask(codes, union.shape, (height, width)) == union[::3, ::3]).all()


def test_nearest_neighbour_is_another_truth():
    thin = np.zeros((12, 12), np.uint8)
    thin[1:11, 4] = 1
    codes = [masks.rle_encode(thin)]
    assert plain["plain_mask"](codes, (12, 12), (4, 4)).sum() == 0 and masks.render_mask(codes, (12, 12), (4, 4)).sum() == 1


LOGITS = arrays(np.float32, (3, 5, 7), elements=st.one_of(st.floats(-20, 20, width=32), st.sampled_from(thresholds.EDGES.astype(np.float32).tolist())))
CUTS = st.lists(st.sampled_from(thresholds.EDGES.tolist()), min_size=1, max_size=6)


@given(LOGITS, arrays(np.int32, (3, 5, 7), elements=st.integers(0, 3)), CUTS, st.sampled_from([-8.0, 16.0]))
@settings(deadline=None)
def test_counts_at_thresholds(logits, labels, cuts, floor):
    truths, cuts = (labels > 0).astype(np.uint8), np.array(cuts, np.float32)
    counts = plain["plain_counts"](logits, truths, cuts)
    assert (plain["careful_counts"](logits, truths, cuts) == counts).all()
    evidence = plain["make_evidence"](logits, labels, floor)
    assert (plain["evidence_counts"](evidence, cuts) == counts).all()
    kept = logits[0] >= cuts[0]
    overlap, area = counts[0, 0]
    true_area = truths[0].sum()
    assert metrics.dice(kept, truths[0]) == pytest.approx(2 * overlap / (area + true_area) if area + true_area else 1)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Four images of 96 x 96 pixels in the Airbus layout, three with ships."""
    root, rng = tmp_path_factory.mktemp("airbus"), np.random.default_rng(0)
    (root/"train_v2").mkdir()
    rows = [("d.jpg", "")]
    for name in "abcd": cv2.imwrite(str(root/"train_v2"/f"{name}.jpg"), cv2.resize(rng.integers(0, 255, (12, 12, 3), np.uint8), (96, 96)))
    for name, y in (("a", 10), ("b", 40), ("b", 70), ("c", 60)):
        ship = np.zeros((96, 96), np.uint8)
        ship[y:y + 6, 20:50] = 1
        rows.append((f"{name}.jpg", masks.rle_encode(ship)))
    pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"]).to_csv(root/"train_ship_segmentations_v2.csv", index=False)
    return read_airbus(root)


@pytest.fixture(scope="module")
def cache(catalog, tmp_path_factory):
    return dataset.DecodedCache.open(catalog, (32, 32), tmp_path_factory.mktemp("cache")/"cache")


def test_cached_images_are_the_decoded_ones(catalog, cache):
    images = plain["cached_images"](cache, [2, 0])
    assert images.dtype == torch.uint8
    assert torch.equal(images, torch.stack([torch.from_numpy(dataset.shrink(catalog.read_image(i), (32, 32))) for i in (2, 0)]))


def test_plain_images_are_decoded_in_rgb(catalog):
    images = plain["plain_images"]([str(catalog.path(i)) for i in (1, 3)], (96, 96))
    assert torch.equal(images, torch.stack([torch.from_numpy(catalog.read_image(i)) for i in (1, 3)]))


def test_the_plain_loader_gives_the_same_normalised_pixels(catalog):
    """albumentations' Resize and Normalize, item by item, against `to_input` of the same resized pixels."""
    assert albumentations is plain["A"]
    (x, y), = plain["plain_loader"](catalog, (32, 32), [[0, 1, 2, 3]], turned=False)
    paths = [str(catalog.path(i)) for i in range(4)]
    assert torch.allclose(x, dataset.to_input(plain["plain_images"](paths, (32, 32))), atol=1e-4)
    assert (y[:, 0].numpy() == np.stack([plain["plain_joined_mask"](catalog.rles(i), (96, 96), (32, 32)) for i in range(4)])).all()
    assert [int(o.sum() > 0) for o in y] == [1, 1, 1, 0]


def test_the_plain_loader_turns_image_and_mask_together_as_ours_does(catalog, cache):
    """Each of the plain way's items is one of the eight symmetries of the untouched one; several of them turn up."""
    (x, y), = plain["plain_loader"](catalog, (32, 32), [[0, 1, 2, 3]], turned=False)
    codes = set()
    for _ in range(6):
        for k, (img, msk) in enumerate(zip(*next(iter(plain["plain_loader"](catalog, (32, 32), [[0, 1, 2, 3]]))))):
            fits = [c for c in range(8) if (dataset.turn(x[k].permute(1, 2, 0).numpy(), c) == img.permute(1, 2, 0).numpy()).all()]
            assert len(fits) == 1 and (dataset.turn(y[k, 0].numpy(), fits[0]) == msk[0].numpy()).all()
            codes |= set(fits)
    assert len(codes) > 4
    torch.manual_seed(0)
    ours = plain["prepare"]("fast", catalog, cache.folder, (32, 32), [[0, 1, 2, 3]], "cpu")[1]
    assert ours.dataset.augment == "d4" and list(ours.batch_sampler) == [[0, 1, 2, 3]]


def test_both_ways_train_and_evaluate_the_same_network(catalog, cache):
    """The first losses and evaluations from the same weights on the same batch: float32 against bfloat16."""
    losses, scores = {}, {}
    for way in ("plain", "fast"):
        torch.manual_seed(0)
        step, loader, first, evaluate = plain["prepare"](way, catalog, cache.folder, (32, 32), [[0, 1, 2, 3]] * 2, "cpu")
        scores[way] = evaluate()
        losses[way] = [float(step(first)), float(step(first))]
        assert len(list(loader)) == 2
    assert losses["plain"] == pytest.approx(losses["fast"], rel=0.02)
    assert scores["plain"][0] == pytest.approx(scores["fast"][0], rel=0.02) and scores["plain"][1] == pytest.approx(scores["fast"][1], abs=0.02)
    assert losses["plain"][1] < losses["plain"][0] and losses["fast"][1] < losses["fast"][0]


def test_the_fast_step_is_what_training_does(catalog, cache):
    """One step of the benchmark and an epoch of one batch leave the same weights, to the last bit."""
    items, states = dataset.SegmentationDataset(catalog, (32, 32), cache), []
    sampler = lambda: training.ShipStratifiedSampler(catalog.counts, 4, seed=0)
    for way in ("benchmark", "epoch"):
        torch.manual_seed(0)
        model = models.build_unet("resnet18")
        if way == "benchmark": plain["fast_training"](model, "cpu")[0](items.__getitems__(list(next(iter(sampler())))))
        else:
            learner = training.Learner(model, tasks.segmentation_task("bce"), optim.build_optimizer("adam", model, 1e-4), precision="bf16-mixed", device="cpu")
            assert len(list(learner.epochs(1, dataset.make_loader(items, sampler())))) == 1
        states.append(model.state_dict())
    assert all(torch.equal(states[0][o], states[1][o]) for o in states[0])


def test_calls_alternate_and_ratios_are_taken_pair_by_pair():
    calls = []
    seconds = plain["alternate"](lambda: calls.append("plain"), lambda: calls.append("ours"), repetitions=5)
    assert calls == ["plain", "ours"] * 6 and seconds.shape == (5, 2, 2) and (seconds >= 0).all()
    made = np.array([[[4, 8], [9, 9], [2, 1]], [[9, 8], [9, 9], [3, 1]], [[2, 2], [9, 9], [2, 1]]], float)
    row = plain["compare"](made, 10, target=2)
    assert (row["ratio"], row["lowest"], row["highest"], row["ratio_cpu"]) == (2, 1, 3, 8)
    assert (row["plain_ms"], row["ours_ms"], row["n"], row["repetitions"], row["target"]) == (400, 200, 10, 3, 2)
    assert plain["compare"](made, 10, ways=(1, 2))["ratio"] == 4.5


def test_the_loop_over_thresholds_and_sizes_gives_the_surface():
    rng = np.random.default_rng(0)
    labels = np.zeros((3, 32, 32), np.int32)
    labels[0, 4:9, 3:20], labels[1, 20:24, 8:12] = 1, 1
    logits = np.stack([plain["glow"](o, rng) if "glow" in plain else 8.0 * (o > 0) - 4 + rng.normal(0, 2, o.shape) for o in labels]).astype(np.float32)
    whole = thresholds.surface(plain["make_evidence"](logits, labels, -8.0), "every")
    edges, sizes = np.float32([-7, -2.5, 0, 3]), [0, 1, 3, 10, 5000]
    for once in (False, True):
        scores = plain["loop_scores"](logits, labels, edges, sizes, once)
        for i, edge in enumerate(edges):
            for j, size in enumerate(sizes):
                cell = np.searchsorted(whole.logits, edge), min(np.searchsorted(whole.min_areas, size), len(whole.min_areas) - 1)
                assert scores[i, j] == pytest.approx([whole.dice[cell], whole.f2[cell]], abs=1e-12)


def test_workers_answer_every_question(catalog, cache):
    """Two processes, both ways, every question of the notebook."""
    seconds, first = plain["compare_training"](str(catalog.root.parent), str(cache.folder), (32, 32), 2, 3, 0, "cpu", repetitions=1, questions=("next", "evaluate", "epoch"))
    assert {line: o.shape for line, o in seconds.items()} == dict.fromkeys(("next", "evaluate", "epoch"), (2, 1, 2, 2)) and set(first) == {"evaluate", "first"}
    assert all((o[1, ..., 0] >= o[0, ..., 0]).all() and (o > 0).all() for o in seconds.values()), "data and step take longer than the step"


def test_bytes_and_operations_of_a_step_are_counted():
    x, weight = torch.zeros(4, 8), torch.zeros(8, 2)
    with plain["Traffic"]() as traffic: (x @ weight).t()
    assert traffic.bytes == 4 * (32 + 16 + 8)
    small, large = (plain["bounds"](2, side, "cpu") for side in (32, 64))      # one image of 32 leaves batch norm a single value
    assert large["flops"] == pytest.approx(4 * small["flops"], rel=0.01) and set(small) == {"flops", "bytes"}
    assert plain["peak_rate"]("cpu", 64, torch.float32, 2) > 0 and plain["peak_bandwidth"]("cpu", 2**16, 2) > 0
