"""Datasets in their official formats, what is refused, and in which order pictures come."""

import gzip
import itertools

import archives
import numpy as np
import pytest
import torch
from PIL import Image

from mnet_kernels.inputs import InputError
from mnet_kernels.training import batches, datasets
from mnet_kernels.training.datasets import open_images


def stacked(half):
    images, labels = zip(*(half[i] for i in range(len(half))), strict=True)
    return torch.stack(images), list(labels)


def refused(spec, *words):
    with pytest.raises(InputError) as caught:
        open_images(str(spec))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# ---- what comes out ----


def test_digits_are_scikit_learns_in_two_halves_that_share_none():
    images = open_images("digits")
    assert (len(images.train), len(images.validation)) == (1442, 355)
    assert images.classes == tuple("0123456789")
    assert not images.flips
    (train, _), (held, labels) = stacked(images.train), stacked(images.validation)
    assert train.shape == (1442, 3, 32, 32) and train.dtype == torch.uint8
    assert train.min() == 0 and train.max() == 255
    assert torch.equal(train[:, 0], train[:, 2])
    assert min(np.bincount(labels)) >= 34, "every class is there"
    from sklearn.datasets import load_digits

    # Bilinear interpolation of 8x8 to 32x32 keeps an image's mean.
    means = sorted((load_digits().images.mean((1, 2)) * 255 / 16).round(1))
    ours = sorted(torch.cat([train, held])[:, 0].double().mean((1, 2)).tolist())
    np.testing.assert_allclose(ours, means, atol=0.6)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path, compress, below):
    archives.fashion_mnist(tmp_path / below, compress=compress)
    images = open_images(f"fashion-mnist:{tmp_path}", size=28)
    pixels, labels = stacked(images.train)
    expected, classes = archives.pictures(96, 28, 1, seed=96)
    assert np.array_equal(pixels.numpy(), np.repeat(expected, 3, axis=1))
    assert labels == classes.tolist()
    assert len(images.validation) == 32
    assert images.flips
    assert open_images(f"fashion-mnist:{tmp_path}").train[0][0].shape == (3, 32, 32)


def same_as_made(images, rows=20):
    made = [archives.pictures(rows, 32, 3, seed) for seed in range(6)]
    pixels, labels = stacked(images.train)
    assert np.array_equal(pixels.numpy(), np.concatenate([p for p, _ in made[:5]]))
    assert labels == np.concatenate([y for _, y in made[:5]]).tolist()
    pixels, labels = stacked(images.validation)
    assert np.array_equal(pixels.numpy(), made[5][0])
    assert labels == made[5][1].tolist()
    assert images.classes[3] == "cat"


@pytest.fixture
def rows(monkeypatch):
    """Small files pass for whole ones."""
    monkeypatch.setattr(datasets, "CIFAR10_ROWS", 20)


@pytest.mark.parametrize("version", ["py", "bin"])
def test_cifar10_archive(tmp_path, monkeypatch, rows, version):
    path = tmp_path / "cifar.tar.gz"
    md5 = archives.cifar10_archive(path, version)
    refused(f"cifar10:{path}", "expected an official archive", md5, "cifar-10-python.tar.gz")
    folder = f"cifar-10-batches-{version}"
    monkeypatch.setitem(datasets.CIFAR10_ARCHIVES, md5, ("made up", folder))
    same_as_made(open_images(f"cifar10:{path}"))


@pytest.mark.parametrize("version", ["py", "bin"])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_folder(tmp_path, monkeypatch, rows, version, inside):
    sums = archives.cifar10_folder(tmp_path, version)
    if version == "py":
        refused(
            f"cifar10:{tmp_path}", "data_batch_1: expected md5 c99cafc152244af753f735de768cd75f"
        )
        monkeypatch.setattr(datasets, "CIFAR10_PYTHON", sums)
    place = tmp_path / f"cifar-10-batches-{version}" if inside else tmp_path
    same_as_made(open_images(f"cifar10:{place}"))


def test_the_sums_are_those_that_torchvision_knows():
    cifar = pytest.importorskip("torchvision.datasets").CIFAR10
    assert dict(cifar.train_list + cifar.test_list) == datasets.CIFAR10_PYTHON
    assert datasets.CIFAR10_ARCHIVES[cifar.tgz_md5][0] == cifar.filename
    assert cifar.base_folder in datasets.CIFAR10_ARCHIVES[cifar.tgz_md5]


def test_image_folder_with_train_and_val(tmp_path):
    archives.image_folder(tmp_path / "train")
    archives.image_folder(tmp_path / "val", count=2, seed=1)
    images = open_images(f"imagefolder:{tmp_path}", size=32)
    assert images.classes == ("a", "b", "c")
    assert (len(images.train), len(images.validation)) == (18, 6)
    pixels, label = images.validation[5]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
    assert label == 2


def test_image_folder_in_one_piece_is_split_by_class(tmp_path):
    archives.image_folder(tmp_path, count=10)
    images = open_images(f"imagefolder:{tmp_path}", size=32)
    halves = [sorted(half.indices) for half in (images.train, images.validation)]
    assert sorted(halves[0] + halves[1]) == list(range(30))
    assert [i // 10 for i in halves[1]] == [0, 0, 1, 1, 2, 2]
    again = open_images(f"imagefolder:{tmp_path}", size=32)
    assert again.validation.indices == images.validation.indices


def test_fit_is_torchvisions_geometry():
    """As the package's own preprocessing of photographs, up to the rounding of pixels."""
    from mnet_kernels import data

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (61, 83, 3)).astype(np.uint8))
    ours = datasets.fit(32)(image).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    torch.testing.assert_close((ours - mean) / std, data.preprocess([image], 32)[0])


