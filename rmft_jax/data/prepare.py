"""`rmft prepare`: source -> detected, ranked, tokenised, tagged data set, with its tokenizer and surrogate bank.

The text is read into shards; every shard is tagged by itself; the values of all shards are ranked; every shard is written.
The folder where this happens stands beside the one to come, and what is finished in it is not done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rmft_jax.config import Config, first_difference, to_dict
from rmft_jax.cores import cores
from rmft_jax.data import beam
from rmft_jax.data.canaries import SPACE_BITS, make_canaries
from rmft_jax.data.corpus_values import corpus_values
from rmft_jax.data.duplicates import check_library, flag_duplicates
from rmft_jax.data.pieces import longest_pieces
from rmft_jax.data.pool import peak_memory, run_shards
from rmft_jax.data.ranks import rank_shards
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.shards import SPLITS, Shard, plan_shards, read_shards, texts_of
from rmft_jax.data.sources import identity
from rmft_jax.data.tagged_corpus import NAME, VERSION, file_name, number_kinds, record_path, write_metadata, write_records
from rmft_jax.data.tagged_shards import Job, read_tagged, tag_shard, tokenizer_of
from rmft_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_path
from rmft_jax.data.work import work_folder
from rmft_jax.errors import UserError
from rmft_jax.files import read_arrays, read_json, whole_folder, write_arrays, write_bytes, write_json
from rmft_jax.kernels import SurrogateBank
from rmft_jax.paths import is_remote, local_copy
from rmft_jax.pii.bank import build_bank
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.spans import Span
from rmft_jax.progress import say

SCHEMA = 3
_SECTIONS = ("source", "tokenizer", "pii")  # what the data depends on; with parts of masking and dedup
RUNNERS = ("local", "beam")


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


def prepare(config: Config, *, workers: int = 0, runner: str = "local", beam_options: Sequence[str] = ()) -> dict:
    """Prepare the data of an experiment in `config.data_dir` and return its manifest.

    The directory appears whole or not at all. Data that is there already is kept when it was made with the same settings.
    A call that was cut off is gone on with. Neither workers nor runner change the data.

    Args:
      workers: processes, 0 = as many as there are cores.
      runner: local | beam, an Apache Beam pipeline, which gets beam_options; its workers must see the folder of the data.

    Raises UserError when it was made with others, for every fault of the source, and for an unknown runner.
    """
    if runner not in RUNNERS:
        raise UserError(f"unknown runner {runner!r}: choose one of {', '.join(RUNNERS)}")
    directory = config.data_dir
    if is_remote(directory) and not directory.exists():
        with whole_folder(directory) as partial:  # made here, then copied
            there = dataclasses.replace(config, data=str(partial))
            return prepare(there, workers=workers, runner=runner, beam_options=beam_options)
    if directory.exists():
        manifest = _manifest(directory)
        changed = _changed(manifest, config)
        if changed:
            raise UserError(
                f"{directory} was prepared with another {changed}: choose another out=, or delete that directory"
            )
        say(f"{directory}: already prepared")
        return manifest
    check_library(config)  # before hours of work, not after
    with work_folder(directory, [SCHEMA, VERSION, _settings(config)], _inputs(config)) as folder:
        manifest = _prepare_in(Job(folder, config), workers or cores(), runner, beam_options)
        (folder / "final").rename(directory)
        main, worker = peak_memory()
        say(f"prepare: memory at most {main:,.0f} MiB" + (f", {worker:,.0f} MiB in a worker" if worker else ""))
        return manifest


def load_prepared(config: Config) -> Prepared:
    """Load what `prepare` left. Raises UserError when it is missing or was made with other settings than `config`."""
    directory = local_copy(config.data_dir)
    manifest = _manifest(directory)
    changed = _changed(manifest, config)
    if changed:
        where = config.data_dir
        raise UserError(f"{where} was prepared with another {changed}: use the same value, or prepare another out=")
    if config.dedup.policy != "none":
        check_flagged(manifest, config.dedup.policy)
    return read_prepared(directory)


def read_prepared(directory: Path) -> Prepared:
    """Read what `prepare` left in a folder on a disk, whatever its settings. Raises UserError when it is missing."""
    manifest, mend = _manifest(directory), "run `rmft prepare` again in another out="
    identities = read_arrays(directory / "identities.npz", "identity index", mend)
    hashes = identities["hashes"].tolist()
    return Prepared(
        directory=directory,
        manifest=manifest,
        tokenizer=load_tokenizer(tokenizer_path(directory)),
        bank=SurrogateBank(**read_arrays(directory / "bank.npz", "surrogate bank", mend)),
        identity_hashes=tuple(hash if isinstance(hash, str) else f"{hash:016x}" for hash in hashes),
        identity_counts=identities["counts"],
        identity_key=bytes.fromhex((directory / "identity.key").read_text()),
        canary_identities=identities.get("canaries", np.zeros(0, np.int64)),
    )


def _prepare_in(job: Job, workers: int, runner: str, beam_options: Sequence[str]) -> dict:
    """Do all that is left to do in the folder of a job, up to `final`, the folder of the data; return the manifest."""
    read, shards = begin(job)
    if runner == "beam":
        if not all(job.ranks(shard).exists() for shard in shards):
            beam.tag_and_rank(job, shards, beam_options)
        duplicates = flag_duplicates(job, shards, number_shards(job, shards))
        beam.write(job, [shard for shard in shards if not job.records(shard).exists()], beam_options)
    else:
        tag_and_rank(job, shards, workers)
        duplicates = flag_duplicates(job, shards, number_shards(job, shards))
        run_shards(write_records, job, shards, job.records, "prepare: writing", workers)
    return _assemble(job, shards, read, duplicates)


def check_flagged(manifest: dict, policy: str, where: str = "the data") -> None:
    """Raise UserError for prepared data that were not searched for the duplicates of a policy other than none."""
    known, what = ("near_documents", "near-duplicates") if policy == "near" else ("removed_tokens", "duplicates")
    if manifest.get("duplicates", {}).get(known, 0) is None:
        raise UserError(
            f"{where} have {manifest['train']['tokens']:,} tokens and were not searched for {what}: prepare them in "
            f"another out= with a larger dedup.most_tokens, or set dedup.policy=none"
        )


def pii_names(manifest: dict) -> list[str]:
    """Return the names of the PII types of prepared data, in the order of their numbers."""
    pii = manifest["settings"]["pii"]
    return [*pii["types"], *(custom["name"] for custom in pii["custom"])]


def source_name(manifest: dict) -> str:
    """Return what the text of prepared data is called in results: the name of its file, or its format."""
    source = manifest["settings"]["source"]
    return Path(source["path"]).name or source["format"]


def begin(job: Job) -> tuple[dict, list[Shard]]:
    """Read the source, make the tokenizer and the secret of a job, as far as they are not there; return what
    `read_shards` says, and the shards."""
    read = read_shards(job.texts, job.config)
    shards = plan_shards(read, job.config)
    if not job.tokenizer.exists():
        with whole_folder(job.tokenizer) as partial:
            _make_tokenizer(job, shards, read["characters"]).save(partial)
    if not job.key_file.exists():
        write_bytes(job.key_file, secrets.token_bytes(32).hex().encode(), private=True)
    return read, shards


def tag_and_rank(job: Job, shards: Sequence[Shard], workers: int) -> None:
    """Tag every shard and rank its values, unless that has been done."""
    if not all(job.ranks(shard).exists() for shard in shards):
        run_shards(tag_shard, job, shards, job.tagged, "prepare: finding PII, tokenising", workers)
        say("prepare: ranking")
        rank_shards(job, shards, workers)


def _make_tokenizer(job: Job, shards: Sequence[Shard], characters: int) -> Tokenizer:
    config = job.config
    if config.tokenizer.path:
        return load_tokenizer(Path(config.tokenizer.path))
    say(f"prepare: training a tokenizer of {config.tokenizer.vocab_size} pieces")
    return SentencePieceTokenizer.train(_text_outside_pii(_sample(job, shards, characters)), config.tokenizer)


def _text_outside_pii(pairs: Iterable[tuple[str, Sequence[Span]]]) -> Iterator[str]:
    for text, spans in pairs:
        done = 0
        for span in spans:
            yield text[done : span.start]
            done = span.end
        yield text[done:]


def _sample(job: Job, shards: Sequence[Shard], characters: int) -> Iterator[tuple[str, Sequence[Span]]]:
    """Yield the training documents with their PII; of a large corpus, documents drawn at random."""
    config = job.config
    share = min(1.0, config.tokenizer.train_characters / max(1, characters))
    detector, rng = Detector(config.pii), np.random.default_rng([config.source.seed, 3])
    for shard in shards:
        chosen = rng.random(len(shard.train)) < share
        some = dataclasses.replace(shard, train=shard.train[chosen])
        texts = texts_of(job.texts, some, "train", config) if chosen.any() else []
        yield from zip(texts, detector.detect_many(texts), strict=True)


def number_shards(job: Job, shards: Sequence[Shard]) -> dict[str, np.ndarray]:
    """Write and return what numbers shards within the corpus.

    span_begin, token_begin: int64 [shards + 1], training spans and tokens of the shards before. kinds: int32, the corpus'
    numbers of each shard's kinds, from kinds_begin on. kind_names: JSON, the kinds of the corpus. text_bytes: of the
    training documents.
    """
    counts, found = {"span": [0], "token": [0]}, []
    text_bytes = 0
    for shard in shards:
        arrays = read_tagged(job, shard)
        counts["span"].append(arrays["train_document_spans"].sum())
        counts["token"].append(arrays["train_document_tokens"].sum())
        found.append((json.loads(arrays["kinds"].tobytes()), int(arrays["train_kinds"])))
        text_bytes += int(arrays["text_bytes"])
    if sum(counts["span"]) >= 2**31:
        raise UserError("the training documents have more than 2^31 occurrences of PII: prepare parts of them")
    kinds = Detector(job.config.pii).kinds
    numbers = number_kinds(kinds, found)
    corpus = {
        **{f"{name}_begin": np.cumsum(sizes).astype(np.int64) for name, sizes in counts.items()},
        "kinds": np.concatenate(numbers),
        "kinds_begin": np.cumsum([0, *map(len, numbers)]),
        "kind_names": np.frombuffer(json.dumps(kinds.names).encode(), np.uint8),
        "text_bytes": np.int64(text_bytes),
    }
    write_arrays(job.folder / "corpus.npz", corpus, private=True)
    return corpus


def _assemble(job: Job, shards: Sequence[Shard], read: dict, duplicates: dict) -> dict:
    """Put the data together from the parts in a folder `final`, and return their manifest."""
    config, tokenizer = job.config, tokenizer_of(job.tokenizer)
    records = [read_json(job.records(shard), "records", "run `rmft prepare` again") for shard in shards]
    final = job.folder / "final"
    shutil.rmtree(final, ignore_errors=True)  # of a call that was cut off
    folder = final / NAME / VERSION
    folder.mkdir(parents=True)
    splits = {}
    for split in SPLITS:
        files = [shard for shard, said in zip(shards, records, strict=True) if said[split]["documents"]]
        for number, shard in enumerate(files):
            _place(record_path(job, shard.number, split), folder / file_name(split, number, len(files)))
        lengths = [said[split]["documents"] for said in records if said[split]["documents"]]
        splits[split] = lengths, sum(said[split]["bytes"] for said in records)
    write_metadata(folder, splits)
    tokenizer.save(final)
    values = corpus_values(job, shards)
    bank = build_bank(
        tokenizer.encode, values.sample, values.detector, rows=config.masking.surrogates, seed=config.source.seed,
        also=sorted(values.stocked), real=values.real,
    )  # fmt: skip
    write_arrays(final / "bank.npz", bank._asdict())
    write_bytes(final / "identity.key", job.key.hex().encode(), private=True)
    index = {"hashes": values.hashes, "counts": values.counts, "canaries": values.canaries}
    write_arrays(final / "identities.npz", index, private=True)
    total = lambda split: {  # noqa: E731
        name: sum(said[split][name] for said in records)
        for name in ("documents", "tokens", "pii_tokens", "pii_occurrences")
    }
    digest = hashlib.sha256(tokenizer.model)
    for split in SPLITS:
        for said in records:
            digest.update(said[split]["digest"].encode())
    occurrences, canaries = int(values.counts.sum()), make_canaries(config.canary, config.source.seed)
    manifest = {
        "schema": SCHEMA,
        "settings": _settings(config),
        "skipped_documents": read["skipped"],
        "faults": read["faults"],
        "train": total("train"),
        "heldout": total("heldout"),
        "vocabulary": {
            "pieces": tokenizer.vocab_size,
            "longest_piece_bytes": tokenizer.byte_lengths()[longest_pieces(tokenizer, 1)[0]],
            "pieces_with_pii": len(values.pieces),
        },
        "pii_identities": len(values.counts) - len(canaries),
        "pii_repeating_pct": 100 * (1 - len(values.counts) / max(1, occurrences)),
        "pii_identities_repeating_pct": 100 * float(np.mean(values.counts > 1)) if len(values.counts) else 0.0,
        "duplicates": duplicates,
        "canaries": {
            "count": len(canaries),
            "documents": sum(canary.repetitions for canary in canaries),
            "space_bits": SPACE_BITS,
        },
        "surrogates": {
            f"{config.pii.names[type]} {kind}": int(bank.counts[number])
            for number, (type, kind) in enumerate(values.detector.kinds.names, 1)
        },
        "content_hash": f"sha256:{digest.hexdigest()}",
    }
    write_json(final / "manifest.json", manifest)
    return manifest


def _place(file: Path, name: Path) -> None:
    """Give a file another name, or copy it where the file system knows one name alone."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _inputs(config: Config) -> list:
    """Return what tells whether the source or a file that the data come from is another one now."""
    words = [custom.words for custom in config.pii.custom]
    paths = [Path(name) for name in (config.tokenizer.path, *words) if name]
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.exists()]
    return identity(config.source) + files


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
