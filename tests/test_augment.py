"""Augmentation: quiet presets that do what they say, image and mask together, repeatable and independent draws, and ships that get smaller but never vanish."""
import os
import pickle
import random
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from shipnb.augment import A, PRESETS, SOURCE, Pipeline, RandomDownsample, preset, turn_boxes
from shipnb.catalog import read_airbus
from shipnb.dataset import SegmentationDataset, turn
from shipnb.fleet import sample
from shipnb.training import Recipe

GEOMETRIC = ["flips", "d4", "shift_scale_rotate", "elastic", "optical_distortion"]
RADIOMETRIC = ["gaussian_blur", "gauss_noise", "color_jitter", "cutout", "none"]
rows, columns = np.mgrid[:256, :256]
COORDINATES = np.dstack([rows, columns, np.full_like(rows, 200)]).astype(np.uint8)


def certain(name, seed):
    """The preset with every one of its transforms sure to act."""
    t = preset(name, seed=seed)
    for o in t.transforms: o.p = 1
    return t


@pytest.mark.parametrize("name", PRESETS)
def test_building_and_calling_is_quiet(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = preset(name, seed=0)(image=COORDINATES, mask=np.zeros((256, 256), np.uint8))
    assert out["image"].shape == (256, 256, 3) and out["image"].dtype == np.uint8 and out["mask"].shape == (256, 256)


def test_importing_asks_no_server_and_warns_of_nothing():
    code = ("import socket\n"
            "def refuse(*a, **k): raise SystemExit(f'network: {a}')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "import shipnb.augment as a\n"
            "[a.preset(name) for name in a.PRESETS]\n"
            "import os; assert os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n")
    env = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"} | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_old_arguments_are_still_a_trap():
    """Why the list had to be translated: a library that now raised, or understood them, would make the notebook's text wrong."""
    for make, old in ((A.GaussNoise, dict(var_limit=(10, 20))), (A.ElasticTransform, dict(alpha_affine=3.6)), (A.OpticalDistortion, dict(shift_limit=0.5)),
                      (A.CoarseDropout, dict(max_holes=1, max_height=16, max_width=16))):
        with pytest.warns(UserWarning, match="not valid for transform"): make(**old)


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("seed", range(4))
def test_mask_moves_with_the_image(name, seed):
    """The image holds its own coordinates, so every pixel says where it came from; the mask must be what was there (1.5 pixels of slack at its edge)."""
    def depth(y, x): return 55 - np.hypot(y - 120, (x - 140) / 1.5)          # > 0 inside an ellipse, by about so many pixels
    out = certain(name, seed)(image=COORDINATES, mask=(depth(rows, columns) > 0).astype(np.uint8))
    inside = depth(out["image"][..., 0].astype(float), out["image"][..., 1].astype(float))
    sure = np.abs(inside) > 1.5
    assert sure.mean() > 0.9 and (out["mask"][sure] == (inside[sure] > 0)).all()
    assert out["mask"].dtype == np.uint8 and set(np.unique(out["mask"])) == {0, 1}


@pytest.mark.parametrize("name", RADIOMETRIC)
def test_the_others_leave_the_mask(name):
    mask = (np.random.default_rng(0).random((256, 256)) > 0.7).astype(np.uint8)
    out = certain(name, 1)(image=COORDINATES, mask=mask)
    assert (out["mask"] == mask).all() and ((out["image"] != COORDINATES).any() or name == "none")


def test_d4_gives_all_eight_ways_and_flips_four():
    board = np.arange(4, dtype=np.uint8).reshape(2, 2)
    expected = {np.rot90(flip, k).tobytes() for flip in (board, board.T) for k in range(4)}
    for name, count in (("d4", 8), ("flips", 4)):
        t = preset(name, seed=0)
        seen = [t(image=board)["image"].tobytes() for _ in range(800)]
        assert set(seen) <= expected and len(set(seen)) == count
        assert max(seen.count(s) for s in set(seen)) < 1.35 * 800 / count


@pytest.mark.parametrize("name", PRESETS)
def test_seeds_repeat_and_global_states_play_no_part(name):
    t, mask = preset(name, seed=11), (COORDINATES[..., 0] > 99).astype(np.uint8)
    def run():
        return [tuple(v.tobytes() for v in (out["image"], out["mask"])) for out in (t(image=COORDINATES, mask=mask) for _ in range(6))]
    first = run()
    random.seed(1); np.random.seed(1)                                         # noqa: NPY002
    t.set_random_seed(11)
    assert run() == first
    t = preset(name, seed=12)
    assert (run() != first) == (name != "none")
    t = pickle.loads(pickle.dumps(preset(name, seed=11)))
    assert run() == first


def test_transforms_of_one_preset_decide_independently():
    """albumentations' own Compose, seeded per image, fires all transforms of probability 1/2 or none."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    def fired(t):
        table = np.zeros((2, 2), int)
        for seed in range(300):
            t.set_random_seed(seed)
            img = t(image=grey)["image"]
            cut = (img == 0).any()
            table[int((img[img > 0] != 128).any()), int(cut)] += 1
        return table
    makes = [SOURCE["gauss_noise"], SOURCE["cutout"]]
    assert fired(A.Compose([make() for make in makes])).diagonal().sum() == 300
    ours = fired(preset("gauss_noise+cutout"))
    assert ours.min() > 45 and ours.sum() == 300                              # 75 expected in each; 45 is four standard errors away


def test_noise_has_the_asked_variance():
    """Standard deviation of single images between sqrt(10) and sqrt(20), up to 0.04 for sampling, and over that whole range."""
    grey = np.full((128, 128, 3), 128, np.uint8)
    t = certain("gauss_noise", 0)
    noise = np.array([t(image=grey)["image"].astype(float) - 128 for _ in range(300)])
    std = noise.std((1, 2, 3))
    assert 10 ** 0.5 - 0.04 < std.min() < 3.25 and 4.38 < std.max() < 20 ** 0.5 + 0.04
    assert abs(noise.mean()) < 0.02


def test_shift_scale_rotate_parameters():
    t = certain("shift_scale_rotate", 0)
    matrices = []
    for _ in range(400):
        params = t.transforms[0].get_params_dependent_on_data({"shape": (256, 256, 3)}, {})
        matrices.append(params["matrix"])
    m = np.array(matrices)[:, :2]
    scale = np.sqrt(np.abs(np.linalg.det(m[:, :, :2])))
    turn = np.degrees(np.arctan2(m[:, 1, 0], m[:, 0, 0]))
    assert np.allclose(m[:, 0, 0], m[:, 1, 1]) and np.allclose(m[:, 0, 1], -m[:, 1, 0])          # same scale on both axes, no shear
    assert 0.8 <= scale.min() < 0.82 and 1.18 < scale.max() <= 1.2 and -45 <= turn.min() < -43 and 43 < turn.max() <= 45
    shift = m @ [127.5, 127.5, 1] - 127.5
    assert 24 < np.abs(shift).max() <= 25.6 and abs(np.corrcoef(shift.T)[0, 1]) < 0.2


def test_elastic_is_as_strong_as_version_1():
    """The old definition, simulated, against what the new one does: entries of the affinity, and displacement by the waves."""
    rng = np.random.default_rng(0)
    corners = 128.0 + 85 * np.array([[1, 1], [1, -1], [-1, -1]])
    old = np.array([cv2.getAffineTransform(corners.astype(np.float32), (corners + rng.uniform(-3.6, 3.6, (3, 2))).astype(np.float32)) for _ in range(4000)])
    slight, waves = preset("elastic", seed=0).transforms[0].transforms
    new = np.array([slight.get_params_dependent_on_data({"shape": (256, 256, 3)}, {})["matrix"][:2] for _ in range(4000)])
    assert np.allclose(new[:, :, :2].std(0), old[:, :, :2].std(0), rtol=0.08)
    centre = [np.std(m @ [128, 128, 1], 0) for m in (new, old)]
    assert np.allclose(*centre, rtol=0.25)                                    # whole pixels in the new one
    old_waves = 120 * ndimage.gaussian_filter(rng.uniform(-1, 1, (256, 256)), 6).std()
    params = waves.get_params_dependent_on_data({"shape": (256, 256, 3)}, {})
    new_waves = (params["map_x"] - columns).std()
    assert new_waves == pytest.approx(old_waves, rel=0.15)


def test_cutout_and_blur_and_jitter_sizes():
    white = np.full((256, 256, 3), 255, np.uint8)
    t = certain("cutout", 0)
    for _ in range(20):
        hole = np.argwhere((t(image=white)["image"] == 0).all(2))
        assert len(hole) == 256 and (hole.max(0) - hole.min(0)).tolist() == [15, 15]
    point = np.zeros((33, 33, 3), np.uint8)
    point[16, 16] = 255
    t = certain("gaussian_blur", 0)
    seen = {tuple(np.ptp(np.argwhere(t(image=point)["image"][..., 0]), axis=0).tolist()) for _ in range(40)}
    assert seen == {(2, 2), (4, 4)}
    t = SOURCE["color_jitter"]()
    assert np.allclose([t.brightness, t.contrast, t.saturation], (0.9, 1.1)) and np.allclose(t.hue, (-0.2, 0.2))


@pytest.mark.parametrize("shape,size", [((256, 256), (128, 96)), ((100, 300), (200, 200)), ((64, 64), (64, 64)), ((30, 20), (64, 64))])
def test_crops_come_in_the_asked_size_and_resample_nothing(shape, size):
    rng = np.random.default_rng(0)
    img = rng.integers(0, 2, shape, np.uint8).repeat(3).reshape(*shape, 3)
    for _ in range(5):
        out = preset("none", size=size, seed=int(rng.integers(99)))(image=img, mask=img[..., 0])
        assert out["image"].shape == (*size, 3) and (out["image"][..., 0] == out["mask"]).all()
    assert len({preset("none", size=(32, 32), seed=s)(image=np.arange(10000, dtype=np.uint8).reshape(100, 100))["image"].tobytes() for s in range(9)}) > 5


@pytest.mark.parametrize("name,size,message", [("mixup", None, "unknown augmentation 'mixup'"), ("flips+", None, "unknown augmentation ''"),
                                              ("flips", (64,), "size must be"), ("flips", (64, 0), "size must be"), ("flips", (64.5, 2), "size must be")])
def test_preset_errors(name, size, message):
    with pytest.raises(ValueError, match=message): preset(name, size)


# RandomDownsample

def coverage_oracle(mask, size):
    """Share of each small pixel that is mask, by counting on the common multiple of both grids."""
    fine = np.kron(mask, np.ones(size, int)).reshape(size[0], mask.shape[0], size[1], mask.shape[1])
    return fine.mean((1, 3))


@given(st.integers(0, 10 ** 6), st.integers(4, 30), st.integers(4, 30), st.floats(1, 5))
@settings(max_examples=60, deadline=None)
def test_downsampled_mask_follows_the_rule(seed, height, width, factor):
    rng = np.random.default_rng(seed)
    mask = (rng.random((height, width)) < rng.choice([0.02, 0.1, 0.4])).astype(np.uint8)
    img = rng.integers(0, 256, (height, width, 3), np.uint8)
    small_img, small = RandomDownsample(p=1, factor=(factor, factor), seed=0)(img, mask)
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    assert small.shape == size == small_img.shape[:2] and small.dtype == np.uint8
    share = coverage_oracle(mask, size)
    expected = share >= 0.5 - 1e-9
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    best = np.zeros(size, int)
    for k in range(1, n + 1):
        mine = coverage_oracle(labels == k, size)
        kept = small.astype(bool) & (mine > 0)
        assert mine[kept].max() == pytest.approx(mine.max())                  # each ship keeps a pixel that covers it best
        best[mine > mine.max() - 1e-9] = 1
    assert (small.astype(bool) >= expected).all() and not (small.astype(bool) & ~expected & (best == 0)).any()


def test_downsampled_image_is_the_area_average():
    img = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    small, _ = RandomDownsample(p=1, factor=(3, 3))(img, np.zeros((60, 90), np.uint8))
    assert np.abs(small - img.reshape(20, 3, 30, 3, 3).mean((1, 3))).max() <= 0.5 + 1e-6


def test_factor_and_probability_are_as_asked():
    t = RandomDownsample(p=0.3, factor=(1.5, 4.0), seed=0)
    img, mask = np.zeros((600, 600, 3), np.uint8), np.zeros((600, 600), np.uint8)
    factors = np.array([600 / len(t(img, mask)[1]) for _ in range(600)])
    acted = factors[factors > 1]
    assert abs(len(acted) / 600 - 0.3) < 0.075
    assert 1.49 < acted.min() < 1.6 and 3.85 < acted.max() < 4.02 and abs(acted.mean() - 2.75) < 0.25


def test_output_pad_is_the_small_picture_mirrored_outwards():
    rng = np.random.default_rng(1)
    mask = np.zeros((80, 64), np.uint8)
    mask[20:40, 30:50] = 1
    img = np.dstack([mask * 200] * 3) + rng.integers(0, 30, (80, 64, 3), np.uint8)
    places = set()
    for seed in range(20):
        t = RandomDownsample(p=1, factor=(2, 2), seed=seed, output="pad")
        out_img, out_mask = t(img, mask)
        assert out_img.shape == img.shape and out_mask.shape == mask.shape
        assert ((out_img.mean(2) > 100) == out_mask.astype(bool)).mean() > 0.98           # ships and their mirror images are where the mask says
        corner = t.params["corner"]
        small_img, small_mask = RandomDownsample(p=1, factor=(2, 2))(img, mask)
        pad = [(corner[0], 40 - corner[0]), (corner[1], 32 - corner[1])]
        assert (out_mask == np.pad(small_mask, pad, mode="reflect")).all() and (out_img == np.pad(small_img, [*pad, (0, 0)], mode="reflect")).all()
        places.add(corner)
    assert len(places) > 10


def test_output_resize_keeps_truth_and_place():
    mask = np.zeros((96, 96), np.uint8)
    mask[30:50, 40:60] = 1
    img = np.dstack([mask * 255] * 3)
    out_img, out_mask = RandomDownsample(p=1, factor=(4, 4), output="resize")(img, mask)
    assert (out_mask == mask).all() and out_img.shape == img.shape
    ours, theirs = (ndimage.center_of_mass(o[..., 0].astype(float)) for o in (out_img, img))
    assert np.allclose(ours, theirs, atol=0.1)
    assert np.abs(np.diff(out_img[..., 0].astype(int), axis=0)).max() < 128               # the edge is no longer sharp


def test_downsample_repeats_by_its_own_state():
    img = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = (img[..., 0] > 200).astype(np.uint8)
    t = RandomDownsample(seed=4)
    first = [t(img, mask)[1].shape for _ in range(20)]
    state = random.getstate()
    t.set_random_seed(4)
    assert [t(img, mask)[1].shape for _ in range(20)] == first and len(set(first)) > 5 and random.getstate() == state
    assert pickle.loads(pickle.dumps(RandomDownsample(seed=4)))(img, mask)[1].shape == first[0]
    named = RandomDownsample(seed=4)(image=img, mask=mask)
    assert named["mask"].shape == first[0] and repr(Pipeline([t]))
    grey = RandomDownsample(p=1, factor=(2, 2))(image=img[..., 0])["image"]
    assert grey.shape == (32, 32)


@pytest.mark.parametrize("options,message", [(dict(p=1.5), "p must be"), (dict(factor=(0.9, 2)), "low <= high"), (dict(factor=(3, 2)), "low <= high"),
    (dict(factor=(1, float("inf"))), "low <= high"), (dict(output="crop"), "'crop'")])
def test_downsample_errors(options, message):
    with pytest.raises(ValueError, match=message): RandomDownsample(**options)


def test_downsample_refuses_bad_arrays():
    img = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="0 and 1 only"): RandomDownsample(p=1)(img, np.full((20, 20), 255, np.uint8))
    with pytest.raises(ValueError, match="differ in size"): RandomDownsample(p=1)(img, np.zeros((10, 20), np.uint8))
    tiny_img, tiny_mask = RandomDownsample(p=1, factor=(4, 4), output="pad")(img[:1, :2], np.ones((1, 2), np.uint8))
    assert tiny_img.shape == (1, 2, 3) and tiny_mask.tolist() == [[1, 1]]


def test_area_average_of_any_factor_against_brute_force():
    """Each small pixel is the mean of what it covers, fractions of pixels included, counted on a grid fine enough for both."""
    img = np.random.default_rng(3).integers(0, 256, (20, 15), np.uint8)
    for size in ((7, 4), (13, 11), (20, 1)):
        fine = np.kron(img.astype(float), np.ones(size)).reshape(size[0], 20, size[1], 15).mean((1, 3))
        t = RandomDownsample(p=1)
        assert np.abs(t.apply(img, size=size, corner=(0, 0)).astype(float) - fine).max() <= 0.51


def test_downsampling_conserves_the_covered_area():
    """Large ships keep their share of the image up to half a small pixel along their outline; no ship is lost."""
    rng, mask = np.random.default_rng(0), np.zeros((240, 240), np.uint8)
    for k in range(5): cv2.ellipse(mask, (40 + 40 * k, 120 + int(rng.integers(-60, 60))), (14 + 3 * k, 9), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    outline = int((mask - cv2.erode(mask, np.ones((3, 3)))).sum())
    for factor in (1.3, 2.0, 2.7, 4.0):
        _, small = RandomDownsample(p=1, factor=(factor, factor))(mask, mask)
        scale = mask.size / small.size
        assert abs(small.sum() * scale - mask.sum()) < 0.5 * outline
        assert small.sum() > 0


# the crack document's set

def test_crack_preset_is_the_document_s():
    jitter, flip, turn_any = preset("crack").transforms
    assert np.allclose(jitter.brightness, (0.5, 1.5)) and all(np.allclose(o, (1, 1)) for o in (jitter.contrast, jitter.saturation)) and np.allclose(jitter.hue, (0, 0))
    assert flip.p == 0.5 and tuple(turn_any.limit) == (-180, 180)
    grey = np.full((64, 64, 3), 100, np.uint8)
    t, levels, corners = preset("crack", seed=0), [], []
    for _ in range(200):
        out = t(image=grey)["image"]
        levels.append(out[32, 32, 0])
        corners.append((out[0, 0] == 0).all())
    assert 50 <= min(levels) < 55 and 145 < max(levels) <= 150 and np.mean(corners) > 0.8     # from outside comes black


# symmetries, against NumPy

def boxes_of(mask):
    """Boxes of the 8-connected components, by brute force, sorted."""
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    spots = [np.argwhere(labels == k) for k in range(1, n + 1)]
    return sorted([*o.min(0)[::-1].tolist(), *(o.max(0)[::-1] + 1).tolist()] for o in spots)


@given(st.integers(0, 10 ** 6), st.integers(1, 30), st.integers(1, 30), st.integers(0, 7))
@settings(max_examples=80, deadline=None)
def test_turned_boxes_are_those_of_the_turned_mask(seed, height, width, code):
    mask = (np.random.default_rng(seed).random((height, width)) < 0.15).astype(np.uint8)
    boxes = np.array(boxes_of(mask), int).reshape(-1, 4)
    turned = turn_boxes(boxes, code, mask.shape)
    assert turned.dtype.kind == "i" and sorted(turned.tolist()) == boxes_of(turn(mask, code))
    assert turn_boxes(boxes + 0.25, 0, mask.shape).tolist() == (boxes + 0.25).tolist()


@pytest.mark.parametrize("name", ["flips", "d4"])
def test_pipelines_move_boxes_masks_and_image_exactly(name):
    rng = np.random.default_rng(5)
    mask = cv2.dilate((rng.random((48, 48)) < 0.01).astype(np.uint8), np.ones((3, 2)))
    ids, boxes = list(range(len(boxes_of(mask)))), boxes_of(mask)
    t, seen = preset(name, seed=0, boxes=True), set()
    for _ in range(40):
        out = t(image=mask * 255, mask=mask, bboxes=np.array(boxes), labels=ids)
        codes = [code for code in range(8) if (turn(mask, code) == out["mask"]).all()]
        assert len(codes) == 1 and (out["image"] == out["mask"] * 255).all()
        expected = turn_boxes(boxes, codes[0], mask.shape)
        assert np.allclose(out["bboxes"], expected[np.array(out["labels"], int)], atol=1e-3) and sorted(out["labels"]) == ids
        seen.add(codes[0])
    assert len(seen) == {"flips": 4, "d4": 8}[name]


def test_boxes_that_a_crop_cuts_or_loses():
    out = preset("none", size=(10, 10), seed=0, boxes=True)(image=np.zeros((10, 30, 3), np.uint8), mask=np.zeros((10, 30), np.uint8),
                                                            bboxes=np.array([[k, 2, k + 1, 4] for k in range(30)]), labels=list(range(30)))
    assert len(out["bboxes"]) == 10 and np.diff(out["labels"]).tolist() == [1] * 9
    assert np.allclose(out["bboxes"][:, 0], range(10), atol=1e-4)


# torchvision v2

def v2_sample():
    masks = np.zeros((2, 60, 80), np.uint8)
    masks[0, 12:24, 20:44] = masks[1, 40:48, 60:64] = 1
    boxes = np.array([[20, 12, 44, 24], [60, 40, 64, 48]])
    image = np.random.default_rng(0).integers(0, 50, (3, 60, 80), np.uint8) + 200 * masks.max(0)
    return tv_tensors.Image(image), {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 80)), "masks": tv_tensors.Mask(masks),
                                     "labels": torch.tensor([1, 1])}


@pytest.mark.parametrize("output", ["small", "pad", "resize"])
def test_in_a_torchvision_pipeline_everything_moves_together(output):
    image, target = v2_sample()
    for seed in range(6):
        out, new = v2.Compose([RandomDownsample(p=1, factor=(2, 2), seed=seed, output=output), v2.Identity()])(image, target)
        shape = (30, 40) if output == "small" else (60, 80)
        assert type(out) is tv_tensors.Image and out.shape == (3, *shape) and out.dtype == torch.uint8
        assert type(new["masks"]) is tv_tensors.Mask and new["masks"].shape == (2, *shape) and new["labels"] is target["labels"]
        assert type(new["boxes"]) is tv_tensors.BoundingBoxes and new["boxes"].canvas_size == shape
        assert new["boxes"].tolist() == [boxes_of(o)[0] for o in new["masks"].numpy()]       # even edges: exact at factor 2
        assert all(len(boxes_of(o)) == 1 for o in new["masks"].numpy())                     # no mirror image of a ship without its box
        if output != "resize": assert ((out.numpy()[0] > 125) == new["masks"].numpy().any(0)).all()


def test_tensors_and_arrays_draw_alike():
    image, target = v2_sample()
    mask = target["masks"].numpy().max(0)
    for output in ("small", "pad"):
        a = RandomDownsample(seed=3, output=output)
        b = RandomDownsample(seed=3, output=output)
        for _ in range(8):
            img, msk = a(image.numpy().transpose(1, 2, 0), mask)
            out, new = b(torch.from_numpy(image.numpy()), tv_tensors.Mask(mask))
            assert (out.numpy().transpose(1, 2, 0) == img).all() and (new.numpy() == msk).all()


def test_tensor_kinds_floats_and_errors():
    image, target = v2_sample()
    half = v2.ToDtype(torch.float32, scale=True)(image)
    out, = RandomDownsample(p=1, factor=(2, 2))((half,))
    assert out.dtype == torch.float32 and torch.allclose(out, half.reshape(3, 30, 2, 40, 2).mean((2, 4)), atol=1e-6)
    none = RandomDownsample(p=1, factor=(2, 2))({"image": image, "masks": tv_tensors.Mask(np.zeros((0, 60, 80), np.uint8))})
    assert none["masks"].shape == (0, 30, 40)
    with pytest.raises(ValueError, match="needs one image"): RandomDownsample(p=1)(target["masks"], target["boxes"])
    with pytest.raises(ValueError, match="differ in size"): RandomDownsample(p=1)(image, tv_tensors.Mask(np.zeros((30, 80), np.uint8)))
    cxcywh = v2.ConvertBoundingBoxFormat("CXCYWH")(target["boxes"])
    with pytest.raises(ValueError, match="XYXY"): RandomDownsample(p=1)(image, cxcywh)


def test_albumentations_boxes_follow_the_picture():
    mask = np.zeros((60, 80), np.uint8)
    mask[12:24, 20:44] = 1
    for output in ("small", "pad", "resize"):
        t = Pipeline([RandomDownsample(p=1, factor=(2, 2), output=output)], seed=4, bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]))
        out = t(image=np.dstack([mask * 255] * 3), mask=mask, bboxes=np.array(boxes_of(mask)), labels=[1])
        assert np.allclose(out["bboxes"], boxes_of(out["mask"]), atol=1e-3)


# extra augmentation for images with many ships

def test_the_recipe_reaches_the_threshold_without_changing_its_key():
    assert Recipe().ships_threshold_for_add_augs == 0
    assert Recipe(ships_threshold_for_add_augs=0).key("x") == Recipe().key("x") != Recipe(ships_threshold_for_add_augs=2).key("x")


def test_only_images_with_enough_ships_get_the_preset():
    catalog = read_airbus(sample()).subset(np.arange(40))
    sets = {k: SegmentationDataset(catalog, (32, 32), transform=preset("gauss_noise+color_jitter+cutout"), ships_threshold_for_add_augs=k) for k in (0, 2, 10 ** 6)}
    raw = SegmentationDataset(catalog, (32, 32))
    changed = {}
    for k, o in sets.items():
        changed[k] = np.zeros(len(catalog), bool)
        for epoch in range(8):
            o.set_epoch(epoch)
            changed[k] |= [bool((o[i]["image"] != raw[i]["image"]).any()) for i in range(len(catalog))]
    assert changed[0].all() and (changed[2] == (catalog.counts >= 2)).all() and 0 < changed[2].sum() < 40 and not changed[10 ** 6].any()
    with pytest.raises(ValueError, match="ships_threshold_for_add_augs must be >= 0"): SegmentationDataset(catalog, ships_threshold_for_add_augs=-1)
