"""Remove duplicates on the host: near-duplicate documents first, then exact repeated token runs.

The rival method "deduplication" of the RMFT paper (Joshi & Smith, arXiv 2512.03310): MinHash LSH at
Jaccard 0.8 with 128 permutations, then exact substrings of >= 100 bytes. Here the second step works on token
ids, because a byte-level cut can split a UTF-8 character. Exact substrings follow Lee et al. 2021,
arXiv 2107.06499, by hashes of windows and not by a suffix array: only one length is asked for.

Near-duplicates are found with `rensa`, or by `datasketch_nearest` exactly as pipelines written with `datasketch` find them.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rensa import RMinHash, RMinHashDeduplicator

from rmft_jax.errors import UserError

# Weights of the two error areas when bands are chosen. Every LSH candidate is verified against its signature,
# so a false positive only costs time while a false negative is lost. With equal weights, and bands that must
# divide 128, 8 bands of 16 rows would win and miss 19 % of pairs at Jaccard 0.9; these give 16 of 8.
_FALSE_POSITIVE_WEIGHT = 0.1
_FALSE_NEGATIVE_WEIGHT = 0.9


def near_duplicates(
    texts: Iterable[str], *, threshold: float = 0.8, num_perm: int = 128, seed: int = 42
) -> np.ndarray:
    """Flag documents that are near-duplicates of an earlier kept document.

    Documents are compared as sets of lower-cased whitespace tokens. They are walked in order: one is a
    duplicate if MinHash LSH returns an earlier kept document with estimated Jaccard >= threshold, and is then
    not indexed itself. A document without tokens is kept and never compared.

    Args:
        texts: Documents, n of them; one at a time is in memory, and up to 3 KB of each that is kept.
        threshold: Least estimated Jaccard similarity of a duplicate, in (0, 1].
        num_perm: Slots of a MinHash signature, >= 1. Use a highly composite number: bands must divide it.
        seed: Seed of the hash functions, in [0, 2**64).

    Returns:
        bool [n], True for a near-duplicate.

    Raises:
        ValueError: If threshold, num_perm or seed is out of range, or a text holds a lone surrogate.

    Source:
        Joshi & Smith, arXiv 2512.03310 (MinHash LSH, threshold 0.8, 128 permutations).
    """
    _check_minhash_arguments(threshold, num_perm, seed)
    index = RMinHashDeduplicator(
        threshold, num_perm, use_lsh=True, num_bands=_choose_bands(threshold, num_perm), seed=seed
    )
    has_tokens: list[bool] = []

    def entries() -> Iterator[tuple[str, list[str]]]:
        for text in texts:
            tokens = text.lower().split()
            has_tokens.append(bool(tokens))
            # Empty sets must not reach rensa, whose sketches of them are all equal (similarity 1).
            if tokens:
                yield str(len(has_tokens)), tokens  # A repeated key would count as a duplicate.

    kept = np.array(index.add_pairs(entries()), dtype=bool)
    flags = np.array(has_tokens, dtype=bool)
    flags[flags] = ~kept
    return flags


def nearest_kept(
    texts: Sequence[str], flags: np.ndarray, *, threshold: float = 0.8, num_perm: int = 128, seed: int = 42
) -> np.ndarray:
    """Return which kept document each near-duplicate is nearest to, int64 [n]; -1 for those that are kept.

    Args:
        texts, threshold, num_perm, seed: As they were for `near_duplicates`. flags: What it returned.
    """
    index = RMinHashDeduplicator(
        threshold, num_perm, use_lsh=True, num_bands=_choose_bands(threshold, num_perm), seed=seed
    )
    sketches: dict[int, RMinHash] = {}
    out = np.full(len(texts), -1, np.int64)
    for row, (text, is_near) in enumerate(zip(texts, flags, strict=True)):
        if not (tokens := text.lower().split()):
            continue
        sketch = RMinHash(num_perm, seed)
        sketch.update(tokens)
        if is_near:
            found = map(int, index.get_duplicates(sketch))
            out[row] = max(found, key=lambda other: (sketches[other].jaccard(sketch), -other))  # noqa: B023
        else:
            index.add(str(row), sketch)
            sketches[row] = sketch
    return out


def datasketch_index(threshold: float, num_perm: int):
    """Return an empty datasketch.MinHashLSH with the bands that datasketch chooses for a threshold in (0, 1].

    Raises UserError when datasketch is not installed, or finds no bands.
    """
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise UserError("dedup.minhash=datasketch needs datasketch: pip install 'rmft-jax[datasketch]'") from None
    try:
        return MinHashLSH(threshold=threshold, num_perm=num_perm)
    except ValueError as error:
        raise UserError(
            f"datasketch refuses dedup.near_threshold {threshold} with dedup.permutations {num_perm} ({error}): lower the "
            f"threshold, or set dedup.minhash=rensa"
        ) from None


def datasketch_nearest(texts: Iterable[str], *, threshold: float = 0.8, num_perm: int = 128) -> np.ndarray:
    """Return which kept document each near-duplicate is nearest to, int64 [n]; -1 for those that are kept.

    Documents are compared as in `near_duplicates`, with datasketch's own choices: the permutations of its seed 1, its hash,
    its bands, and no look at the signatures of what shares a band. So is done by pipelines that ask a MinHashLSH about each
    document in turn and insert it if nothing is found; datasketch 2.0 has other permutations than the versions before.

    Args:
        texts: Documents, n of them.
        threshold: Jaccard similarity that the bands are chosen for, in (0, 1].
        num_perm: Slots of a MinHash signature, >= 2.

    Raises:
        UserError: As `datasketch_index` does.
    """
    index, sketches = datasketch_index(threshold, num_perm), {}
    from datasketch import MinHash

    words = ([word.encode("utf-8", "surrogatepass") for word in set(text.lower().split())] for text in texts)
    out = []
    for row, sketch in enumerate(MinHash.generator(words, num_perm=num_perm)):
        found = [] if sketch.is_empty() else index.query(sketch)
        out.append(max(found, key=lambda other: (sketches[other].jaccard(sketch), -other), default=-1))  # noqa: B023
        if not found and not sketch.is_empty():
            index.insert(row, sketch)
            sketches[row] = sketch
    return np.array(out, np.int64)


def repeated_substrings(tokens: np.ndarray, document_ids: np.ndarray, *, min_tokens: int) -> np.ndarray:
    """Mark tokens in runs of at least min_tokens tokens that occurred earlier in the corpus.

    A token is marked iff a window of min_tokens tokens that holds it, inside one document, equals a window
    that ended before this one starts, also inside one document. The first occurrence thus stays and later
    ones are marked in full. A window that only overlaps its earlier copies is no repeat: of "aaaa..." the
    first min_tokens tokens stay.

    Args:
        tokens: Token ids, integer [N], documents one after another.
        document_ids: Document of each token, integer [N]. A border is wherever the id changes.
        min_tokens: Least length of a repeated run, in tokens, >= 1.

    Returns:
        bool [N], True for a token to remove.

    Raises:
        ValueError: If min_tokens < 1, or the arrays are not integer, not 1-D or differ in length.

    Source:
        Lee et al. 2021, arXiv 2107.06499 (exact substrings); Joshi & Smith, arXiv 2512.03310.
    """
    tokens, document_ids = np.asarray(tokens), np.asarray(document_ids)
    _check_token_arguments(tokens, document_ids, min_tokens)
    size = tokens.size
    if size < min_tokens:
        return np.zeros(size, dtype=bool)
    # No separators, which would add a symbol per document: equal windows are found across borders too, and
    # starts whose window leaves its document are ignored. Exact, as equality needs only the window itself.
    inside = np.arange(size) + min_tokens <= _document_ends(document_ids)
    starts = _repeated_starts(tokens, inside, min_tokens) if inside.any() else np.zeros(0, np.int64)
    return _cover(starts, min_tokens, size)


def _repeated_starts(tokens: np.ndarray, inside: np.ndarray, min_tokens: int) -> np.ndarray:
    """Return the starts of windows, among those inside, that equal a window ending before them.

    Windows are grouped by a hash of 64 bits and held against the first of their group, token by token. Should one
    differ, another hash is taken, so the result is exact.
    """
    starts = np.flatnonzero(inside)
    for seed in range(1, 100):
        hashes = _window_hashes(tokens, min_tokens, seed)[starts]
        order = np.argsort(hashes)
        hashes, ordered = hashes[order], starts[order]
        groups = np.concatenate(([0], np.flatnonzero(hashes[1:] != hashes[:-1]) + 1))
        first = np.repeat(np.minimum.reduceat(ordered, groups), np.diff(groups, append=len(ordered)))
        later = ordered - first >= min_tokens
        if _are_equal(tokens, ordered[later], first[later], min_tokens):
            return ordered[later]
    raise AssertionError("hashes of 64 bits collided 99 times")


def _window_hashes(tokens: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Return uint64 [N - length + 1]: a polynomial hash of every window, modulo 2^64 (Karp and Rabin 1987)."""
    base = 0x9E3779B97F4A7C15 * (2 * seed + 1) % 2**64  # odd, so it has an inverse
    mixed = (tokens.astype(np.uint64) + np.uint64(seed)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(32)
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed * _powers(base, len(tokens)), dtype=np.uint64)))
    return (sums[length:] - sums[:-length]) * _powers(pow(base, -1, 2**64), len(tokens) - length + 1)


