"""What follows from the curves of `studies.scaling`: T(N, tau), power laws, forgetting, the loss law, and the claims.

A part, as `studies.scaling` writes it for each experiment, size and group of arms, has: parameters,
training_tokens, blocks, sequence_length, learning_rate, seconds, and arms: name -> passes, spacing,
and members, a list with for each seed
  m: M of each epoch, teacher forced, each token by the model before the update it takes part in. So m[e] is M after every
    training token has been seen e times, up to the position within the epoch.
  slices: the same for each slice of the tracker. unit_mean, unit_longest: of the runs of memorized tokens of each epoch;
    unit_histogram: that of the last epoch.
  t_update: for each tau the first update at which the mean of M over it and the four before reaches tau, None if never.
  sets: for each scored set epochs (so far), ordinary (false after a special batch), nll (nats a token), m, nll_pii, m_pii,
    spans_whole (the share of PII values of which every token is the likeliest one).

Source of the published figures: Tirumala et al. 2022, arXiv 2205.10770.
"""

from __future__ import annotations

import platform
from importlib import metadata

import jax
import numpy as np
from scipy.optimize import least_squares

from rmft_jax.config import Config
from rmft_jax.studies.claims import claim

SCHEMA = 1
SOURCE = "arXiv 2205.10770"
PUBLISHED_SLOPE = -0.75  # of log T(N, 0.9) over log N, from 125M to 13B
_DRAWS = 1000


def updates_until(m: np.ndarray, taus: tuple, window: int = 5) -> dict[str, int | None]:
    """Return for each tau the first update, counted from 1, at which the mean of M over the last `window` reaches it.

    m: [updates]. Source: T_update of Tirumala et al. 2022, arXiv 2205.10770.
    """
    if len(m) < window:
        return {f"{tau:g}": None for tau in taus}
    smooth = np.convolve(m, np.ones(window) / window, mode="valid")
    first = {tau: np.flatnonzero(smooth >= tau) for tau in taus}
    return {f"{tau:g}": int(found[0]) + window if len(found) else None for tau, found in first.items()}


def times_until(m: list[float], tau: float) -> tuple[int | None, float | None]:
    """Return T(N, tau), the fewest times each training token has been seen until M >= tau, and the same between epochs.

    m: M after 0, 1, 2, ... times. The second figure takes M as linear between two of them. None, None if never.
    """
    reached = np.flatnonzero(np.asarray(m) >= tau)
    if not len(reached):
        return None, None
    at = int(reached[0])
    if at == 0:
        return 0, 0.0
    return at, at - 1 + (tau - m[at - 1]) / (m[at] - m[at - 1])


def before_overfitting(member: dict) -> tuple[int, float] | None:
    """Return the first epoch, from 1, whose held-out loss rises, and M in it; None if it never does.

    Source: Tirumala et al. 2022. The loss is that after each epoch of training text.
    """
    scored = member["sets"]["heldout"]
    last: dict[int, float] = {}
    for epochs, nll in zip(scored["epochs"], scored["nll"], strict=True):
        last[round(epochs)] = nll
    for epoch in sorted(last)[1:]:
        if last[epoch] > last.get(epoch - 1, np.inf) and epoch <= len(member["m"]):
            return epoch, member["m"][epoch - 1]
    return None


def power_law(sizes: np.ndarray, times: list[np.ndarray], *, to: float = 0.0) -> dict | None:
    """Fit log T = log a - b log N by least squares; intervals by drawing seeds of each size anew.

    sizes: parameters [sizes]; times: T of the seeds of each size. to: a size to predict T for, 0 = none. Returns slope (-b),
    slope_ci and scale (a), and with `to` predicted and predicted_ci, all at 95%; None with fewer than two sizes.
    """
    if len(sizes) < 2 or any(len(t) == 0 for t in times):
        return None
    x, rng = np.log(sizes), np.random.default_rng(0)

    def fit(groups):
        where = np.concatenate([np.full(len(group), value) for group, value in zip(groups, x, strict=True)])
        slope, start = np.polyfit(where, np.log(np.concatenate(groups)), 1)
        return slope, start, np.exp(start + slope * np.log(to)) if to else np.nan

    found = fit(times)
    drawn = np.array([fit([rng.choice(group, len(group)) for group in times]) for _ in range(_DRAWS)])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    out = {"slope": found[0], "slope_ci": [low[0], high[0]], "scale": float(np.exp(found[1]))}
    return out | ({"predicted": found[2], "predicted_ci": [low[2], high[2]]} if to else {})


