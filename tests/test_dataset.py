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
from shipnb import dataset as module
from shipnb.dataset import DecodedCache, DeviceCache, DeviceDataset, SegmentationDataset, collate, constant, make_loader, on_device, read_item, shrink, to_input, turn
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


@pytest.mark.parametrize("augment, size, crop, on_ship", [("none", (32, 32), 0, 0), ("d4", (32, 32), 0, 0), ("flips", (21, 33), 0, 0), ("none", (21, 33), 0, 0),   # 693 pixels: the last octet of a mask is not full
                                                          ("d4", (33, 33), 16, 0.0), ("d4", (32, 32), 13, 0.7), ("flips", (21, 33), 16, 1.0), ("d4", (32, 32), 32, 1.0)])
def test_batches_on_a_device_are_the_processor_s(root, tmp_path, augment, size, crop, on_ship):
    """The same bits for the same (seed, epoch, position), of a part of a cache in another order."""
    whole = read_airbus(root)
    cache = DecodedCache.open(whole, size, tmp_path/"cache")
    plain = SegmentationDataset(whole.subset([5, 1, 2, 3]), size, cache, augment, crop, on_ship, seed=7)
    there, seen = DeviceDataset(plain, "cpu"), set()
    for epoch in range(15):
        for o in (plain, there): o.set_epoch(epoch)
        for indices in ([0, 3, 1], [2], [3, 3, 0, 2, 1]):
            mine, other = plain.__getitems__(indices), there.__getitems__(indices)
            assert mine.keys() == other.keys()
            for name in mine: assert mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]), name
        seen.add(mine["image"].numpy().tobytes())
    assert len(seen) == 1 if augment == "none" else len(seen) > 10
    batches = [list(make_loader(o, [[0, 3], [1]])) for o in (plain, there)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*batches) for k in a)


@pytest.mark.parametrize("code", range(8))
def test_each_symmetry_on_a_device_is_its_own(root, tmp_path, code):
    """`take` with one code against torch's own turns of the whole image: independent of `turn`."""
    catalog = read_airbus(root)
    cache = DecodedCache.open(catalog, (32, 32), tmp_path/"cache")
    store = DeviceCache(cache, np.array([3, 0]), "cpu", "d4")
    images, masks = store.take([0, 1, 0], [[2, 5]] * 3, [code] * 3, (20, 20))
    for k, row in enumerate((3, 0, 3)):
        for got, array in ((images, cache.images[row]), (masks, cache.mask(row))):
            want = torch.rot90(torch.from_numpy(np.array(array[2:22, 5:25])), code % 4, (0, 1))
            assert torch.equal(got[k], want.flip(1) if code >= 4 else want)
    assert masks[0].any() and masks.max() == 1


def test_a_cache_goes_to_a_device_when_it_fits(root, tmp_path, monkeypatch):
    catalog = read_airbus(root)
    cache = DecodedCache.open(catalog, (32, 32), tmp_path/"cache")
    plain, needed = SegmentationDataset(catalog, (32, 32), cache), 6 * (32 * 32 * 3 + 32 * 32 // 8)
    assert DeviceCache.nbytes(cache, 6) == needed
    store = DeviceCache(cache, np.arange(6), "cpu")
    assert store.images.nbytes + store.bits.nbytes == needed
    assert on_device(plain, "cpu") is plain, "the CPU has the cache already"
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        assert isinstance(on_device(plain, "cpu"), DeviceDataset) == fits
    monkeypatch.setattr(module, "free_memory", lambda device: 1e12)
    for other in (SegmentationDataset(catalog, (32, 32)), SegmentationDataset(catalog, (32, 32), cache, transform=lambda **o: o)):
        assert on_device(other, "cpu") is other
        with pytest.raises(ValueError, match="needs a decoded cache, and no transform"): DeviceDataset(other, "cpu")


def test_numbers_on_a_device_are_made_once():
    with torch.inference_mode(): numbers = constant((0.25, 3.0), torch.device("cpu"))
    assert numbers is constant((0.25, 3.0), torch.device("cpu")) and numbers.tolist() == [0.25, 3.0] and not numbers.is_inference()
