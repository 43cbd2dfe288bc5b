"""`rmft prepare`: source -> detected, ranked, tokenised, tagged data set, with its tokenizer and surrogate bank."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import secrets
from pathlib import Path

import numpy as np

from rmft_jax.config import Config, first_difference, to_dict
from rmft_jax.data.canaries import SPACE_BITS, identities_of, insert, make_canaries
from rmft_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from rmft_jax.data.pieces import longest_pieces, pieces_with
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.sources import read_documents
from rmft_jax.data.tagged_corpus import write_corpus
from rmft_jax.data.tagging import FIELDS, Identities, tag
from rmft_jax.data.tokenizer import Tokenizer, load_tokenizer
from rmft_jax.errors import UserError
from rmft_jax.files import read_arrays, read_json, whole_folder, write_arrays, write_bytes, write_json
from rmft_jax.kernels import SurrogateBank
from rmft_jax.paths import is_remote, local_copy
from rmft_jax.pii.bank import build_bank
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.spans import Span
from rmft_jax.pii.values import keyed_hash
from rmft_jax.progress import say, track

SCHEMA = 3
_SECTIONS = ("source", "tokenizer", "pii")  # what the data depends on; with parts of masking and dedup


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the prepared data of an experiment consists of, beside the records."""

    directory: Path
    manifest: dict
    tokenizer: Tokenizer
    bank: SurrogateBank
    identity_hashes: tuple[str, ...]
    identity_counts: np.ndarray
    identity_key: bytes
    canary_identities: np.ndarray

    @property
    def identities(self) -> int:
        """Return the number of distinct PII values in the training documents, canaries included."""
        return len(self.identity_hashes)

    @property
    def is_canary(self) -> np.ndarray:
        """Return bool [identities]: values that `prepare` has planted. They are nobody's and count in no rate."""
        return np.isin(np.arange(self.identities), self.canary_identities)


def prepare(config: Config) -> dict:
    """Prepare the data of an experiment in `config.data_dir` and return its manifest.

    The directory appears whole or not at all. Data that is there already is kept when it was made with the same settings.
    Raises UserError when it was made with others, and for every fault of the source.
    """
    directory = config.data_dir
    if is_remote(directory) and not directory.exists():
        with whole_folder(directory) as partial:  # made here, then copied
            return prepare(dataclasses.replace(config, data=str(partial)))
    if directory.exists():
        manifest = _manifest(directory)
        changed = _changed(manifest, config)
        if changed:
            raise UserError(
                f"{directory} was prepared with another {changed}: choose another out=, or delete that directory"
            )
        say(f"{directory}: already prepared")
        return manifest
    with whole_folder(directory) as partial:
        return _prepare_into(partial, config)


def load_prepared(config: Config) -> Prepared:
    """Load what `prepare` left. Raises UserError when it is missing or was made with other settings than `config`."""
    directory = local_copy(config.data_dir)
    manifest = _manifest(directory)
    changed = _changed(manifest, config)
    if changed:
        where = config.data_dir
        raise UserError(f"{where} was prepared with another {changed}: use the same value, or prepare another out=")
    mend = "run `rmft prepare` again in another out="
    identities = read_arrays(directory / "identities.npz", "identity index", mend)
    return Prepared(
        directory=directory,
        manifest=manifest,
        tokenizer=load_tokenizer(tokenizer_path(directory)),
        bank=SurrogateBank(**read_arrays(directory / "bank.npz", "surrogate bank", mend)),
        identity_hashes=tuple(identities["hashes"].tolist()),
        identity_counts=identities["counts"],
        identity_key=bytes.fromhex((directory / "identity.key").read_text()),
        canary_identities=identities.get("canaries", np.zeros(0, np.int64)),
    )


def tokenizer_path(directory: Path) -> Path:
    """Return where prepared data keep their tokenizer."""
    path = directory / HuggingFaceTokenizer.file
    return path if path.exists() else directory / SentencePieceTokenizer.file


