"""Pure, jittable array functions, usable in any JAX program: they import nothing of rmft_jax outside this room."""

from rmft_jax.kernels.attention import (
    attention,
    causal_attention,
    causal_mask,
    document_mask,
    document_positions,
    rotary,
    rotary_angles,
)
from rmft_jax.kernels.contrastive import contrastive_loss
from rmft_jax.kernels.cross_entropy import CrossEntropy, cross_entropy, target_mask, token_nll
from rmft_jax.kernels.deja_vu import (
    Scores,
    aucg,
    neighbour_objects,
    object_scores,
    population_gap,
    recall_survival,
    sample_gaps,
)
from rmft_jax.kernels.early_learning import (
    TopTargets,
    average_weights,
    clipped_softmax,
    early_learning_penalty,
    elr_loss,
    elr_update_target,
    kl_loss,
    mixup,
    top_penalty,
    top_targets,
    update_top_targets,
)
from rmft_jax.kernels.exposure import exposure_by_rank
from rmft_jax.kernels.extraction_scores import (
    all_hit,
    extraction_strength,
    filtered_log_prob,
    n_p_discoverable,
    queries_needed,
)
from rmft_jax.kernels.fingerprint import fingerprint
from rmft_jax.kernels.fused_attention import FUSED_ATTENTION, fused_attention, why_not_fused
from rmft_jax.kernels.goldfish import GOLDFISH, goldfish_mask, window_hash
from rmft_jax.kernels.importance import importance_weighted_log_likelihood, logmeanexp, m_score
from rmft_jax.kernels.influence import (
    conjugate_gradients,
    exact_solver,
    gauss_newton_product,
    hessian_product,
    influence,
    kernel_self_influence,
    lissa,
    self_influence,
    tangent_kernel,
)
from rmft_jax.kernels.inverted_file import InvertedFile, build_inverted_file, search_inverted_file
from rmft_jax.kernels.masking import (
    PII,
    POLICIES,
    SURROGATE,
    TEXT,
    MaskedBatch,
    Rule,
    Spans,
    TaggedBatch,
    choose_surrogates,
    draw_surrogates,
    is_real_value,
    mask_batch,
    replaced_components,
    replaced_spans,
    span_values,
    uniform_below,
)
from rmft_jax.kernels.membership import (
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    reference_score,
    vocabulary_statistics,
    zlib_score,
)
from rmft_jax.kernels.memorization import Runs, example_counts, first_memorized, memorized, run_lengths, slice_counts
from rmft_jax.kernels.neighbours import Neighbours, nearest_neighbours
from rmft_jax.kernels.retrieval import (
    Datastore,
    Retrieved,
    delete,
    interpolate,
    knn_guided_loss,
    knn_probabilities,
    knn_probability,
    neural_demonstrations,
    retrieve,
)
from rmft_jax.kernels.splice import Spliced, SurrogateBank, splice, splice_reference

__all__ = [
    "CrossEntropy", "Datastore", "FUSED_ATTENTION", "GOLDFISH", "InvertedFile", "MaskedBatch", "Neighbours",
    "PII", "POLICIES", "Retrieved", "Rule", "Runs", "SURROGATE", "Scores", "Spans", "Spliced", "SurrogateBank", "TEXT",
    "TaggedBatch", "TopTargets", "all_hit", "attention", "aucg", "average_weights", "build_inverted_file",
    "causal_attention", "causal_mask", "choose_surrogates", "clipped_softmax", "conjugate_gradients",
    "contrastive_loss", "cross_entropy", "delete", "document_mask", "document_positions", "draw_surrogates",
    "early_learning_penalty", "elr_loss", "elr_update_target", "exact_solver", "example_counts", "exposure_by_rank",
    "extraction_strength", "filtered_log_prob", "fingerprint", "first_memorized", "fused_attention",
    "gauss_newton_product", "goldfish_mask", "hessian_product", "importance_weighted_log_likelihood", "influence",
    "interpolate", "is_real_value", "kernel_self_influence", "kl_loss", "knn_guided_loss", "knn_probabilities",
    "knn_probability", "lissa", "logmeanexp", "loss_score", "m_score", "mask_batch", "memorized",
    "min_k_plus_plus_score", "min_k_score", "mixup", "n_p_discoverable", "nearest_neighbours", "neighbour_objects",
    "neural_demonstrations", "object_scores", "population_gap", "queries_needed", "recall_survival", "reference_score",
    "replaced_components", "replaced_spans", "retrieve", "rotary", "rotary_angles", "run_lengths", "sample_gaps",
    "search_inverted_file", "self_influence", "slice_counts", "span_values", "splice", "splice_reference",
    "tangent_kernel", "target_mask", "token_nll", "top_penalty", "top_targets", "uniform_below", "update_top_targets",
    "vocabulary_statistics", "why_not_fused", "window_hash", "zlib_score",
]  # fmt: skip