def loss_law(size: np.ndarray, tokens: np.ndarray, loss: np.ndarray, group: np.ndarray) -> dict | None:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to held-out losses, in nats a token.

    size, tokens, loss: [points]; group: [points], which member each comes from; intervals by drawing members anew. The
    errors of log L are minimised under a Huber loss of 0.001, from several starts: Hoffmann et al. 2022, arXiv 2203.15556,
    approach 3. Returns E, A, alpha, B, beta, alpha_ci, beta_ci, rms (of log L) and points; None with fewer than three sizes.
    """
    if len(np.unique(size)) < 3:
        return None
    logs = np.log(size), np.log(tokens), np.log(loss)

    def residuals(p, n, d, y):
        return np.logaddexp(np.logaddexp(p[0], p[1] - p[2] * n), p[3] - p[4] * d) - y

    def fit(starts, *data):
        found = [least_squares(residuals, start, args=data, loss="huber", f_scale=1e-3, max_nfev=300) for start in starts]
        return min(found, key=lambda result: result.cost)

    powers = ((3.0, 0.3), (6.0, 0.6))
    starts = [(e, *by_size, *by_tokens) for e in (-1.0, 0.5) for by_size in powers for by_tokens in powers]
    best, rng, names = fit(starts, *logs), np.random.default_rng(0), np.unique(group)
    drawn = []
    for _ in range(100):
        chosen = np.concatenate([np.flatnonzero(group == name) for name in rng.choice(names, len(names))])
        if len(np.unique(size[chosen])) >= 3:
            drawn.append(fit([best.x], *(x[chosen] for x in logs)).x)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    e, a, alpha, b, beta = best.x
    return {
        "E": np.exp(e), "A": np.exp(a), "alpha": alpha, "alpha_ci": [low[2], high[2]], "B": np.exp(b), "beta": beta,
        "beta_ci": [low[4], high[4]], "rms": float(np.sqrt(np.mean(residuals(best.x, *logs) ** 2))), "points": len(loss),
    }  # fmt: skip


def mean_interval(values: list[float]) -> dict | None:
    """Return values, mean and mean_ci, its 95% interval by Student's t over seeds (null with one); None without values."""
    from scipy.stats import t

    if not values or any(value is None for value in values):
        return None
    mean, count = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
    ends = None if half is None else [mean - half, mean + half]
    return {"mean": mean, "mean_ci": ends, "values": [float(value) for value in values]}


def scaling_results(parts: list[dict], config: Config, *, planned: int, command: str) -> dict:
    """Return the content of results.json: experiments (the parts), findings (what follows from them) and claims."""
    experiments: dict[str, dict] = {}
    for part in parts:
        place = experiments.setdefault(part["experiment"], {}).setdefault(part["size"], {"arms": {}, "seconds": 0.0})
        place |= {name: value for name, value in part.items() if name not in ("arms", "seconds", "experiment", "size")}
        place["arms"] |= part["arms"]
        place["seconds"] += part["seconds"]
    experiments = {
        name: dict(sorted(sizes.items(), key=lambda item: item[1]["parameters"])) for name, sizes in experiments.items()
    }
    taus = config.study.scaling.taus
    findings = {name: _findings(sizes, taus) for name, sizes in experiments.items()}
    results = {
        "schema": SCHEMA,
        "command": command,
        "study": {"name": "scaling", "parts": len(parts), "planned_parts": planned, "seeds": config.study.seeds},
        "environment": {
            "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)",
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "numpy")},
        },
        "taus": list(taus),
        "findings": findings,
        "experiments": experiments,
    }
    return results | {"claims": scaling_claims(findings, experiments)}


