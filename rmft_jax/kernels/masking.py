"""Randomized masking of PII on the device: which spans are replaced, what stays, what comes instead.

Source: randomized masked fine-tuning (RMFT), Joshi & Smith, arXiv 2512.03310. There the corpus is rewritten once, before
training; here surrogates are drawn in the compiled step, afresh for each epoch, and the corpus stays as it is.

The order of things in `mask_batch`: a policy says which spans are replaced, an anchor rule which of their components stay
all the same, a draw what comes instead of the others, and `splice` puts it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmft_jax.kernels.splice import SurrogateBank, splice

TEXT, PII, SURROGATE = 0, 1, 2
_OCCURRENCES, _IDENTITIES = 0x6F63, 0x6964  # streams of random bits for policies


class TaggedBatch(NamedTuple):
    """Rows of packed documents with their PII spans, as `prepare` tagged them. All int32.

    Slot 0 of the component and span arrays means "none". Spans consist of components (the words, separators, ... of an
    address); every token of a span belongs to one component.

    tokens, segment_ids, component: [B, W]; segment 0 = padding, documents count from 1 in each row.
    component_begin: [B, C], the row position of a component's first token; -1 = before this row.
    component_kind, component_span, component_index: [B, C]; the index counts within the span.
    component_value: [B, C], a hash of the component's text in lower case. All components of a span are there, also those
        without a token in this row.
    component_sharers: [B, C], how many identities of the corpus have this component (same kind, same value); 0 for that
        component of each span which the fewest share.
    span_rank: [B, S], 0 = the first occurrence of this value in the corpus. span_count: [B, S], all its occurrences.
    span_type, span_identity: [B, S]; equal values share an identity.
    span_id: [B, S], what draws depend on: spans of one id get one surrogate. Usually every occurrence has its own.
    span_end: [B, S], the row position of the last token; -1 when the span does not lie in this row as a whole.
    epoch: [B], how often the row has been visited before.
    example: [B], the number of the row among the rows of an epoch; below 0, counted from the end of all rows, where it is of
        a corpus that is mixed in. tag: [B, W], tokens to be counted apart, 0 = none. Masking looks at neither of the two.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    component: jax.Array
    component_begin: jax.Array
    component_kind: jax.Array
    component_span: jax.Array
    component_index: jax.Array
    component_value: jax.Array
    component_sharers: jax.Array
    span_rank: jax.Array
    span_count: jax.Array
    span_type: jax.Array
    span_identity: jax.Array
    span_id: jax.Array
    span_end: jax.Array
    epoch: jax.Array
    example: jax.Array
    tag: jax.Array


