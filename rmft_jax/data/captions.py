"""Images with captions and the objects they show: a generated world of glyphs, emoji, any captioned set of TFDS."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmft_jax.errors import UserError
from rmft_jax.files import read_arrays

SETS = ("glyphs", "emoji", "tfds")

_GLYPHS, _TOPICS, _FAVOURITES, _SHOWN, _SIDE = 60, 12, 12, 5, 4
_STRANGER = 0.04  # how much rarer a glyph is outside the topics that favour it
_NOISE = 0.1
_PHRASES = ("{} and {}", "{} with {}", "{} near {}", "{} beside {}", "{} over {}", "{} behind {}")
_LEAST = 5  # records that a word must stand for to be an object


class CaptionedImages(NamedTuple):
    """Records: images float32 [N, H, W, channels] in [0, 1], their captions, and objects bool [N, C] of the given names."""

    images: np.ndarray
    captions: tuple[str, ...]
    objects: np.ndarray
    names: tuple[str, ...]


def load_captions(name: str, path: str = "", *, limit: int = 0, side: int = 32, seed: int = 0) -> CaptionedImages:
    """Read one of SETS, or the first `limit` records of it (0 = all).

    glyphs: `limit` records of a generated world (`glyph_world`), without a path. emoji: path is an .npz file with images,
    uint8 [N, H, W, 3], beside a file of the same name ending in _captions.jsonl, of objects with caption, tags (the
    objects) and skin_variant (those records are left out: they are copies of others in another colour).
    tfds: path is NAME or NAME:SPLIT of a set with captions, by its name or its folder, made `side` pixels wide and high; the
    words of a caption are its objects, unless the set has labels of its own.
    An object stands in at least 5 records, or is none.
    Raises UserError when the name is unknown, the path cannot be read, or a package is missing.
    """
    if name not in SETS:
        raise UserError(f"captioned images are {name!r}: choose one of {', '.join(SETS)}")
    if name == "glyphs":
        if limit < 1:
            raise UserError(f"glyphs are generated, {limit} of them: set a limit of 1 or more")
        return glyph_world(limit, seed)
    if not path:
        raise UserError(f"the captioned images of {name} need a path: see data/captions.py for what it must hold")
    return (_emoji(Path(path), limit) if name == "emoji" else _tfds(path, limit, side))


def glyph_world(count: int, seed: int) -> CaptionedImages:
    """Draw records of 5 different glyphs out of 60 in a grid of 3 x 3 cells; a caption names two of them.

    Each record has one of 12 topics, which favours 12 glyphs. So a caption tells something of the three glyphs that it does
    not name, through its topic, but which ones they are is a matter of this record alone: what a model knows of them beyond
    the topic, it has memorized.
    """
    rng = np.random.default_rng([seed, 17])
    glyphs, names = _different_patterns(rng), _names()
    weights = np.full((_TOPICS, _GLYPHS), _STRANGER)
    for row in weights:
        row[rng.choice(_GLYPHS, _FAVOURITES, replace=False)] = 1
    topic = rng.integers(_TOPICS, size=count)
    # the largest of log weight + Gumbel noise are a draw without replacement
    shown = np.argsort(-(np.log(weights[topic]) + rng.gumbel(size=(count, _GLYPHS))), axis=1)[:, :_SHOWN]
    shown = rng.permuted(shown, axis=1)
    cells = np.argsort(rng.random((count, 9)), axis=1)[:, :_SHOWN]
    grid = np.zeros((count, 9, _SIDE, _SIDE), np.float32)
    grid[np.arange(count)[:, None], cells] = glyphs[shown]
    images = grid.reshape(count, 3, 3, _SIDE, _SIDE).swapaxes(2, 3).reshape(count, 3 * _SIDE, 3 * _SIDE, 1)
    images = np.clip(0.1 + 0.8 * images + rng.normal(0, _NOISE, images.shape), 0, 1).astype(np.float32)
    objects = np.zeros((count, _GLYPHS), bool)
    np.put_along_axis(objects, shown, True, axis=1)
    phrases = rng.integers(len(_PHRASES), size=count)
    captions = tuple(_PHRASES[p].format(names[a], names[b]) for p, (a, b) in zip(phrases, shown[:, :2], strict=True))
    return CaptionedImages(images, captions, objects, names)


def _different_patterns(rng: np.random.Generator) -> np.ndarray:
    """Return the glyphs, float32 [60, 4, 4] of zeros and ones, half of each ones and no two alike."""
    found: dict[bytes, np.ndarray] = {}
    half = np.arange(_SIDE**2) % 2
    while len(found) < _GLYPHS:
        pattern = rng.permutation(half)
        found.setdefault(pattern.tobytes(), pattern)
    return np.stack(list(found.values())).reshape(-1, _SIDE, _SIDE).astype(np.float32)


def _names() -> tuple[str, ...]:
    """Return the words for the glyphs: two syllables each, no two alike."""
    syllables = [a + b for a, b in itertools.product("bdfgklmnprst", "aeiou")]
    return tuple(syllables[n] + syllables[(7 * n + 3) % _GLYPHS] for n in range(_GLYPHS))


def _emoji(path: Path, limit: int) -> CaptionedImages:
    images = read_arrays(path, "images", "name another path").get("images")
    beside = path.with_name(f"{path.stem}_captions.jsonl")
    try:
        records = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON lines"
        raise UserError(f"captions {beside} cannot be read ({reason}): put them beside the images") from None
    if images is None or len(images) != len(records):
        found = "no images" if images is None else f"{len(images)} images"
        raise UserError(f"{path} has {found} for the {len(records)} captions in {beside}: get both again")
    kept = [n for n, record in enumerate(records) if not record.get("skin_variant")][: limit or None]
    records = [records[n] for n in kept]
    objects, names = _object_table([record["tags"] for record in records])
    return CaptionedImages(_unit(images[kept]), tuple(record["caption"] for record in records), objects, names)


def _tfds(path: str, limit: int, side: int) -> CaptionedImages:
    import tensorflow_datasets as tfds

    name, _, split = path.partition(":")
    try:
        builder = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name)
        source, features = builder.as_data_source(split or "train"), builder.info.features
    except Exception as error:  # TFDS raises many kinds
        raise UserError(f"TFDS has no {name} prepared ({error}): prepare it as array_record, or name another set") from None
    key = next((key for key in ("caption", "captions", "text") if key in features), None)
    if key is None or "image" not in features:
        raise UserError(f"{name} has the features {', '.join(features)}: name a set with image and caption or captions")
    images, captions, lists = [], [], []
    for number in range(min(limit or len(source), len(source))):
        record = source[number]
        caption = _first_text(record[key])
        images.append(_resized(record["image"], side))
        captions.append(caption)
        lists.append(_labels(record, features) or _words(caption))
    objects, names = _object_table(lists)
    return CaptionedImages(np.stack(images), tuple(captions), objects, names)


def _first_text(value) -> str:
    """Return the first string in a caption of TFDS: bytes, or a list or dict of those."""
    while not isinstance(value, (bytes, str)):
        value = value["text"] if isinstance(value, dict) and "text" in value else next(iter(
            value.values() if isinstance(value, dict) else value))  # fmt: skip
    return value.decode() if isinstance(value, bytes) else value


def _labels(record: dict, features) -> list[str]:
    """Return the names of the labelled objects of a record of TFDS, none where the set has no such thing."""
    if "objects" not in record:
        return []
    names = features["objects"]["label"].names
    return [names[label] for label in np.ravel(record["objects"]["label"])]


def _words(caption: str) -> list[str]:
    return [word for word in "".join(c if c.isalnum() else " " for c in caption.lower()).split() if len(word) > 2]


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images of other sizes need Pillow: pip install 'rmft-jax[studies]'") from None
    found = Image.fromarray(np.squeeze(image)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return _unit(np.asarray(found))


def _unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255


def _object_table(lists: Sequence[Sequence[str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return bool [N, C] and C names from the objects of each record; those in fewer than 5 records are left out."""
    counts = Counter(name for names in lists for name in set(names))
    names = tuple(sorted(name for name, count in counts.items() if count >= _LEAST))
    column = {name: n for n, name in enumerate(names)}
    table = np.zeros((len(lists), len(names)), bool)
    for row, found in enumerate(lists):
        table[row, [column[name] for name in found if name in column]] = True
    return table, names


class CaptionTokens(NamedTuple):
    """Tokenised captions: ids int32 [N, T], 0 after the end; vocab_size; mask, the id of the piece that hides another."""

    ids: np.ndarray
    vocab_size: int
    mask: int


_PAD, _END, _MASK, _UNKNOWN = range(4)


def tokenize_captions(captions: Sequence[str], *, vocab_size: int, length: int) -> CaptionTokens:
    """Train byte-pair encoding on captions, lower case, and encode them: at most `length` tokens with the one at the end.

    vocab_size: at most; captions with few words fill less.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    model = Tokenizer(models.BPE(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["[PAD]", "[END]", "[MASK]", "[UNK]"]
    model.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    rows = [[*found.ids[: length - 1], _END] for found in model.encode_batch(list(captions))]
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int32)
    for row, found in zip(ids, rows, strict=True):
        row[: len(found)] = found
    return CaptionTokens(ids, model.get_vocab_size(), _MASK)
