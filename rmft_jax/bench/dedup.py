"""`rmft bench dedup`: deduplication against the pipeline of the RMFT paper."""

from __future__ import annotations

import importlib.util
import statistics
import time

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

    The paper's: MinHash signatures of 128 permutations over whitespace tokens, and LSH at Jaccard 0.8, with `datasketch`, as
    dedup.minhash=datasketch does; then substrings of at least 100 bytes that came before, by a suffix array over the bytes
    of what is left (`pydivsufsort` and numpy, because the paper's tool is no Python library). Ours works on token ids in its
    second step, which `prepare` has anyway: encoding them is in neither time.

    Returns name, device, versions, unit, shape, value and peer_value (medians, MB/s), ratio (median over rounds),
    near_ratio and exact_ratio (of each step alone), agreement_pct (documents that both flag as near-duplicates, or
    neither), near_jaccard (documents that both flag over those that either does), near_documents (how many each flags),
    removed_pct (share of the text that each removes), and runs: seconds of (near, exact, peer's near, peer's exact). Seconds
    are those of the processor, so that what else the machine does is not in them.

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
            begin = time.process_time()
            near = near_duplicates(texts, seed=config.source.seed) if which == "ours" else datasketch_nearest(texts) >= 0
            middle = time.process_time()
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
            seconds[which] = middle - begin, time.process_time() - middle
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
        "removed_pct": {which: round(float(share), 2) for which, (_, share) in found.items()},
        "runs": runs,
    }


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
