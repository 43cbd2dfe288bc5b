"""What a model has memorized while it trains: counters in the train state.

The step counts from the hits that its loss has anyway; `training.tracker_log` makes a file of the counters. What is counted:
docs/tracker.md.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.blocks import Corpus
from rmft_jax.data.prepare import Prepared
from rmft_jax.errors import UserError
from rmft_jax.kernels import (
    SURROGATE,
    MaskedBatch,
    TaggedBatch,
    first_memorized,
    memorized,
    run_lengths,
    slice_counts,
)
from rmft_jax.models.gpt import place
from rmft_jax.training.losses import asked_targets

ORIGINS = ("text", "pii", "surrogate")  # the slices by the numbers of `origin`; those of tags follow


class TrackerShape(NamedTuple):
    """The sizes of the counters. rounds: epochs that are told apart at a time, more than two reports lie apart.

    slices: of ORIGINS and tags. bins: of run lengths. examples: rows of an epoch, 0 = none are followed.
    """

    rounds: int
    slices: int
    bins: int
    examples: int


def slice_names(config: Config) -> tuple[str, ...]:
    """Return the names of the slices in the order of the counters: ORIGINS, the user's tags, canaries if there are any."""
    return (*ORIGINS, *config.tracker.tag_names, *(("canary",) if config.canary.count else ()))


def tracker_shape(config: Config, blocks: int) -> TrackerShape | None:
    """Return the sizes of the counters of a run over so many blocks, None where the tracker is off."""
    tracker, training = config.tracker, config.training
    if not tracker.enabled:
        return None
    touched = -(-training.log_every * training.batch_size // blocks) + 1
    bins = min(tracker.lengths or training.sequence_length, training.sequence_length)
    return TrackerShape(touched, len(slice_names(config)), bins, blocks if tracker.examples else 0)


def read_tags(config: Config, prepared: Prepared) -> np.ndarray | None:
    """Return the tag of each token of the training split, int [tokens], None without `tracker.tags`.

    Raises UserError for a file that is no such array, or that has tags without a name.
    """
    path, names = config.tracker.tags, config.tracker.tag_names
    if not path:
        return None
    try:
        tags = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "no .npy file"
        raise UserError(f"tracker.tags {path} cannot be read ({reason}): save it with numpy.save") from None
    tokens = prepared.manifest["train"]["tokens"]
    if not isinstance(tags, np.ndarray) or tags.shape != (tokens,) or tags.dtype.kind not in "iu":
        found = f"{tags.dtype} {list(tags.shape)}" if isinstance(tags, np.ndarray) else "several arrays"
        raise UserError(f"tracker.tags {path} has {found}: give one array of integers of the {tokens} training tokens")
    if tags.min() < 0 or tags.max() > len(names):
        raise UserError(f"tracker.tags {path} has tags from {tags.min()} to {tags.max()}: use 0 (none) to {len(names)}, "
                        f"the number of tracker.tag_names, or name more")  # fmt: skip
    return tags


def tag_canaries(corpus: Corpus, prepared: Prepared, config: Config) -> None:
    """Give the tokens of planted canaries their tag, in the place of the user's."""
    identity = corpus.span["identity"][corpus.token_span]
    planted = (corpus.token_span > 0) & np.isin(identity, prepared.canary_identities)
    corpus.tag[planted] = len(config.tracker.tag_names) + 1


def init_tracker(shape: TrackerShape) -> dict:
    """Return the tracker's part of the train state before the first step.

    counts: hits, targets uint32 [rounds, slices]; lengths uint32 [rounds, bins], runs of memorized tokens by their length;
    whole int32 [], examples memorized as a whole at least once. What epoch e adds goes to round e % rounds; nothing is ever
    set back, so that sums wrap at 2^32.
    examples, if they are followed: hits, targets uint32 [examples], over all visits; first int32 [examples], the step at
    which each was first memorized as a whole, -1 = never.
    """
    zeros = lambda *size: jnp.zeros(size, jnp.uint32)  # noqa: E731
    counts = {"hits": zeros(shape.rounds, shape.slices), "targets": zeros(shape.rounds, shape.slices)}
    counts |= {"lengths": zeros(shape.rounds, shape.bins), "whole": jnp.zeros((), jnp.int32)}
    if not shape.examples:
        return {"counts": counts}
    of_examples = {"hits": zeros(shape.examples), "targets": zeros(shape.examples)}
    return {"counts": counts, "examples": of_examples | {"first": jnp.full(shape.examples, -1, jnp.int32)}}


def update_tracker(tracker: dict, batch: TaggedBatch, masked: MaskedBatch, hit: jax.Array, step: jax.Array) -> dict:
    """Return the tracker after a batch. Rows of corpora that are mixed in count nowhere.

    batch: the rows as tagged; masked: the same, as the model was shown them. hit: bool [B, N-1], whether each next token was
    the likeliest. step: int32 [], the number of the step that the batch belongs to.
    """
    counts = tracker["counts"]
    (rounds, slices), bins = counts["hits"].shape, counts["lengths"].shape[1]
    of_rows = _count_rows(batch, masked, place(hit, "batch"), slices, bins)  # whole rows
    of_rows = [jnp.where(batch.example[:, None] >= 0, counted, 0) for counted in of_rows]
    together = jnp.concatenate([batch.example[:, None], batch.epoch[:, None] % rounds, *of_rows], axis=1)
    together = place(together, None)  # all that devices tell each other, at once
    example, round = together[:, 0], together[:, 1]
    gain = jax.ops.segment_sum(together[:, 2:], round, rounds).astype(jnp.uint32)
    parts = jnp.split(gain, (slices, 2 * slices), axis=1)
    new = {name: counts[name] + part for name, part in zip(("hits", "targets", "lengths"), parts, strict=True)}
    if "examples" not in tracker:
        return {"counts": new | {"whole": counts["whole"]}}
    hits, targets = (jnp.sum(together[:, begin : begin + 2], axis=1) for begin in (2, 2 + slices))  # text, pii
    examples = {
        "hits": tracker["examples"]["hits"].at[example].add(hits.astype(jnp.uint32)),
        "targets": tracker["examples"]["targets"].at[example].add(targets.astype(jnp.uint32)),
        "first": first_memorized(tracker["examples"]["first"], example, (targets > 0) & (hits == targets), step),
    }
    whole = jnp.sum(examples["first"] >= 0, dtype=jnp.int32)
    return {"counts": new | {"whole": whole}, "examples": examples}


def _count_rows(batch: TaggedBatch, masked: MaskedBatch, hit, slices: int, bins: int) -> tuple:
    """Return hits and targets of each slice, int32 [B, slices], and runs by their length, int32 [B, bins], of each row."""
    origin, is_target = masked.origin[:, 1:], asked_targets(masked)
    is_true = is_target & (origin != SURROGATE)
    count = jax.vmap(slice_counts, in_axes=(0, 0, 0, None))
    of_slices = count(hit, is_target, origin, len(ORIGINS))
    if slices > len(ORIGINS):
        tag = jnp.take_along_axis(batch.tag, jnp.minimum(masked.source[:, 1:], batch.tag.shape[1] - 1), axis=1)
        of_tags = count(hit, is_true, tag - 1, slices - len(ORIGINS))
        of_slices = [jnp.concatenate(pair, axis=1) for pair in zip(of_slices, of_tags, strict=True)]
    return *of_slices, run_lengths(memorized(hit, is_true), masked.segment_ids[:, 1:], bins).histogram
