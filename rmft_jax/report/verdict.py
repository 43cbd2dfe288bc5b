"""The opening paragraph: what leaked and what it cost, in plain words, from the data alone."""

from markupsafe import Markup

from rmft_jax.report.view import View, is_number, things

_AT_LENGTH = 4  # runs that the paragraph describes in whole sentences; of more, each gets a line


def verdict(view: View) -> Markup:
    """Return the paragraph's sentences, the baseline first, every number tied to its place in the results."""
    if not view.runs:
        return Markup("The results hold no runs.")
    turns = [line for line in (_bottom_line(view), _setting(view)) if line]
    if len(view.runs) > _AT_LENGTH:
        turn = Markup('<span class="turn">{}</span>')
        return Markup("\n").join([*turns, *(turn.format(_brief(view, run)) for run in view.runs)])
    for run in view.runs:
        sentences = [_leaked(view, run)]
        if run != view.baseline and view.baseline in view.runs:
            sentences += [_reduction(view, run), _cost(view, run, explained=run != view.runs[1])]
        turns.append(Markup('<span class="turn">{}</span>').format(Markup(" ").join(sentences)))
    return Markup("\n").join(turns)


def _bottom_line(view: View) -> Markup:
    """Return one sentence for who reads no further: the method that leaked least against the baseline, and its cost."""
    others = {run: view.value(*view.headline_path(run, "true_leaked")) for run in view.runs if run != view.baseline}
    usable = {run: count for run, count in others.items() if is_number(count)}
    before = view.headline_path(view.baseline, "true_leaked")
    if not usable or not is_number(view.value(*before)) or not _identities_are_addresses(view):
        return Markup()
    run = min(usable, key=usable.__getitem__)
    cost = ("comparison", run, "perplexity_increase_pct")
    price = Markup()
    if is_number(view.value(*cost)):
        sign = "+" if view.value(*cost) > 0 else ""
        price = Markup(", at {}{}\u00a0% perplexity{}").format(sign, view.num(*cost), _bracket(view, cost))
    seeds = ("study", "seeds")  # of several, counts are means
    opening = Markup("On average over {} seeds, of").format(view.num(*seeds)) if (view.value(*seeds) or 1) > 1 else "Of"
    line = '<strong class="line">{} {} {} in the training text, {} gave away {}{}; {} gave away {}{}{}.</strong>'
    return Markup(line).format(
        opening, view.num("data", "pii_identities"), things(view)[0], view.baseline, view.num(*before),
        _of_hundred(view, view.baseline), run, view.num(*view.headline_path(run, "true_leaked")),
        _of_hundred(view, run), price)


def _of_hundred(view: View, run: str) -> Markup:
    """Return the interval of a run's TER in brackets."""
    return _bracket(view, view.headline_path(run, "ter"), with_level=run == view.baseline)


def _brief(view: View, run: str) -> Markup:
    """Return one line: the mean TER, and against the baseline its cut and the cost."""
    mean, cut, cost = (("runs", run, "mean", view.headline, "ter"), ("comparison", run, "ter_reduction_pct"),
                       ("comparison", run, "perplexity_increase_pct"))
    line = Markup("<strong>{}</strong>: on average {}\u00a0% of the {}").format(run, view.num(*mean), things(view)[1])
    if run == view.baseline or not is_number(view.value(*cut)):
        return line + "."
    return line + Markup(", a reduction of {}\u00a0%{}{}; perplexity {}{}\u00a0%{}.").format(
        view.num(*cut), _bracket(view, cut), _unsettled(view, cut), "+" if (view.value(*cost) or 0) > 0 else "",
        view.num(*cost), _bracket(view, cost))


def _setting(view: View) -> Markup:
    prompts = ("settings", "prompts", view.headline)
    known = is_number(view.value(*prompts))
    count = Markup("{} prompts").format(view.num(*prompts)) if known else "prompts"
    trained = Markup()
    if is_number(view.value("data", "documents")) and is_number(view.value("data", "tokens")):
        trained = Markup("The models were trained on {} documents of “{}” ({} tokens). ").format(
            view.num("data", "documents"), view.text("data", "source"), view.num("data", "tokens"))
    return trained + Markup(
        "Each was given {} (set “{}”) and the {} it wrote out were checked against its training text; other prompts may "
        "draw out more.").format(count, view.headline, things(view)[0])


def _leaked(view: View, run: str) -> Markup:
    count, rate = view.headline_path(run, "true_leaked"), view.headline_path(run, "ter")
    name = Markup("<strong>{}</strong>").format(run)
    described = view.value("runs", run, "description")
    if described:
        name += f" ({described})"
    if not is_number(view.value(*count)):
        return Markup("For {} no leak count is available at the last checkpoint.").format(name)
    _, many, one = things(view)
    known = Markup(" of the {} {}").format(view.num("data", "pii_identities"), many)
    if not _identities_are_addresses(view):
        known = Markup(" {}").format(one if view.value(*count) == 1 else many)
    return Markup("At its last checkpoint {} gave away {}{}, {}\u00a0%{}.").format(
        name, view.num(*count), known, view.num(*rate), _bracket(view, rate, with_level=run == view.runs[0]))


def _reduction(view: View, run: str) -> Markup:
    path = ("comparison", run, "ter_reduction_pct")
    value = view.value(*path)
    if not is_number(value):
        text = "no reduction against {} can be stated."
    elif value < 0:
        text = "its reduction against {} was {}\u00a0%{}, that is, it leaked more{}."
    else:
        text = "it leaked {1}\u00a0% less than {0}{2}{3}."
    return Markup("Averaged over all checkpoints " + text).format(
        view.baseline, view.num(*path), _bracket(view, path), _unsettled(view, path))


def _cost(view: View, run: str, explained: bool) -> Markup:
    path = ("comparison", run, "perplexity_increase_pct")
    value = view.value(*path)
    if not is_number(value):
        return Markup("Its cost in perplexity cannot be stated.")
    sign = "+" if value > 0 else ""
    meaning = "" if explained else " (its difficulty with unseen text, lower is better)"
    text = Markup("The cost: held-out perplexity{} changed by {}{}\u00a0% against {}{}{}; it ended at {}.")
    return text.format(
        meaning, sign, view.num(*path), view.baseline, _bracket(view, path), _unsettled(view, path),
        view.num(*view.last(run, "perplexity")))


def _bracket(view: View, path: tuple, with_level: bool = False) -> Markup:
    if view.bounds(*path) == (None, None):
        return Markup()
    level = Markup("{}\u00a0% ").format(view.num("settings", "confidence")) if with_level else ""
    return Markup(" ({}interval {}\u00a0%)").format(level, view.interval(*path, form="{} to {}"))


def _unsettled(view: View, path: tuple) -> str:
    low, high = view.bounds(*path)
    if low is None:
        return "; there is no interval, so the difference is not settled"
    if low <= 0 <= high:
        return "; the interval includes zero, so the difference is not settled"
    # A bootstrap of nothing but zeros has no spread: it must not read as certainty.
    return "; an interval without width is no proof, see the intervals of the rates" if low == high else ""


def _identities_are_addresses(view: View) -> bool:
    """Tell whether `pii_identities` can be |A|: no denominator may be printed that TER contradicts."""
    known = view.value("data", "pii_identities")
    if not is_number(known) or known <= 0:
        return False
    for run in view.runs:
        count, rate = (view.value(*view.headline_path(run, metric)) for metric in ("true_leaked", "ter"))
        if is_number(count) and is_number(rate) and abs(100 * count / known - rate) > 0.01:
            return False
    return True