def _powers(base: int, count: int) -> np.ndarray:
    """Return base^0 ... base^(count - 1) modulo 2^64, uint64 [count]."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def _are_equal(tokens: np.ndarray, starts: np.ndarray, others: np.ndarray, length: int) -> bool:
    """Return whether the windows at `starts` equal those at `others`.

    Where the pair before, one token to the left of both, is among them, only the last token is left to compare.
    """
    other = np.full(len(tokens) + 1, -2, np.int64)
    other[starts] = others
    if not np.array_equal(tokens[starts + length - 1], tokens[others + length - 1]):
        return False
    heads = other[starts - 1] != others - 1
    starts, others = starts[heads], others[heads]
    return all(np.array_equal(tokens[starts + k], tokens[others + k]) for k in range(length - 1))


def _cover(starts: np.ndarray, length: int, size: int) -> np.ndarray:
    """Return bool [size], True at positions in [start, start + length) of any start (starts are distinct)."""
    steps = np.zeros(size + 1, dtype=np.int8)
    steps[starts] += 1
    steps[starts + length] -= 1
    return np.cumsum(steps[:-1], dtype=np.int32) > 0


def _document_ends(document_ids: np.ndarray) -> np.ndarray:
    """Return int64 [N], for each token the position just past its document."""
    borders = np.flatnonzero(document_ids[1:] != document_ids[:-1]) + 1
    bounds = np.concatenate(([0], borders, [document_ids.size]))
    return np.repeat(bounds[1:], np.diff(bounds))


def _choose_bands(threshold: float, num_perm: int) -> int:
    """Return the number of bands, a divisor of num_perm, with the least weighted error area.

    The areas are those of the usual construction: the chance of becoming a candidate below the threshold
    (false positive) and of not becoming one above it (false negative), integrated over the similarity.
    """
    similarity = (np.arange(1000) + 0.5) / 1000
    divisors = [bands for bands in range(1, num_perm + 1) if num_perm % bands == 0]

    def error(bands: int) -> float:
        miss = (1 - similarity ** (num_perm // bands)) ** bands
        wrong = np.where(
            similarity < threshold, _FALSE_POSITIVE_WEIGHT * (1 - miss), _FALSE_NEGATIVE_WEIGHT * miss
        )
        return float(wrong.mean())

    return min(divisors, key=error)


def _check_minhash_arguments(threshold: float, num_perm: int, seed: int) -> None:
    """Raise ValueError if an argument of near_duplicates is out of range."""
    if not 0 < threshold <= 1:  # Also refuses NaN.
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if num_perm < 1:
        raise ValueError(f"num_perm must be at least 1, got {num_perm}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")


def _check_token_arguments(tokens: np.ndarray, document_ids: np.ndarray, min_tokens: int) -> None:
    """Raise ValueError if an argument of repeated_substrings is malformed."""
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    if tokens.ndim != 1 or tokens.shape != document_ids.shape:
        raise ValueError(f"expected 1-D arrays of one length, got {tokens.shape} and {document_ids.shape}")
    for name, array in (("tokens", tokens), ("document_ids", document_ids)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")