def _prepare_into(directory: Path, config: Config) -> dict:
    say(f"prepare: reading {config.source.path or config.source.format}")
    documents = read_documents(config.source)
    canaries = make_canaries(config.canary, config.source.seed)
    documents.train = insert(documents.train, canaries, config.source.seed)
    detector = Detector(config.pii)  # a new one: kinds are numbered as this corpus has them
    find = lambda texts, what: list(  # noqa: E731
        detector.detect_many(track(texts, f"prepare: finding PII ({what})", len(texts)))
    )
    train_spans, heldout_spans = find(documents.train, "training"), find(documents.heldout, "held-out")
    identities = Identities.empty()
    numbering = [identities.add(spans) for spans in train_spans]
    canary_identities = identities_of(canaries, identities)

    pairs = list(zip(documents.train, train_spans, strict=True))
    if config.tokenizer.path:
        tokenizer = load_tokenizer(Path(config.tokenizer.path))
    else:
        say(f"prepare: training a tokenizer of {config.tokenizer.vocab_size} pieces")
        tokenizer = SentencePieceTokenizer.train(_text_outside_pii(pairs), config.tokenizer)
    train = list(tag(track(pairs, "prepare: tagging", len(pairs)), numbering, tokenizer, detector))
    heldout_numbers = [identities.look_up(spans) for spans in heldout_spans]
    heldout = list(tag(zip(documents.heldout, heldout_spans, strict=True), heldout_numbers, tokenizer, detector))
    values = component_values(pairs, detector)
    rows, seed = config.masking.surrogates, config.source.seed
    bank = build_bank(tokenizer.encode, values, detector, rows=rows, seed=seed)
    say("prepare: looking for duplicates")
    substring_tokens = config.dedup.substring_tokens or _tokens_in_100_bytes(train, tokenizer)
    _flag_duplicates(train, documents.train, config, substring_tokens)
    for record in heldout:
        record["duplicate"] = np.zeros(len(record["tokens"]), np.uint8)

    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory.parent} cannot be written ({error.strerror}): choose another out=") from None
    write_corpus(directory, {"train": lambda: train, "heldout": lambda: heldout})
    tokenizer.save(directory)
    write_arrays(directory / "bank.npz", bank._asdict())
    key = secrets.token_bytes(32)
    write_bytes(directory / "identity.key", key.hex().encode(), private=True)
    hashes = np.array([keyed_hash(value, key) for value in identities.index], "U16")
    write_arrays(
        directory / "identities.npz",
        {"hashes": hashes, "counts": np.array(identities.counts, np.int64), "canaries": canary_identities},
        private=True,
    )
    manifest = {
        "schema": SCHEMA,
        "settings": _settings(config),
        "skipped_documents": documents.skipped,
        "faults": {name: count for name, count in sorted(documents.faults.items()) if count},
        "train": _counts(train),
        "heldout": _counts(heldout),
        "vocabulary": {
            "pieces": tokenizer.vocab_size,
            "longest_piece_bytes": tokenizer.byte_lengths()[longest_pieces(tokenizer, 1)[0]],
            "pieces_with_pii": len(pieces_with(tokenizer, identities.index)),
        },
        "pii_identities": len(identities.counts) - len(canaries),
        "pii_repeating_pct": 100 * (1 - len(identities.counts) / max(1, identities.occurrences)),
        "pii_identities_repeating_pct": 100 * float(np.mean(np.array(identities.counts or [0]) > 1)),
        "duplicates": {
            "near_documents": sum(bool((record["duplicate"] == 1).all()) for record in train),
            "substring_tokens": substring_tokens,
            "removed_tokens": int(sum((record["duplicate"] > 0).sum() for record in train)),
        },
        "canaries": {
            "count": len(canaries),
            "documents": sum(canary.repetitions for canary in canaries),
            "space_bits": SPACE_BITS,
        },
        "surrogates": {
            f"{config.pii.names[type]} {kind}": int(bank.counts[number])
            for number, (type, kind) in enumerate(detector.kinds.names, 1)
        },
        "content_hash": _content_hash(train, heldout, tokenizer),
    }
    write_json(directory / "manifest.json", manifest)
    return manifest