def _findings(sizes: dict, taus: tuple) -> dict:
    """Return what one experiment shows: for each arm its sizes, and across them the fits."""
    out: dict[str, dict] = {}
    for arm in dict.fromkeys(arm for size in sizes.values() for arm in size["arms"]):
        of_sizes = {name: _of_size(size, size["arms"][arm], taus) for name, size in sizes.items() if arm in size["arms"]}
        out[arm] = {"sizes": of_sizes, "power_laws": _power_laws(of_sizes, taus), "loss_law": _loss_law(sizes, arm)}
    return out


def _of_size(size: dict, arm: dict, taus: tuple) -> dict:
    members, times = arm["members"], {}
    for tau in taus:
        found = [times_until(member["m"], tau) for member in members]
        updates = [member["t_update"][f"{tau:g}"] for member in members]
        times[f"{tau:g}"] = {
            "epochs": [whole for whole, _ in found],
            "between": mean_interval([between for _, between in found]),
            "updates": mean_interval(updates),
        }
    over = [before_overfitting(member) for member in members]
    out = {
        "parameters": size["parameters"],
        "passes": arm["passes"],
        "spacing": arm["spacing"],
        "times": times,
        "before_overfitting": mean_interval([found[1] if found else None for found in over]),
        "overfitting_epoch": mean_interval([found[0] if found else None for found in over]),
        "heldout_nll_best": mean_interval([min(member["sets"]["heldout"]["nll"]) for member in members]),
        "last_m": mean_interval([member["m"][-1] for member in members]),
        "units_at": {f"{tau:g}": _units(members, tau) for tau in taus},
    }
    out["curves"] = _curves(members)
    if "special" in members[0]["sets"]:
        out["forgetting"] = {
            name: mean_interval([_after(member["sets"]["special"], arm["spacing"])[name] for member in members])
            for name in ("before", "at_once", "baseline", "end")
        }
    if "training" in members[0]["sets"]:
        last = lambda set, key: mean_interval([member["sets"][set][key][-1] for member in members])  # noqa: E731
        out["pii"] = {
            "m": last("training", "m_pii"), "values_whole": last("training", "spans_whole"),
            "heldout_m": last("heldout", "m_pii"), "heldout_values_whole": last("heldout", "spans_whole"),
            "heldout_nll": last("heldout", "nll"),
        }  # fmt: skip
    return out


def _curves(members: list[dict]) -> dict:
    """Return what is drawn: x, and the mean, least and greatest value over seeds, to the end of the shortest run."""

    def over_seeds(x: list, series: list[list]) -> dict:
        length = min(map(len, series))
        values = np.array([one[:length] for one in series], float)  # null becomes nan
        parts = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
        return {"x": x[:length], **{name: [float(v) if v == v else None for v in row] for name, row in parts.items()}}

    epochs = list(range(max(len(member["m"]) for member in members)))
    out = {name: over_seeds(epochs, [member[name] for member in members]) for name in ("m", "unit_mean")}
    for name in members[0]["slices"]:
        if name not in ("text", "surrogate"):
            out[f"m_{name}"] = over_seeds(epochs, [member["slices"][name] for member in members])
    for name, scored in members[0]["sets"].items():
        for key in ("nll", "m", "m_pii", "spans_whole"):
            x = scored["epochs"] if name != "special" else list(range(len(scored["epochs"])))
            if any(value is not None for value in scored[key]):
                out[f"{name}_{key}"] = over_seeds(x, [member["sets"][name][key] for member in members])
    return out


