"""What was published of early-learning regularization, and what small runs showed before, against what a study measured.

Source of the published figures: Liu et al. 2020, arXiv 2007.00151, tables 1 and 2. A claim holds if every seed keeps its
bound.
"""

from __future__ import annotations

from rmft_jax.studies.parts import claim_over_seeds

SOURCE = "arXiv 2007.00151"
THEOREM = f"{SOURCE}, theorem 1"
EXPECTED = "expected at this scale"

# CIFAR-10 under ResNet-34, by noise, share and method: test accuracy.
PUBLISHED = {
    ("symmetric", 0.2, "ce"): 0.8698, ("symmetric", 0.4, "ce"): 0.8188, ("symmetric", 0.6, "ce"): 0.7414,
    ("symmetric", 0.8, "ce"): 0.5382, ("symmetric", 0.2, "elr"): 0.9116, ("symmetric", 0.4, "elr"): 0.8915,
    ("symmetric", 0.6, "elr"): 0.8612, ("symmetric", 0.8, "elr"): 0.7386, ("asymmetric", 0.4, "ce"): 0.8011,
    ("asymmetric", 0.4, "elr"): 0.9012, ("symmetric", 0.2, "elr_plus"): 0.946, ("symmetric", 0.5, "elr_plus"): 0.938,
    ("symmetric", 0.8, "elr_plus"): 0.911, ("symmetric", 0.9, "elr_plus"): 0.752,
}  # fmt: skip

# Digits, by share of symmetric noise and method: what is bounded, the bound, what was measured before.
_DIGITS = {
    (0.4, "ce"): (("final", "at_most", 0.80, 0.74), ("best", "at_least", 0.90, 0.93)),
    (0.4, "elr"): (("final", "at_least", 0.94, 0.98),),
    (0.8, "ce"): (("final", "at_most", 0.45, 0.36), ("best", "at_least", 0.65, 0.72)),
    (0.8, "elr"): (("final", "at_least", 0.85, 0.91),),
    (0.8, "kl"): (("final", "at_most", 0.45, 0.35),),
}
_WORDS = {"final": "test accuracy at the end", "best": "best test accuracy", "at_most": "at most", "at_least": "at least"}


def linear_claims(seeds: list[dict]) -> list[dict]:
    """Return the three parts of theorem 1 as claims, and what ELR does to the third."""
    values = lambda name: [found[name] for found in seeds]  # noqa: E731
    rise = [found["wrong_true_peak"] - found["wrong_true_start"] for found in seeds]
    return [
        claim_over_seeds("linear-correlation", THEOREM, "1: early on, correlation of -gradient and v (lowest)", 1 / 6,
                         values("correlation"), at_least=1 / 6),
        claim_over_seeds("linear-rise", THEOREM, "1: accuracy on wrongly labelled points rises above its start, by", 0, rise,
                         at_least=0.05),
        claim_over_seeds("linear-peak", EXPECTED, "1: its peak", 0.95, values("wrong_true_peak"), at_least=0.95),
        claim_over_seeds("linear-clean", THEOREM, "2: squared residual of right labels changes in the early stage by", -0.05,
                         values("clean_change"), at_most=-0.05),
        claim_over_seeds("linear-wrong", THEOREM, "2: squared residual of wrong labels changes by", 0.05,
                         values("wrong_change"), at_least=0.05),
        claim_over_seeds("linear-memorized", THEOREM, "3: share of wrong labels fitted in the end", 1, values("memorized"),
                         at_least=0.99),
        claim_over_seeds("linear-elr", EXPECTED, "share of wrong labels fitted in the end with ELR", 0,
                         values("memorized_elr"), at_most=0.05),
    ]  # fmt: skip


def set_claims(name: str, found: dict) -> list[dict]:
    """Return the claims on one set of images: ELR against cross entropy under one noise, and figures to compare with."""
    out, arms = [], found["arms"]
    by_noise: dict[tuple, dict] = {}
    for arm, result in arms.items():
        chosen = result["settings"]
        noise = (chosen["noise"], chosen["share"])
        by_noise.setdefault(noise, {})[chosen["method"]] = result
        out += _figures(name, arm, found, noise, chosen["method"], result)
    for (noise, share), methods in by_noise.items():
        where, words = f"{name}-{noise}-{share:g}", f"{name}, {share:.0%} {noise} noise"
        if "ce" not in methods:
            continue
        plain = methods["ce"]
        lost = _difference(plain["best"], plain["final"])
        out.append(claim_over_seeds(f"{where}-ce-memorizes", SOURCE, f"{words}: cross entropy loses accuracy after its best",
                                    0, lost, at_least=0))  # fmt: skip
        for method in ("elr", "elr_plus"):
            if method in methods:
                label = method.replace("_plus", "+").upper()
                out += [
                    claim_over_seeds(f"{where}-{method}", SOURCE, f"{words}: {label} above cross entropy in the end, by", 0,
                                     _difference(methods[method]["final"], plain["final"]), at_least=0),
                    claim_over_seeds(f"{where}-{method}-memorized", SOURCE, 
                                     f"{words}: {label} memorizes fewer wrong labels, by", 0,
                                     _difference(plain["memorized"], methods[method]["memorized"]), at_least=0),
                ]  # fmt: skip
        if {"kl", "elr"} <= set(methods):
            gain = _difference(methods["elr"]["final"], methods["kl"]["final"])
            statement = f"{words}: the KL control below ELR in the end, by"
            out.append(claim_over_seeds(f"{where}-kl", SOURCE, statement, 0, gain, at_least=0))
    return out


def _figures(name: str, arm: str, found: dict, noise: tuple, method: str, result: dict) -> list[dict]:
    if found["images"] == "cifar10" and found["model"] == "resnet34" and (*noise, method) in PUBLISHED:
        published = PUBLISHED[(*noise, method)]
        return [claim_over_seeds(f"{name}-{arm}-published", SOURCE, f"{name}, {arm}: test accuracy at the end", published,
                                 result["final"]["values"], at_least=published - 0.01)]  # fmt: skip
    if found["images"] != "digits" or noise[0] != "symmetric":
        return []
    return [
        claim_over_seeds(f"{name}-{arm}-{figure}", EXPECTED,
                         f"{name}, {arm}: {_WORDS[figure]} {_WORDS[side]} {bound}", expected,
                         result[figure]["values"], **{side: bound})
        for figure, side, bound, expected in _DIGITS.get((noise[1], method), ())
    ]  # fmt: skip


def _difference(a: dict, b: dict) -> list[float]:
    return [x - y for x, y in zip(a["values"], b["values"], strict=True)]
