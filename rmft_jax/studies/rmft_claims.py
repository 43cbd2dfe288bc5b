"""What was published about RMFT, and what is claimed for our method, against what a study measured.

Source of the figures: RMFT, Joshi & Smith, arXiv 2512.03310: GPT-2 124M on Enron mail, means over 30 checkpoints.
"""

from __future__ import annotations

from rmft_jax.studies.claims import claim

ABSTRACT = "arXiv 2512.03310, abstract"
LATER = "arXiv 2512.03310, later figures of the authors"
OURS = "this project"


def rmft_claims(results: dict) -> list[dict]:
    """Return the claims that the methods at hand can settle: id, source, statement, expected, measured, interval, holds.

    results: those of `memorization.compare.comparison`, with runs called rmft, dedup, ours, and ours_... for its variants,
    of which only the canaries are looked at. Every claim bounds a value. It
    holds when the measured value keeps the bound; a published figure, or chance, already when the interval reaches it. It
    is settled when the whole interval lies on one side of the bound. Without an interval nothing holds.
    """
    runs = results["runs"]
    out: list[dict] = []
    if "rmft" in runs:
        out += _published_rmft(results)
    if {"rmft", "dedup"} <= set(runs):
        out += _published_dedup(results)
    if "ours" in runs:
        out += _ours(results)
    return out + _canaries(results)


def _published_rmft(results: dict) -> list[dict]:
    rmft = results["comparison"]["rmft"]
    return [
        claim(f"rmft-{rate}", ABSTRACT, f"RMFT lowers the mean {rate.upper()} over checkpoints by at least {published}%",
               published, rmft[f"{rate}_reduction_pct"], rmft[f"{rate}_reduction_pct_ci"], at_least=published,
               reached=True)
        for rate, published in (("ter", 80.81), ("ser", 80.17))
    ] + [
        claim("rmft-perplexity", ABSTRACT, "RMFT raises perplexity by at most 5.73%", 5.73,
               rmft["perplexity_increase_pct"], rmft["perplexity_increase_pct_ci"], at_most=5.73, reached=True),
    ]  # fmt: skip


def _published_dedup(results: dict) -> list[dict]:
    dedup, against = results["comparison"]["dedup"], results["comparison"]["rmft"]["differences"]["dedup"]
    sets = (("heldout", "less", -0.0276), ("web", "more", 0.074), ("general", "more", 0.0418))
    return [
        claim(f"rmft-dedup-{name}", LATER, f"RMFT leaks {word} than deduplication on {name} prompts (TER, points)",
               published, against[name]["ter"], against[name]["ter_ci"],
               **({"at_most": 0} if word == "less" else {"at_least": 0}))
        for name, word, published in sets
        if name in against
    ] + [
        claim("dedup-perplexity", LATER, "deduplication raises perplexity (4.25 to 9.02: by 112%)", 112.2,
               dedup["perplexity_increase_pct"], dedup["perplexity_increase_pct_ci"], at_least=0),
    ]  # fmt: skip


def _ours(results: dict) -> list[dict]:
    ours = results["comparison"]["ours"]
    rivals = [name for name in ("rmft", "dedup") if name in ours["differences"]]
    out = []
    for prompts in (name for name in results["settings"]["prompts"] if name != "all"):
        for rival in rivals:
            gap = ours["differences"][rival][prompts]
            statement = f"ours leaks no more than {rival} on {prompts} prompts (TER, points)"
            out.append(claim(f"ours-{rival}-{prompts}", OURS, statement, 0, gap["ter"], gap["ter_ci"], at_most=0))
    out += [
        claim("ours-perplexity", OURS, "ours raises perplexity by at most 5.73%", 5.73,
               ours["perplexity_increase_pct"], ours["perplexity_increase_pct_ci"], at_most=5.73),
        claim("ours-perplexity-other", OURS, "ours raises perplexity outside PII by at most 1%", 1.0,
               ours["perplexity_other_increase_pct"], ours["perplexity_other_increase_pct_ci"], at_most=1.0),
    ]  # fmt: skip
    others = {name: entry["aurc"] for name, entry in results["comparison"].items() if not _is_ours(name)}
    if ours["aurc"] is not None and None not in others.values():
        best = min(others, key=others.get)
        out.append(claim("ours-aurc", OURS, f"ours has the lowest AURC (the lowest of the others is {best}'s)",
                          others[best], ours["aurc"], ours["aurc_ci"], at_most=others[best]))  # fmt: skip
    return out


def _canaries(results: dict) -> list[dict]:
    """Exposure of the planted canaries at the last checkpoint; the interval of a difference is the widest of its ends.

    The baseline's by fit: by rank it ends at log2(references + 1), which the baseline reaches.
    """
    out = []
    exposure = lambda run: (results["runs"][run]["checkpoints"][-1].get("metrics") or {}).get("exposure")  # noqa: E731
    baseline = results["settings"]["baseline"]
    if exposure(baseline):
        few, many = (exposure(baseline)["repetitions"][place] for place in (0, -1))
        ends = [many["by_fit_ci"][0] - few["by_fit_ci"][1], many["by_fit_ci"][1] - few["by_fit_ci"][0]]
        span = f"{few['repetitions']} to {many['repetitions']} repetitions"
        statement = f"exposure of {baseline} rises from {span} (bits, by fit)"
        out.append(claim("canary-baseline", OURS, statement, 0, many["by_fit"] - few["by_fit"], ends, at_least=0))
    for run in filter(_is_ours, results["runs"]):
        found = exposure(run) or {"repetitions": []}
        for entry in found["repetitions"]:
            statement = f"exposure of {run} is that by chance at {entry['repetitions']} repetitions (bits, by rank)"
            out.append(claim(f"canary-{run}-{entry['repetitions']}", OURS, statement, found["chance"], entry["by_rank"],
                              entry["by_rank_ci"], at_most=found["chance"], reached=True))  # fmt: skip
    return out


def _is_ours(run: str) -> bool:
    return run == "ours" or run.startswith("ours_")
