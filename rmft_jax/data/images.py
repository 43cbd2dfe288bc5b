"""Small labelled images: MNIST, CIFAR-10 and the digits that come with scikit-learn."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmft_jax.errors import UserError

SETS = ("digits", "mnist", "cifar10")


class Images(NamedTuple):
    """Training and test images, float32 [N, H, W, channels] in [0, 1], and their labels, int32 [N]. classes: names."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


def load_images(name: str, path: str = "", *, limit: int = 0, test_limit: int = 0) -> Images:
    """Read one of SETS, of each split the first `limit` and `test_limit` images (0 = all).

    path: digits need none: every fifth image is a test image. mnist: a folder with the four IDX files, gzipped or not, or an
    .npz with x_train, y_train, x_test, y_test. cifar10: a folder with the binary version (data_batch_1.bin, ...), or an .npz
    of JPEG files one after the other: jpeg_train, len_train, label_train, the same for test, and names. A path
    "tfds:FOLDER" reads what TFDS has prepared there.
    Raises UserError when the name is unknown, the path cannot be read, or a package is missing.
    """
    if name not in SETS:
        raise UserError(f"images are {name!r}: choose one of {', '.join(SETS)}")
    if name != "digits" and not path:
        raise UserError(f"the images of {name} need a path: a folder or an .npz file")
    if path.startswith("tfds:"):
        found = _tfds(name, path.removeprefix("tfds:"))
    else:
        found = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}[name](Path(path))
    train, train_labels, test, test_labels, classes = found
    cut = lambda x, count: x[: count or None]  # noqa: E731
    return Images(
        _unit(cut(train, limit)), cut(train_labels, limit).astype(np.int32),
        _unit(cut(test, test_limit)), cut(test_labels, test_limit).astype(np.int32), tuple(map(str, classes)),
    )  # fmt: skip


def _unit(images: np.ndarray) -> np.ndarray:
    """Return images as float32 [N, H, W, channels] in [0, 1]; bytes are divided by 255."""
    scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    return scaled[..., None] if scaled.ndim == 3 else scaled


def _digits(path: Path) -> tuple:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install 'rmft-jax[studies]'") from None
    found = load_digits()
    images, test = found.images / 16.0, np.arange(len(found.target)) % 5 == 4
    return images[~test], found.target[~test], images[test], found.target[test], range(10)


def _mnist(path: Path) -> tuple:
    if path.is_dir():
        names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        arrays = [_idx(path, name) for name in names]
    else:
        found = _npz(path)
        arrays = [_entry(found, name, path) for name in ("x_train", "y_train", "x_test", "y_test")]
    return *arrays, range(10)


def _idx(folder: Path, name: str) -> np.ndarray:
    """Read an array of bytes in the IDX format: 0, 0, type 8, number of axes, the axes as big-endian int32, the bytes."""
    for path in (folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"):
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            axes = raw[3] if raw[:3] == b"\0\0\x08" else 0
            shape = tuple(np.frombuffer(raw, ">i4", axes, 4)) if axes else ()
            if not axes or len(raw) != 4 + 4 * axes + np.prod(shape):
                raise UserError(f"{path} is not an IDX file of bytes: download it again")
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    raise UserError(f"{folder} has no {name}-ubyte or {name}-ubyte.gz: name the folder with the four files of MNIST")


def _cifar10(path: Path) -> tuple:
    if path.is_dir():
        splits = []
        for names in ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"]):
            missing = [name for name in names if not (path / name).exists()]
            if missing:
                raise UserError(f"{path} has no {missing[0]}: name the folder of CIFAR-10's binary version")
            rows = np.concatenate([np.frombuffer((path / name).read_bytes(), np.uint8) for name in names]).reshape(-1, 3073)
            splits += [rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]]
        names = (path / "batches.meta.txt").read_text().split() if (path / "batches.meta.txt").exists() else range(10)
        return *splits, names
    found, splits = _npz(path), []
    for split in ("train", "test"):
        bytes_, lengths = (_entry(found, f"{name}_{split}", path) for name in ("jpeg", "len"))
        splits += [_jpegs(bytes_, lengths, path), _entry(found, f"label_{split}", path)]
    return *splits, found.get("names", range(10))


def _jpegs(joined: np.ndarray, lengths: np.ndarray, path: Path) -> np.ndarray:
    """Return uint8 [N, H, W, 3] from JPEG files that stand one after the other."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("JPEG images need Pillow: pip install 'rmft-jax[studies]'") from None
    ends = np.cumsum(lengths.astype(np.int64))
    if ends[-1] != len(joined):
        raise UserError(f"{path} is damaged: its lengths add up to {ends[-1]}, not to {len(joined)} bytes; get it again")
    files = (joined[end - length : end].tobytes() for end, length in zip(ends, lengths.astype(np.int64), strict=True))
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def _tfds(name: str, folder: str) -> tuple:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder) if folder else tfds.builder(name)
        arrays = []
        for split in ("train", "test"):
            rows = [builder.as_data_source(split)[n] for n in range(builder.info.splits[split].num_examples)]
            arrays += [np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])]
    except Exception as error:  # TFDS raises many kinds
        raise UserError(
            f"TFDS has no {name} prepared in {folder or 'its folder'} ({error}): prepare it as array_record"
        ) from None
    return *arrays, builder.info.features["label"].names


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"images {path} cannot be read ({getattr(error, 'strerror', None) or 'not an .npz file'}): "
                        f"name another path") from None  # fmt: skip


def _entry(found: dict, name: str, path: Path) -> np.ndarray:
    if name not in found:
        raise UserError(f"{path} has no {name}, only {', '.join(found)}: see data/images.py for what it must hold")
    return found[name]
