"""Images are read from every form they come in, against files made here."""

import gzip
import io

import numpy as np
import pytest

from rmft_jax.data.images import load_images
from rmft_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(256, size=(7, 28, 28), dtype=np.uint8), RNG.integers(10, size=7, dtype=np.uint8)


def write_idx(path, array, compress):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    (gzip.open if compress else open)(path, "wb").write(header + array.tobytes())


def test_mnist_as_idx_files_and_as_npz(tmp_path):
    for stem, array in (("train-images-idx3", IMAGES), ("train-labels-idx1", LABELS)):
        write_idx(tmp_path / f"{stem}-ubyte", array, False)
    for stem, array in (("t10k-images-idx3", IMAGES[:3]), ("t10k-labels-idx1", LABELS[:3])):
        write_idx(tmp_path / f"{stem}-ubyte.gz", array, True)
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:3], y_test=LABELS[:3])
    for path in (tmp_path, tmp_path / "mnist.npz"):
        found = load_images("mnist", str(path), limit=5)
        np.testing.assert_allclose(found.train, IMAGES[:5, :, :, None] / 255, rtol=1e-6)
        np.testing.assert_array_equal(found.test_labels, LABELS[:3])
        assert found.train.dtype == np.float32 and found.train_labels.dtype == np.int32
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0" * 20)
    with pytest.raises(UserError, match="is not an IDX file"):
        load_images("mnist", str(tmp_path))


def test_cifar10_as_binary_files_and_as_jpeg(tmp_path):
    from PIL import Image

    images = RNG.integers(256, size=(10, 32, 32, 3), dtype=np.uint8)
    rows = np.concatenate([LABELS[[0] * 10, None], images.transpose(0, 3, 1, 2).reshape(10, -1)], axis=1)
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(rows[2 * min(n, 4) : 2 * min(n, 4) + 2].tobytes())
    found = load_images("cifar10", str(tmp_path))
    np.testing.assert_allclose(found.train, images / np.float32(255), rtol=1e-6)

    smooth = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (32, 32, 3))
    files = []
    for n in range(3):
        file = io.BytesIO()
        Image.fromarray(np.roll(smooth, n, axis=1)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    split = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "len": np.array([len(f) for f in files], np.uint16)}
    arrays = {f"{name}_{part}": value for name, value in split.items() for part in ("train", "test")}
    labels = {"label_train": LABELS[:3], "label_test": LABELS[:3], "names": np.array(list("abcdefghij"))}
    np.savez(tmp_path / "jpeg.npz", **arrays, **labels)
    found = load_images("cifar10", str(tmp_path / "jpeg.npz"))
    assert np.abs(found.train[0] * 255 - smooth).max() < 4 and found.classes[2] == "c"
    np.savez(tmp_path / "bad.npz", **arrays | {"len_train": split["len"] + 1}, **labels)
    with pytest.raises(UserError, match="is damaged"):
        load_images("cifar10", str(tmp_path / "bad.npz"))


def test_digits_and_unknown_sets():
    found = load_images("digits", test_limit=50)
    assert found.train.shape == (1438, 8, 8, 1) and len(found.test) == 50 and 0 <= found.train.min() < found.train.max() == 1
    for name, path, message in (("digit", "", "choose one of digits"), ("mnist", "", "need a path"),
                                ("mnist", "/nowhere", "cannot be read")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_images(name, path)