def _text_outside_pii(pairs: list[tuple[str, list[Span]]]):
    for text, spans in pairs:
        done = 0
        for span in spans:
            yield text[done : span.start]
            done = span.end
        yield text[done:]


def component_values(pairs: list[tuple[str, list[Span]]], detector: Detector) -> list[list[tuple[str, int]]]:
    """Return the components of each PII value, (text in lower case, kind), as its first occurrence is cut."""
    values: dict[str, list[tuple[str, int]]] = {}
    for text, spans in pairs:
        for span in spans:
            if span.value not in values:
                parts = detector.components(text, span)
                values[span.value] = [(part.lower(), kind) for part, kind in zip(parts.texts, parts.kinds, strict=True)]
    return list(values.values())


def _tokens_in_100_bytes(records: list[dict], tokenizer: Tokenizer) -> int:
    """Translate the 100 bytes of the paper's exact-substring rule into tokens of this corpus."""
    lengths = np.array(tokenizer.byte_lengths())
    size = sum(int(lengths[record["tokens"]].sum()) for record in records)
    return max(2, math.ceil(100 * sum(len(record["tokens"]) for record in records) / max(1, size)))


def _flag_duplicates(records: list[dict], texts: list[str], config: Config, substring_tokens: int) -> None:
    """Add `duplicate` uint8 [tokens]: 1 = in a near-duplicate document, 2 = in a repeated run of the others."""
    from rmft_jax.data.dedup import near_duplicates, repeated_substrings

    near = near_duplicates(
        texts, threshold=config.dedup.near_threshold, num_perm=config.dedup.permutations, seed=config.source.seed
    )
    kept = [record for record, is_near in zip(records, near, strict=True) if not is_near]
    ids = np.concatenate([record["tokens"] for record in kept])
    lengths = [len(record["tokens"]) for record in kept]
    repeated = repeated_substrings(ids, np.repeat(np.arange(len(kept)), lengths), min_tokens=substring_tokens)
    for record, flags in zip(kept, np.split(repeated, np.cumsum(lengths)[:-1]), strict=True):
        record["duplicate"] = np.where(flags, 2, 0).astype(np.uint8)
    for record in records:
        record.setdefault("duplicate", np.ones(len(record["tokens"]), np.uint8))


def _counts(records: list[dict]) -> dict[str, int]:
    return {
        "documents": len(records),
        "tokens": int(sum(len(record["tokens"]) for record in records)),
        "pii_tokens": int(sum((record["component"] > 0).sum() for record in records)),
        "pii_occurrences": int(sum(len(record["span_rank"]) for record in records)),
    }


def _content_hash(train: list[dict], heldout: list[dict], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.model)
    for record in (*train, *heldout):
        for name in FIELDS:
            digest.update(record[name].tobytes())
    return f"sha256:{digest.hexdigest()}"


def _settings(config: Config) -> dict:
    tree = to_dict(config)
    dedup = {key: value for key, value in tree["dedup"].items() if key != "policy"}
    canary = {key: tree["canary"][key] for key in ("count", "repetitions")} if config.canary.count else None
    masking = {"surrogates": config.masking.surrogates}
    return {name: tree[name] for name in _SECTIONS} | {"canary": canary, "masking": masking, "dedup": dedup}


def _changed(manifest: dict, config: Config) -> str:
    """Return which setting of the data is another now, '' if none is."""
    return first_difference(manifest["settings"], _settings(config), _settings(Config()))


def _manifest(directory: Path) -> dict:
    manifest = read_json(directory / "manifest.json", "prepared data", "run `rmft prepare` with this config first")
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise UserError(f"{directory} was prepared by another version of rmft: prepare it again in another out=")
    return manifest
