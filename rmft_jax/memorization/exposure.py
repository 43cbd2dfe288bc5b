"""Exposure beyond the sampled references: a skew-normal fit of their log-perplexities, on the host."""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy import stats

CHANCE = 1 / math.log(2)
"""Mean exposure in bits of a value that the model knows nothing about: the mean of -log2 u, u uniform in (0, 1)."""


def exposure_by_fit(log_perplexity: float, references: np.ndarray, space_bits: float = math.inf) -> float:
    """Return -log2 cdf(log_perplexity) in bits, with the cdf of a skew-normal fitted to the references.

    It tells apart values that are all less perplexing than every sampled reference, but rests on the fit's tail.

    Args:
      log_perplexity: of the secret. references: float [R], R >= 2, of values drawn from the same space.
      space_bits: log2 of the size of the space, the most that an exposure can be (rank 1 among all values).
    Source: Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232.
    """
    references = np.asarray(references, np.float64)
    center, spread = references.mean(), references.std()
    if spread == 0:  # all references alike: there is no distribution to place the value in
        return space_bits if log_perplexity < center else 0.0
    standard = (references - center) / spread
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the optimizer tries parameters where the density is 0
        shape, location, scale = stats.skewnorm.fit(standard)
        log_cdf = float(stats.skewnorm.logcdf((log_perplexity - center) / spread, shape, location, scale))
    if math.isnan(log_cdf):
        log_cdf = -math.inf  # in the far tail the cdf is lost in rounding
    return float(min(max(-log_cdf / math.log(2), 0.0), space_bits))