class MaskedBatch(NamedTuple):
    """What the model is shown.

    tokens, segment_ids: int32 [B, N]; origin: int32 [B, N], TEXT, PII (true, or what a replaced span kept) or SURROGATE.
    source: int32 [B, N], the position in the tagged row that each token stands for; W = padding.
    shown: bool [B, S], True where a true PII value stands in the row as a whole.
    cut: int32 [B], tokens that surrogates pushed out of the row.
    asked: bool [B, N], for a masked language model: the tokens that it is to guess; None for one that reads left to right.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    origin: jax.Array
    source: jax.Array
    shown: jax.Array
    cut: jax.Array
    asked: jax.Array | None = None


class Rule(NamedTuple):
    """How the spans of one PII type are treated; static under `jit`.

    policy: a name in POLICIES. p: bernoulli's probability of replacement. k: cap's number of true showings.
    anchor: what stays of a replaced span. random: one component class, drawn uniformly (RMFT). none: nothing.
        shared: every component that at least `shared_by` identities have, but never the one that the fewest have.
    replacement: surrogate | placeholder (such as [EMAIL] for the whole span).
    stock: where surrogates come from. invented: strings that the corpus' values do not have. recombined: the components of
        other values of the corpus, where the kind allows it; a combination that is a real value gives way to invented ones.
        look_alike: the same, but without the components that one value alone has, for which strings like them stand.
    fresh: draw other surrogates each epoch; False = the same ones for the whole training.
    """

    policy: str = "keep_first"
    p: float = 0.5
    k: int = 1
    anchor: str = "random"
    shared_by: int = 10
    replacement: str = "surrogate"
    stock: str = "invented"
    fresh: bool = True


class Spans(NamedTuple):
    """What a policy may look at: int32 [S] each but for epoch, int32 [], and the uniform bits, uint32 [S].

    occurrence_bits: one draw for each epoch and span id. identity_bits: one for each epoch and identity.
    """

    rank: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple.count, which nobody calls here
    epoch: jax.Array
    occurrence_bits: jax.Array
    identity_bits: jax.Array


# A policy says which spans are replaced: bool [S] from Spans and a Rule. Each is a line or two over the same splice.
POLICIES: dict[str, Callable[[Spans, Rule], jax.Array]] = {
    "none": lambda spans, rule: jnp.zeros_like(spans.rank, bool),
    "all": lambda spans, rule: jnp.ones_like(spans.rank, bool),
    # RMFT: the first occurrence in the corpus stays, in every epoch
    "keep_first": lambda spans, rule: spans.rank > 0,
    # one occurrence stays, another one each epoch
    "keep_random": lambda spans, rule: spans.rank != uniform_below(spans.identity_bits, jnp.minimum(spans.count, 65535)),
    "bernoulli": lambda spans, rule: spans.occurrence_bits < jnp.uint32(min(rule.p * 2**32, 2**32 - 1)),
    # at most k true showings of an identity over the whole training
    "cap": lambda spans, rule: spans.epoch * spans.count + spans.rank >= rule.k,
}
ANCHORS = ("random", "none", "shared")
REPLACEMENTS = ("surrogate", "placeholder")
STOCKS = ("invented", "recombined", "look_alike")


def uniform_below(bits: jax.Array, n: jax.Array) -> jax.Array:
    """Map uniform uint32 bits to integers below n (n < 65,536) as floor(bits n / 2^32), without 64-bit arithmetic."""
    n = n.astype(jnp.uint32)
    high, low = bits >> 16, bits & 0xFFFF
    return ((high * n + ((low * n) >> 16)) >> 16).astype(jnp.int32)


def replaced_spans(key, row, rules: tuple[Rule, ...]) -> jax.Array:
    """Return bool [S]: which spans of one row of a TaggedBatch are replaced. rules: one for each PII type."""

    def bits(stream: int, ids):
        stream_key = jax.random.fold_in(jax.random.fold_in(key, row.epoch), stream)
        return jax.vmap(lambda id: jax.random.bits(jax.random.fold_in(stream_key, id), dtype=jnp.uint32))(ids)

    spans = Spans(
        row.span_rank, row.span_count, row.epoch, bits(_OCCURRENCES, row.span_id), bits(_IDENTITIES, row.span_identity)
    )
    return _by_type(row.span_type, rules, lambda rule: POLICIES[rule.policy](spans, rule))


def draw_surrogates(key, row, bank: SurrogateBank, *, fresh: bool = True, kind=None) -> tuple[jax.Array, jax.Array]:
    """Draw the anchor of each span and the bank row of each component in one row of a TaggedBatch.

    A draw depends on the key, the epoch (if `fresh`) and the span's id alone, so neither the mesh, nor the hosts, nor the
    batch, nor the place where a block was cut changes it: both halves of a span cut by a border get the same surrogate.

    kind: int32 [C], the table to draw from for each component, its own unless said.
    Returns: anchor int32 [S], uniform over the anchor classes of the span's type; row int32 [C], uniform over the bank.
    """
    bank = SurrogateBank(*map(jnp.asarray, bank))
    kind = row.component_kind if kind is None else kind
    key = jax.random.fold_in(key, row.epoch if fresh else 0)
    span_keys = jax.vmap(lambda id: jax.random.fold_in(key, id))(row.span_id)
    anchor_bits = jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(span_keys)
    anchor = uniform_below(anchor_bits, bank.anchors[row.span_type])
    entry_bits = jax.vmap(lambda k, i: jax.random.bits(jax.random.fold_in(k, i), dtype=jnp.uint32))(
        span_keys[row.component_span], row.component_index
    )
    return anchor, uniform_below(entry_bits, bank.counts[kind])


def replaced_components(row, replaced, anchor, bank: SurrogateBank, rules: tuple[Rule, ...]) -> jax.Array:
    """Return bool [C]: components of replaced spans (bool [S]), but for literal text and what the anchor rule keeps.

    A placeholder takes the whole span, literal text and all.
    """
    kind, span = row.component_kind, row.component_span
    type = row.span_type[span]

    def stays(rule: Rule):
        if rule.replacement == "placeholder":
            return jnp.zeros_like(kind, bool)
        anchored = {
            "random": (bank.anchors[type] > 0) & (bank.anchor_class[kind] == anchor[span]),
            "none": jnp.zeros_like(kind, bool),
            "shared": row.component_sharers >= rule.shared_by,
        }
        return (kind == 0) | anchored[rule.anchor]

    return replaced[span] & (span > 0) & ~_by_type(type, rules, stays)


def choose_surrogates(key, row, replaced, bank: SurrogateBank, rules: tuple[Rule, ...]):
    """Return what stands for each component of the replaced spans (bool [S]) of one row of a TaggedBatch.

    Returns: kind int32 [C] and entry int32 [C], the bank's table and the row in it; bool [C], which components are replaced.
    """
    kind, span = row.component_kind, row.component_span
    type = row.span_type[span]

    def draw(kind):
        fresh = [rule.fresh for rule in rules]
        return _by_type((row.span_type, type), fresh, lambda f: draw_surrogates(key, row, bank, fresh=f, kind=kind))

    def has(field: str, value: str):
        return _by_type(type, [getattr(rule, field) == value for rule in rules], lambda has: jnp.full_like(kind, has, bool))

    anchor, entry = draw(kind)
    replaced = replaced_components(row, replaced, anchor, bank, rules)
    if any(rule.stock != "invented" for rule in rules):
        other_kind = jnp.where(has("stock", "look_alike"), bank.look_alike[kind], bank.recombined[kind])
        _, other = draw(other_kind)
        value = jnp.where(replaced, bank.values[bank.first[other_kind] + other], row.component_value)
        is_real = is_real_value(value, row.component_index, span, bank.real, spans=row.span_type.shape[0])
        take = ~has("stock", "invented") & ~is_real[span]
        kind, entry = jnp.where(take, other_kind, kind), jnp.where(take, other, entry)
    if any(rule.replacement == "placeholder" for rule in rules):
        whole = has("replacement", "placeholder")
        kind = jnp.where(whole, jnp.where(row.component_index == 0, bank.placeholder[type], bank.empty), kind)
        entry = jnp.where(whole, 0, entry)
    return kind, entry, replaced


def is_real_value(value, index, span, real, *, spans: int) -> jax.Array:
    """Return bool [S]: which spans consist of components that together make up a real value.

    value, index, span: int32 [C], as in a TaggedBatch. real: uint32 [R], sorted, the `span_values` of all real values. These
    are hashes of 32 bits: one in 2^32 / R other values is taken for real, a real one always is.
    """
    found = span_values(value, index, span, spans=spans)
    at = jnp.minimum(jnp.searchsorted(real, found), real.shape[0] - 1)
    return real[at] == found


def span_values(value, index, span, *, spans: int) -> jax.Array:
    """Return uint32 [S]: a hash of the components of each span and of their order, from their own hashes.

    value, index, span: int32 [C], as in a TaggedBatch.
    """
    x = value.astype(jnp.uint32) ^ ((index.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return jax.ops.segment_sum(x ^ (x >> 16), span, num_segments=spans)


def mask_batch(
    batch: TaggedBatch, bank: SurrogateBank, key, *, length: int, rules: Rule | tuple[Rule, ...]
) -> MaskedBatch:
    """Replace PII in a batch of tagged rows; runs under `jit`, on any sharding of the batch.

    Args:
      batch: the rows as tagged, W tokens wide.
      bank: the surrogates.
      key: a `jax.random.key`, the same for the whole run.
      length: N, the width of the result.
      rules: one Rule for all PII types, or one for each.

    Raises: KeyError for an unknown policy or anchor.
    """
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    bank = SurrogateBank(*map(jnp.asarray, bank))
    if all(rule.policy == "none" for rule in rules):
        return _unmasked(batch, length)

    def one(row: TaggedBatch) -> MaskedBatch:
        valid = row.segment_ids > 0
        is_replaced_span = replaced_spans(key, row, rules)
        kind, entry, replaced = choose_surrogates(key, row, is_replaced_span, bank, rules)
        spliced = splice(
            row.tokens, valid, row.component, row.component_begin, kind, replaced, entry, bank, length=length
        )
        at = jnp.minimum(spliced.source, row.tokens.shape[0] - 1)
        inside = spliced.source < row.tokens.shape[0]
        component = row.component[at]
        origin = jnp.where(replaced[component], SURROGATE, jnp.where(component > 0, PII, TEXT))
        shown = ~is_replaced_span & (row.span_end >= 0) & (spliced.ends[row.span_end] <= length)
        return MaskedBatch(
            tokens=spliced.tokens,
            segment_ids=jnp.where(inside, row.segment_ids[at], 0),
            origin=jnp.where(inside, origin, TEXT),
            source=spliced.source,
            shown=shown,
            cut=jnp.maximum(spliced.ends[-1] - length, 0),
        )

    return jax.vmap(one)(batch)


def _by_type(type, settings, value: Callable):
    """Return value(setting) for the setting of each type, computed once for each different setting.

    type: int32 [n], or a tuple of such where `value` returns a tuple. settings: one for all types, or one for each.
    """
    groups: dict = {}
    for number, setting in enumerate(settings):
        groups.setdefault(setting, []).append(number)
    (first, _), *others = groups.items()
    out = value(first)
    for setting, numbers in others:
        is_one = jax.tree.map(lambda t, numbers=numbers: jnp.isin(t, jnp.array(numbers)), type)
        out = jax.tree.map(jnp.where, is_one, value(setting), out)
    return out


def _unmasked(batch: TaggedBatch, length: int) -> MaskedBatch:
    """Return the rows as they are, padded or cut to `length`: what any policy gives when it replaces nothing."""
    width = batch.tokens.shape[1]
    valid = batch.segment_ids > 0

    def fit(array, missing=0):
        array = jnp.where(valid, array, missing)
        return jnp.pad(array, ((0, 0), (0, max(0, length - width))), constant_values=missing)[:, :length]

    return MaskedBatch(
        tokens=fit(batch.tokens),
        segment_ids=fit(batch.segment_ids),
        origin=fit(jnp.where(batch.component > 0, PII, TEXT)),
        source=fit(jnp.arange(width, dtype=jnp.int32), width),
        shown=(batch.span_end >= 0) & (batch.span_end < length),
        cut=jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32) - length, 0),
    )