def _units(members: list[dict], tau: float) -> dict | None:
    """Return the mean length of memory units in the first epoch with M >= tau."""
    found = [times_until(member["m"], tau)[0] for member in members]
    if None in found:
        return None
    return mean_interval([member["unit_mean"][at] for member, at in zip(members, found, strict=True)])


def _after(special: dict, spacing: float) -> dict:
    """Return M of the special batch before it was shown, right after, at its lowest from then on (the forgetting baseline)
    and at the end; of a member that was shown none, from the round on at which passes without spacing are over."""
    shown = [n for n, ordinary in enumerate(special["ordinary"]) if not ordinary]
    if not shown:
        return dict.fromkeys(("before", "at_once", "baseline", "end"))
    m, first, last = special["m"], shown[0], shown[-1]
    if not spacing:  # later rounds are those of members that are shown it again and again
        last = next(n for n in shown if n + 1 not in shown)
    return {"before": m[first - 1], "at_once": m[last], "baseline": min(m[last:]), "end": m[-1]}


def _power_laws(sizes: dict, taus: tuple) -> dict:
    """Return for each tau the fit over all sizes that reach it, and over all but the largest, which is predicted."""
    out = {}
    for tau in (f"{tau:g}" for tau in taus):
        usable = [size for size in sizes.values() if size["times"][tau]["between"]]
        usable = [size for size in usable if min(size["times"][tau]["between"]["values"]) > 0]
        n = np.array([size["parameters"] for size in usable], float)
        times = [np.array(size["times"][tau]["between"]["values"]) for size in usable]
        fit = power_law(n, times)
        ahead = power_law(n[:-1], times[:-1], to=n[-1]) if len(n) > 2 else None
        if ahead:
            ahead |= {"parameters": usable[-1]["parameters"], "measured": usable[-1]["times"][tau]["between"]}
        out[tau] = {"sizes": len(n), "fit": fit, "largest_predicted": ahead}
        if fit:
            next_up = round(n[-1] ** 2 / n[-2])
            out[tau]["next_size"] = power_law(n, times, to=next_up) | {"parameters": next_up}
    return out


def _loss_law(sizes: dict, arm: str) -> dict | None:
    """Fit the loss law to all rounds of ordinary training up to each member's best held-out loss."""
    points = []
    for number, size in enumerate(size for size in sizes.values() if arm in size["arms"]):
        for seed, member in enumerate(size["arms"][arm]["members"]):
            scored = member["sets"]["heldout"]
            best = int(np.argmin(scored["nll"]))
            for epochs, nll in list(zip(scored["epochs"], scored["nll"], strict=True))[: best + 1]:
                points.append((size["parameters"], epochs * size["training_tokens"], nll, 1000 * number + seed))
    return loss_law(*np.array(points, float).T)


