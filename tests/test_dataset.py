"""The decoded cache: equal to decoding, rebuilt when stale, safe against a kill; augmentation moves image and mask together."""
import os
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from shipnb.catalog import read_airbus
from shipnb.dataset import DecodedCache, SegmentationDataset, collate, make_loader, read_item, shrink, to_input, turn
from shipnb.masks import rle_encode


@pytest.fixture
def root(tmp_path):
    rng, rows = np.random.default_rng(0), []
    (tmp_path/"data"/"train_v2").mkdir(parents=True)
    for i in range(6):
        img, mask = rng.integers(0, 255, (96, 96, 3), np.uint8), np.zeros((96, 96), np.uint8)
        if i % 2: mask[10 * i:10 * i + 7, 20:50] = 1
        cv2.imwrite(str(tmp_path/"data"/"train_v2"/f"{i}.png"), img)
        rows.append((f"{i}.png", rle_encode(mask)))
    pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"]).to_csv(tmp_path/"data"/"train_ship_segmentations_v2.csv", index=False)
    return tmp_path/"data"


def test_shrink_averages_areas():
    img = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    blocks = img.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
    assert np.abs(shrink(img, (32, 32)) - blocks).max() <= 0.5 + 1e-6


def test_cache_equals_decoding_and_is_packed(root, tmp_path):
    catalog = read_airbus(root)
    cache = DecodedCache.open(catalog, (32, 32), tmp_path/"cache")
    for i in range(6):
        img, msk = read_item(catalog, i, (32, 32))
        assert (cache.image(i) == img).all() and (cache.mask(i) == msk).all()
    assert cache.bits.nbytes == 6 * 32 * 32 // 8


def test_cache_is_kept_until_the_content_changes(root, tmp_path):
    catalog, folder = read_airbus(root), tmp_path/"cache"
    DecodedCache.open(catalog, (32, 32), folder)
    made = (folder/"images.npy").stat().st_mtime_ns
    os.utime(root/"train_v2"/"0.png")                                   # touched, not changed
    DecodedCache.open(catalog, (32, 32), folder)
    assert (folder/"images.npy").stat().st_mtime_ns == made
    shutil.copy(root/"train_v2"/"1.png", root/"train_v2"/"0.png")        # changed
    cache = DecodedCache.open(read_airbus(root), (32, 32), folder)
    assert (cache.image(0) == cache.image(1)).all()


def test_cache_follows_labels_and_size(root, tmp_path):
    catalog, folder = read_airbus(root), tmp_path/"cache"
    DecodedCache.open(catalog, (32, 32), folder)
    table = pd.read_csv(root/"train_ship_segmentations_v2.csv", dtype=str, keep_default_na=False)
    table.loc[0, "EncodedPixels"] = "1 96"
    table.to_csv(root/"train_ship_segmentations_v2.csv", index=False)
    cache = DecodedCache.open(read_airbus(root), (48, 48), folder)
    assert cache.size == (48, 48) and cache.mask(0).sum() == 48


def test_killed_while_building_is_built_again(root, tmp_path):
    code = ("import os, signal, sys\nfrom shipnb import dataset\nfrom shipnb.catalog import read_airbus\n"
            "real = dataset.read_item\n"
            "def read_item(c, i, s):\n    if i == 4: os.kill(os.getpid(), signal.SIGKILL)\n    return real(c, i, s)\n"
            "dataset.read_item = read_item\ndataset.DecodedCache.open(read_airbus(sys.argv[1]), (32, 32), sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path/"cache")])
    assert done.returncode == -signal.SIGKILL and not (tmp_path/"cache"/"images.npy").exists()
    catalog = read_airbus(root)
    assert (DecodedCache.open(catalog, (32, 32), tmp_path/"cache").image(5) == read_item(catalog, 5, (32, 32))[0]).all()


@pytest.mark.parametrize("code", range(8))
def test_turns_are_the_symmetries_of_the_square(code):
    img = np.arange(16).reshape(4, 4)
    want = torch.rot90(torch.from_numpy(img), code % 4, (0, 1))
    if code >= 4: want = want.flip(1)
    assert (turn(img, code) == want.numpy()).all()


def test_image_and_mask_move_together_and_by_epoch_only(root):
    catalog = read_airbus(root)
    dataset = SegmentationDataset(catalog, (96, 96), augment="d4", seed=3)
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        img, msk = dataset.arrays(3)
        code = next(c for c in range(8) if (turn(catalog.read_image(3), c) == img).all())
        assert (turn(read_item(catalog, 3, (96, 96))[1], code) == msk).all()
        seen.add(code)
    assert len(seen) > 3
    dataset.set_epoch(5)
    again = SegmentationDataset(catalog, (96, 96), augment="d4", seed=3)
    again.set_epoch(5)
    assert all((a == b).all() for a, b in zip(dataset.arrays(3), again.arrays(3)))


def test_batches_are_the_same_with_workers(root):
    catalog = read_airbus(root)
    dataset = SegmentationDataset(catalog, (32, 32), augment="d4")
    plain, workers = (list(make_loader(dataset, [[0, 3], [5, 1, 2]], workers=o)) for o in (0, 2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(plain, workers) for k in a)
    assert plain[1]["has_ship"].tolist() == [True, True, False] and plain[1]["image"].shape == (3, 32, 32, 3)
    single = collate([dataset[i] for i in (5, 1, 2)])
    assert all(torch.equal(single[k], plain[1][k]) for k in single)


def test_input_is_what_torchvision_gives(root):
    from torchvision.transforms import v2
    image = torch.from_numpy(read_airbus(root).read_image(0))[None]
    want = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(image.permute(0, 3, 1, 2))
    assert torch.allclose(to_input(image), want, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_wrong_batches_are_refused(bad):
    with pytest.raises(ValueError, match="expected uint8 images"): to_input(bad)


def test_wrong_settings_are_refused(root, tmp_path):
    catalog = read_airbus(root)
    with pytest.raises(ValueError, match="unknown augment"): SegmentationDataset(catalog, augment="rot")
    with pytest.raises(ValueError, match="square"): SegmentationDataset(catalog, (32, 64), augment="d4")
    cache = DecodedCache.open(catalog.subset([0, 1]), (32, 32), tmp_path/"cache")
    with pytest.raises(ValueError, match="lacks 4 images"): SegmentationDataset(catalog, (32, 32), cache)