# ---- what is refused ----


@pytest.mark.parametrize("spec", ["bogus", "bogus:/", "digits:/", "cifar10", "cifar10:", ""])
def test_an_unknown_name_is_refused(spec):
    refused(spec, "expected digits, cifar10:PATH", f"got {spec!r}")


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist", "imagefolder"])
def test_a_path_that_is_missing_or_empty_or_a_text_is_refused(tmp_path, name):
    refused(f"{name}:{tmp_path}/none", "none does not exist")
    refused(f"{name}:{tmp_path}", "expected")
    text = tmp_path / "text"
    text.write_text("hello")
    refused(f"{name}:{text}", "expected")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_a_cut_cifar10_archive_is_refused(tmp_path, monkeypatch, fraction):
    path = tmp_path / "cifar.tar.gz"
    md5 = archives.cifar10_archive(path, "bin")
    monkeypatch.setitem(datasets.CIFAR10_ARCHIVES, md5, ("made up", "cifar-10-batches-bin"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    refused(f"cifar10:{path}", "expected an official archive", "got md5")


def test_a_cifar10_folder_with_a_bad_file_is_refused(tmp_path, rows):
    archives.cifar10_folder(tmp_path, "bin")
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(f"cifar10:{tmp_path}", "data_batch_2.bin: expected 61,460 bytes, got 61,459")
    file.write_bytes(b"\x0a" + content[1:])
    refused(f"cifar10:{tmp_path}", "data_batch_2.bin: expected labels 0 to 9, got 10")
    file.unlink()
    refused(f"cifar10:{tmp_path}", "expected a file data_batch_2.bin")


def test_a_pickle_of_another_origin_is_never_opened(tmp_path, monkeypatch):
    archives.cifar10_folder(tmp_path, "py")
    monkeypatch.setattr(datasets.pickle, "loads", lambda *_, **__: pytest.fail("it was opened"))
    refused(f"cifar10:{tmp_path}", "expected md5")


def test_bad_idx_files_are_refused(tmp_path):
    archives.fashion_mnist(tmp_path, compress=False)
    spec, file = f"fashion-mnist:{tmp_path}", tmp_path / "train-images-idx3-ubyte"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    refused(spec, "train-images-idx3-ubyte: expected 96 x 28 x 28 bytes", "got 75,259")
    file.write_bytes(b"\x00\x00\x0d\x03" + content[4:])
    refused(spec, "expected an IDX file of bytes in 3 dimensions, got 00 00 0d 03")
    file.write_bytes(content[:10])
    refused(spec, "expected an IDX file")
    file.write_bytes(b"")
    refused(spec, "got an empty file")
    file.unlink()
    refused(spec, "expected a file train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content)[:-100])
    refused(spec, "train-images-idx3-ubyte.gz: not a readable .gz file")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(archives.idx(np.arange(95) % 10))
    refused(spec, "got 96 pictures and 95 labels")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(archives.idx(np.arange(96) % 11))
    refused(spec, "expected labels 0 to 9, got 10")


def test_bad_image_folders_are_refused(tmp_path):
    archives.image_folder(tmp_path / "one", count=2)
    refused(f"imagefolder:{tmp_path}/one", "expected at least 5 pictures of a class to split")
    archives.image_folder(tmp_path / "two" / "train")
    refused(f"imagefolder:{tmp_path}/two", "expected a folder val beside train")
    archives.image_folder(tmp_path / "two" / "val", classes=("a", "b", "d"))
    refused(f"imagefolder:{tmp_path}/two", "only one has c, d")
    (tmp_path / "three" / "train" / "a").mkdir(parents=True)
    (tmp_path / "three" / "val").mkdir(parents=True)
    refused(f"imagefolder:{tmp_path}/three", "expected a folder a class, with pictures in it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_picture_is_one_line_that_names_it(tmp_path, workers):
    archives.image_folder(tmp_path, count=5)
    bad = tmp_path / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:500])
    whole = datasets.folder("imagefolder", tmp_path, datasets.fit(32))
    with pytest.raises(InputError) as caught:
        list(batches.read(batches.loader(whole, batches.shard(15, 5), workers)))
    assert str(caught.value).startswith(f"image {bad}: expected a readable image")
    assert "\n" not in str(caught.value)


# ---- batches ----


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_see_the_batches_of_one(world):
    whole = batches.Shuffled(50, 8, seed=3)
    parts = [batches.Shuffled(50, 8, 3, rank, world) for rank in range(world)]
    orders = []
    for epoch in (1, 2):
        for sampler in (whole, *parts):
            sampler.epoch = epoch
        assert len(whole) == 6
        orders.append(whole.indices())
        assert len(set(orders[-1].flatten().tolist())) == 48
        for batch, *shares in zip(whole, *parts, strict=True):
            assert sorted(batch) == sorted(i for share in shares for i in share)
            assert {len(share) for share in shares} == {8 // world}
    assert not torch.equal(*orders)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_shards_hold_everything_once(count, world):
    parts = [batches.shard(count, 3, rank, world) for rank in range(world)]
    seen = [i for part in parts for batch in part for i in batch]
    assert sorted(seen) == list(range(count))
    assert all(0 < len(batch) <= 3 for part in parts for batch in part)


def test_random_numbers_depend_on_every_argument():
    draws = {
        torch.rand(1, generator=batches.random_generator(*key)).item()
        for key in itertools.product((0, 1), repeat=4)
    }
    assert len(draws) == 16