def scaling_claims(findings: dict, experiments: dict) -> list[dict]:
    """Return what was published and whether it holds here: id, source, statement, expected, measured, interval, holds.

    Each claim bounds a difference between neighbours (sizes, passes), the smallest of all that there are; its interval is
    Student's over seeds. It holds when the measured value keeps the bound, and is settled when its interval does.
    """
    out = []
    main = findings.get("memorization", {}).get("plain")
    if main:
        sizes = list(main["sizes"].values())
        out += _rising("t-size", "T(N, tau) falls with N, at every tau (least ratio of T between neighbouring sizes)",
                       [_ratios(sizes, tau) for tau in sizes[0]["times"]], 1.0)  # fmt: skip
        over = [size["before_overfitting"] for size in sizes]
        statement = "M before overfitting rises with N (least step between sizes)"
        out += _rising("overfitting-size", statement, [_steps(over)], 0.0)
        tau = max((t for t in sizes[0]["units_at"] if any(size["units_at"][t] for size in sizes)), key=float, default=None)
        if tau:
            half = next(iter(experiments["memorization"].values()))["sequence_length"] / 2
            worst = max((s["units_at"][tau] for s in sizes if s["units_at"][tau]), key=lambda found: found["mean"])
            out.append(claim("units", SOURCE, f"the mean memory unit at M = {tau} is under half the sequence (tokens)",
                              half, worst["mean"], worst["mean_ci"], at_most=half))  # fmt: skip
        law = main["power_laws"].get("0.9", {})
        if law.get("fit"):
            fit = law["fit"]
            out.append(claim("slope", SOURCE, "log T(N, 0.9) falls by 0.75 for each log N", PUBLISHED_SLOPE, fit["slope"],
                              fit["slope_ci"], at_most=PUBLISHED_SLOPE, reached=True))  # fmt: skip
        ahead = law.get("largest_predicted")
        if ahead and ahead["measured"]:
            statement = "T(N, 0.9) of the largest size is at most what the smaller ones predict"
            out.append(claim("prediction", "this project", statement,
                              ahead["predicted"], ahead["measured"]["mean"], ahead["measured"]["mean_ci"],
                              at_most=ahead["predicted_ci"][1], reached=True))  # fmt: skip
    for arms in findings.values():
        shown = {name: arm for name, arm in arms.items() if any("forgetting" in size for size in arm["sizes"].values())}
        out += _forgetting(shown)
    pii = findings.get("pii", {})
    if {"none", "rmft"} <= set(pii):
        for name, size in pii["none"]["sizes"].items():
            masked = pii["rmft"]["sizes"].get(name)
            if masked:
                gap = _difference(size["pii"]["values_whole"], masked["pii"]["values_whole"])
                statement = f"RMFT lowers the share of PII values memorized whole at {name}"
                out.append(claim(f"pii-{name}", "this project", statement,
                                  0.0, gap["mean"], gap["mean_ci"], at_least=0.0))  # fmt: skip
    return out


def _forgetting(arms: dict) -> list[dict]:
    out = []
    first = lambda arm: next(iter(arm["sizes"].values()))  # noqa: E731
    massed = [arm for arm in arms.values() if first(arm)["passes"] and not first(arm)["spacing"]]
    massed.sort(key=lambda arm: first(arm)["passes"])
    baselines = lambda arm: [size["forgetting"]["baseline"] for size in arm["sizes"].values()]  # noqa: E731
    for arm in massed:
        passes = first(arm)["passes"]
        if len(arm["sizes"]) > 1:
            out += _rising(f"baseline-size-{passes}", f"the forgetting baseline rises with N ({passes} passes, least step)",
                           [_steps(baselines(arm))], 0.0)  # fmt: skip
    if len(massed) > 1:
        steps = [_steps([few, many]) for one, other in zip(massed, massed[1:], strict=False)
                 for few, many in zip(baselines(one), baselines(other), strict=True)]  # fmt: skip
        out += _rising("baseline-passes", "the forgetting baseline rises with passes (least step, all sizes)", steps, 0.0)
    return out


def _difference(one: dict, other: dict) -> dict:
    return mean_interval([a - b for a, b in zip(one["values"], other["values"], strict=True)])


def _steps(values: list[dict | None]) -> list[dict]:
    known = [value for value in values if value]
    return [_difference(b, a) for a, b in zip(known, known[1:], strict=False)]


def _ratios(sizes: list[dict], tau: str) -> list[dict]:
    known = [size["times"][tau]["between"] for size in sizes]
    known = [found for found in known if found and min(found["values"]) > 0]
    return [mean_interval([a / b for a, b in zip(few["values"], many["values"], strict=True)])
            for few, many in zip(known, known[1:], strict=False)]  # fmt: skip


def _rising(id: str, statement: str, steps: list[list[dict]], bound: float) -> list[dict]:
    found = [step for some in steps for step in some]
    if not found:
        return []
    least = min(found, key=lambda step: step["mean"])
    return [claim(id, SOURCE, statement, bound, least["mean"], least["mean_ci"], at_least=bound)]
