"""`rmft bench dedup`: deduplication against the pipeline of the RMFT paper."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence

import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.data.dedup import datasketch_nearest, near_duplicates, repeated_substrings
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.sources import read_documents
from rmft_jax.errors import UserError
from rmft_jax.progress import track

_BYTES = 100  # least length of a repeated substring (Joshi & Smith, arXiv 2512.03310)


def run(config: Config, peer: str = "", *, rounds: int = 3) -> dict:
    """Time both steps of deduplication, ours and the paper's, on the training documents of the source, in turn.

    The paper's: MinHash signatures of 128 permutations over whitespace tokens, one token at a time, and LSH at Jaccard 0.8,
    with `datasketch`; then substrings of at least 100 bytes that came before, by a suffix array over the bytes of what is
    left (`pydivsufsort` and numpy, because the paper's tool is no Python library). Ours works on token ids in its second
    step, which `prepare` has anyway: encoding them is in neither time.

    Returns name, device, versions, unit, shape, value and peer_value (medians, MB/s), ratio (median over rounds),
    near_ratio and exact_ratio (of each step alone), agreement_pct (documents that both flag as near-duplicates, or
    neither), near_jaccard (documents that both flag over those that either does), near_documents (how many each flags),
    removed_pct (share of the text that each removes), and runs: seconds of (near, exact, peer's near, peer's exact).
    same_flags: seconds of dedup.minhash=datasketch, which finds what the peer's first step finds, and by how many times it
    is faster.

    Raises UserError for an unknown peer, or when a library of the peer's is not installed.
    """
    if peer not in ("", "paper"):
        raise UserError(f"bench dedup knows no peer {peer!r}: leave it out, or name paper")
    _need("datasketch", "pydivsufsort")
    texts = read_documents(config.source).train
    tokenizer = SentencePieceTokenizer.train(texts, config.tokenizer)
    ids = [np.array(tokens, np.int32) for tokens in tokenizer.encode(texts)]
    sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    least = max(2, round(_BYTES * sum(map(len, ids)) / sizes.sum()))
    runs, found = [], {}
    for number in track(range(rounds), "bench dedup", rounds):
        seconds = {}
        for which in ("ours", "peer") if number % 2 else ("peer", "ours"):
            begin = time.perf_counter()
            near = near_duplicates(texts, seed=config.source.seed) if which == "ours" else _paper_near(texts)
            middle = time.perf_counter()
            if which == "ours":
                kept = [ids[i] for i in np.flatnonzero(~near)]
            else:
                kept = [np.frombuffer(texts[i].encode("utf-8", "surrogatepass"), np.uint8) for i in np.flatnonzero(~near)]
            lengths = [len(document) for document in kept]
            documents = np.repeat(np.arange(len(kept)), lengths)
            joined = np.concatenate(kept)
            if which == "ours":
                repeated = repeated_substrings(joined, documents, min_tokens=least)
            else:
                repeated = _paper_exact(joined, documents)
            seconds[which] = middle - begin, time.perf_counter() - middle
            share = float(np.mean(repeated)) * (1 - sizes[near].sum() / sizes.sum())
            found[which] = near, 100 * (sizes[near].sum() / sizes.sum() + share)
        runs.append([*seconds["ours"], *seconds["peer"]])
    ratio = lambda a, b: statistics.median(sum(run[b]) / sum(run[a]) for run in runs)  # noqa: E731
    ours, theirs = slice(0, 2), slice(2, 4)
    speed = lambda part: sizes.sum() / 1e6 / statistics.median(sum(run[part]) for run in runs)  # noqa: E731
    return {
        "name": "dedup",
        **environment("datasketch", "rensa", "pydivsufsort"),
        "unit": "MB/s",
        "shape": {"documents": len(texts), "megabytes": float(sizes.sum() / 1e6), "substring_tokens": least},
        "value": float(speed(ours)),
        "peer": "datasketch MinHash LSH, then substrings of 100 bytes by a suffix array over bytes",
        "peer_value": float(speed(theirs)),
        "ratio": ratio(ours, theirs),
        "near_ratio": ratio(slice(0, 1), slice(2, 3)),
        "exact_ratio": ratio(slice(1, 2), slice(3, 4)),
        "agreement_pct": float(100 * np.mean(found["ours"][0] == found["peer"][0])),
        "near_jaccard": float((found["ours"][0] & found["peer"][0]).sum() / (found["ours"][0] | found["peer"][0]).sum()),
        "near_documents": {which: int(near.sum()) for which, (near, _) in found.items()},
        "same_flags": _same_flags(texts, found["peer"][0], statistics.median(run[2] for run in runs)),
        "removed_pct": {which: round(float(share), 2) for which, (_, share) in found.items()},
        "runs": runs,
    }


def _same_flags(texts: Sequence[str], flags: np.ndarray, peer_seconds: float) -> dict:
    """Return the seconds of our way to what datasketch finds, and how many times faster it is."""
    begin = time.perf_counter()
    near = datasketch_nearest(texts) >= 0
    seconds = time.perf_counter() - begin
    assert np.array_equal(near, flags)
    return {"seconds": seconds, "ratio": peer_seconds / seconds}


def _paper_near(texts: Sequence[str]) -> np.ndarray:
    """Return bool [n], near-duplicates of an earlier kept document, as users of datasketch find them."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=0.8, num_perm=128)
    flags = np.zeros(len(texts), bool)
    for number, text in enumerate(texts):
        tokens = set(text.lower().split())
        if not tokens:
            continue
        signature = MinHash(num_perm=128)
        for token in tokens:
            signature.update(token.encode("utf-8", "surrogatepass"))
        candidates = index.query(signature)
        flags[number] = bool(candidates)
        if not candidates:
            index.insert(number, signature)
    return flags


def _paper_exact(data: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return bool [N], bytes in substrings of 100 bytes that came before, each inside one document (Lee et al. 2021)."""
    from pydivsufsort import divsufsort, kasai

    data = data.copy()  # kasai wants it writable
    suffixes = divsufsort(data)
    common = kasai(data, suffixes)  # common[i] is shared by suffixes i and i + 1
    last = np.minimum(suffixes + _BYTES, len(data)) - 1
    inside = (suffixes + _BYTES <= len(data)) & (documents[suffixes] == documents[last])
    groups = np.concatenate(([0], np.flatnonzero(common[:-1] < _BYTES) + 1))
    first = np.minimum.reduceat(np.where(inside, suffixes, len(data)), groups)
    first = np.repeat(first, np.diff(groups, append=len(data)))
    starts = suffixes[inside & (suffixes - first >= _BYTES)]
    steps = np.zeros(len(data) + 1, np.int8)
    steps[starts] += 1
    steps[starts + _BYTES] -= 1
    return np.cumsum(steps[:-1], dtype=np.int32) > 0


def _need(*libraries: str) -> None:
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise UserError(f"bench dedup needs {library}: pip install 'rmft-jax[bench]'")
