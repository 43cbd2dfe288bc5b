"""`rmft study scaling`: how fast models of different sizes memorize, and how fast they forget.

Source: Tirumala et al. 2022, arXiv 2205.10770. What it claims, and what of that was found here, is in `scaling_results`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rmft_jax.config import Config, first_difference, plain, to_dict, with_changes
from rmft_jax.data.blocks import Blocks, all_rows, fill_up
from rmft_jax.data.prepare import Prepared, load_prepared, prepare
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_bytes, write_json
from rmft_jax.kernels import TaggedBatch
from rmft_jax.progress import say, track
from rmft_jax.studies.scaling_results import scaling_results, updates_until
from rmft_jax.study_config import ArmConfig, ExperimentConfig, StudyConfig
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.side_by_side import SIT_OUT, SideBySide, fills_devices, ordinary_rows
from rmft_jax.training.tracker import TrackerShape, slice_names, tracker_shape

_DATA = ("source", "tokenizer", "pii", "canary")  # sections that the prepared data depend on
CLASSES = ("numeral", "capitalised", "lower_case", "space", "other")  # of tokens


class Text(NamedTuple):
    """What the members of one experiment read. config: the group's, with the classes of tokens as tags of the tracker.

    rows: training blocks, then those of the special batch. blocks: how many of them are of training text. tokens: training
    tokens. sets: what is scored after each round.
    """

    config: Config
    prepared: Prepared
    rows: TaggedBatch
    blocks: int
    tokens: int
    sets: dict[str, TaggedBatch]


class Group(NamedTuple):
    """Arms of one shape that read one text: they are trained side by side. number: among the groups of its experiment."""

    experiment: str
    size: str
    number: int
    config: Config
    arms: dict[str, ArmConfig]


def run(config: Config, *, command: str = "rmft study scaling") -> dict:
    """Run every experiment of `config.study.scaling` and write `out`/results.json; return its content.

    The same call goes on where an earlier one was interrupted: finished groups are not repeated. results.json appears after
    the first and is renewed after each further one.
    Raises UserError, before anything is trained, when the settings break a rule.
    """
    groups = plan_groups(config)
    out, begin = Path(config.out), time.monotonic()
    for data in {group.config.data_dir: group.config for group in groups}.values():
        prepare(data)
    done: list[dict] = []
    defaults = plain(to_dict(Config()) | {"experiment": dataclasses.asdict(ExperimentConfig())})
    for number, group in enumerate(groups, 1):
        path = out / "parts" / f"{group.experiment}-{group.size}-{group.number}.json"
        settings = to_dict(group.config) | {"arms": {name: dataclasses.asdict(arm) for name, arm in group.arms.items()}}
        settings["experiment"] = dataclasses.asdict(config.study.scaling.experiments[group.experiment])
        settings = plain(settings)
        found = read_json(path, "part of a study", "delete it") if path.exists() else {}
        missing = "settings" not in found or first_difference(found["settings"], settings, defaults)
        if missing:
            passed = (time.monotonic() - begin) / 60
            arms = f" ({', '.join(group.arms)})" if len(group.arms) > 1 or "plain" not in group.arms else ""
            what = f"{group.experiment} at {group.size}{arms}"
            say(f"study scaling: part {number} of {len(groups)}, {what}, {passed:.0f} min so far")
            started = time.monotonic()
            found = {"settings": settings, "result": run_group(group, config)}
            found["result"]["seconds"] = round(time.monotonic() - started, 1)
            write_json(path, found)
        done.append({"experiment": group.experiment, "size": group.size} | found["result"])
        if missing or number == len(groups):
            results = scaling_results(done, config, planned=len(groups), command=command)
            write_json(out / "results.json", results)
    return results


def plan_groups(config: Config) -> list[Group]:
    """Return what is to be trained, in order. Raises UserError, naming the setting, for what cannot be."""
    scaling = config.study.scaling
    for name in ("ladder", "experiments"):
        if not getattr(scaling, name):
            raise UserError(f"study.scaling.{name} is empty: see configs/studies/scaling_cpu.yaml for one")
    if not all(0 < tau <= 1 for tau in scaling.taus):
        raise UserError(f"study.scaling.taus is {list(scaling.taus)}: shares lie above 0, at most at 1")
    base = dataclasses.replace(config, study=StudyConfig())
    groups = []
    for name, experiment in scaling.experiments.items():
        where = f"study.scaling.experiments.{name}"
        _check(experiment, where, scaling.ladder)
        own = with_changes(base, experiment.changes, f"{where}.changes")
        data = f"data-{name}" if set(experiment.changes) & set(_DATA) else "data"
        for size, changes in scaling.ladder.items():
            if experiment.sizes and size not in experiment.sizes:
                continue
            of_size = with_changes(own, changes, f"study.scaling.ladder.{size}")
            alike: dict[tuple, tuple[Config, dict[str, ArmConfig]]] = {}
            for arm_name, arm in experiment.arms.items():
                settings = with_changes(of_size, arm.vary, f"{where}.arms.{arm_name}.vary")
                if settings.lora.rank and scaling.side_by_side:
                    raise UserError(f"{where} trains adapters (lora.rank): set study.scaling.side_by_side=false")
                settings = with_changes(settings, {
                    "data": str(Path(config.out) / data), "name": name, "tracker": {"enabled": True, "examples": False},
                })  # fmt: skip
                alike.setdefault((repr(settings), arm.ids), (settings, {}))[1][arm_name] = arm
            groups += [Group(name, size, number, *together) for number, together in enumerate(alike.values())]
    return groups


def _check(experiment: ExperimentConfig, where: str, ladder: dict) -> None:
    for size in experiment.sizes:
        if size not in ladder:
            raise UserError(f"{where}.sizes has {size!r}: choose among {', '.join(ladder)}")
    if experiment.epochs < 1 or experiment.rounds < 1:
        raise UserError(f"{where}: epochs and rounds are 1 or more")
    if not experiment.arms:
        raise UserError(f"{where}.arms is empty: name one, or leave the setting out")
    for name, arm in experiment.arms.items():
        if arm.ids not in ("none", "vocabulary", "prepended"):
            raise UserError(f"{where}.arms.{name}.ids is {arm.ids!r}: choose one of none, vocabulary, prepended")
        if arm.passes and not 0 < experiment.inject_at < experiment.epochs:
            raise UserError(f"{where}.arms.{name}.passes needs {where}.inject_at, an epoch before the last")
        if arm.passes < 0 or arm.spacing < 0:
            raise UserError(f"{where}.arms.{name}: passes and spacing are 0 or more")


def run_group(group: Group, config: Config) -> dict:
    """Train the arms of a group under every seed; return what `scaling_results` says that a part holds."""
    scaling = config.study.scaling
    experiment = scaling.experiments[group.experiment]
    text = read_text(group, experiment)
    seeds = range(config.seed, config.seed + config.study.seeds)
    members = list(itertools.product(group.arms, seeds))
    at_once = [members] if scaling.side_by_side else [[member] for member in members]
    sharded = not scaling.side_by_side or fills_devices(group.config, text.prepared.tokenizer.vocab_size)
    tracks = [_train(group, experiment, text, some, scaling.taus, sharded) for some in at_once]
    arms: dict[str, list] = {}
    for (arm, seed), track_ in zip(members, itertools.chain.from_iterable(tracks), strict=True):
        arms.setdefault(arm, []).append({"seed": seed} | track_)
    parameters = {member.pop("parameters") for found in arms.values() for member in found}
    return {
        "parameters": parameters.pop(),
        "training_tokens": text.tokens,
        "blocks": text.blocks,
        "sequence_length": group.config.training.sequence_length,
        "learning_rate": group.config.training.learning_rate,
        "arms": {
            name: {"passes": group.arms[name].passes, "spacing": group.arms[name].spacing, "members": found}
            for name, found in arms.items()
        },
    }


def read_text(group: Group, experiment: ExperimentConfig) -> Text:
    """Lay out what the members of a group read."""
    config = group.config
    prepared = load_prepared(config)
    config = dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, **_tag_classes(config, prepared)))
    blocks, heldout = load_blocks(config, prepared)
    size, sets = config.training.batch_size, {}
    if len(blocks) < size:
        raise UserError(f"{group.experiment} has {len(blocks)} training blocks, fewer than training.batch_size {size}")
    if experiment.inject_at:
        special = Blocks(heldout.corpus, stride=blocks.stride)
        special.max_components = max(blocks.max_components, special.max_components)
        special.max_spans = max(blocks.max_spans, special.max_spans)
        blocks.max_components, blocks.max_spans = special.max_components, special.max_spans
        if len(special) < 2:
            raise UserError(f"{group.experiment} has one held-out block: the special batch takes half of them; raise "
                            f"source.heldout_fraction")  # fmt: skip
        rows, of_special, count = all_rows(blocks), all_rows(special), min(size, len(special) // 2)
        first = fill_up(jax.tree.map(lambda x: x[:count], of_special), size)
        sets["special"] = first
        # as they stand: nothing in them is replaced
        untouched = first._replace(component=np.zeros_like(first.component), span_end=np.full_like(first.span_end, -1))
        rows = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows, untouched)
        sets["heldout"] = fill_up(jax.tree.map(lambda x: x[count:], of_special), size)
    else:
        rows, sets["heldout"] = all_rows(blocks), all_rows(heldout, size)
    if experiment.score_training:
        sets["training"] = all_rows(blocks, size)
    ids = next(iter(group.arms.values())).ids
    if ids == "prepended":
        rows.tokens[: len(blocks), 0] = prepared.tokenizer.vocab_size + np.arange(len(blocks))
    return Text(config, prepared, rows, len(blocks), len(blocks.corpus.tokens), sets)


def _tag_classes(config: Config, prepared: Prepared) -> dict:
    """Return tracker settings that have each token counted in its class, unless the config has tags of its own."""
    if config.tracker.tags:
        return {}
    path = prepared.directory.parent / f"{prepared.directory.name}-classes.npy"
    if not path.exists():
        classes = token_classes(prepared.tokenizer)
        tags = np.concatenate([classes[record["tokens"]] for record in read_corpus(prepared.directory, "train")])
        file = io.BytesIO()
        np.save(file, tags, allow_pickle=False)
        write_bytes(path, file.getvalue())
    return {"tags": str(path), "tag_names": CLASSES}


def token_classes(tokenizer) -> np.ndarray:
    """Return the class of each id, int8 [ids]: 1 + its place in CLASSES, 0 for special ones.

    Its first character that is no space decides.
    """
    out = np.zeros(tokenizer.vocab_size, np.int8)
    for id, length in enumerate(tokenizer.byte_lengths()):
        if not length:
            continue
        piece = tokenizer.decode([id])
        first = piece.strip()[:1]
        name = "space" if not first else "other"
        if first.isalpha():
            name = "capitalised" if first.isupper() else "lower_case"
        elif first.isdigit():
            name = "numeral"
        out[id] = 1 + CLASSES.index(name)
    return out


def _train(
    group: Group, experiment: ExperimentConfig, text: Text, members: list, taus: tuple, sharded: bool
) -> list[dict]:
    """Train members side by side, round by round; return the record of each."""
    size = text.config.training.batch_size
    seeds = np.array([seed for _, seed in members], np.int32)
    per_round = max(1, round(text.blocks / size / experiment.rounds))
    rounds = -(-experiment.epochs * text.blocks // (per_round * size))
    config = with_changes(text.config, {"training": {"log_every": per_round}})  # a round is what a report is in `rmft train`
    names, shape = slice_names(config), tracker_shape(config, text.blocks)
    more = text.blocks if any(arm.ids != "none" for arm in group.arms.values()) else 0
    what = config, text.prepared, text.rows, seeds, text.sets, shape
    trainer = SideBySide(*what, steps=rounds * per_round, more_pieces=more, sharded=sharded)
    log = _Log(len(members), text, names, shape, size)
    arms = [group.arms[arm] for arm, _ in members]
    timeline = _timeline(arms, experiment, rounds, text.blocks, per_round * size)
    title, step = f"{group.experiment} {group.size}", 0
    status = lambda: f"M {log.newest().min():.2f} to {log.newest().max():.2f}"  # noqa: E731
    for showing in track(timeline, title, len(timeline), status=status):
        if showing is None:
            rows = ordinary_rows(text.blocks, seeds, batch_size=size, start=step, steps=per_round)
            step += per_round
            log.add(trainer.round(*rows), step, True)
            if experiment.until and min(log.newest()) >= experiment.until:
                break
        else:
            block = np.where(np.array(showing)[:, None, None], text.blocks + np.arange(size), SIT_OUT)
            log.add(trainer.round(block, np.zeros_like(block), special=True), step, False)
    return [{"parameters": trainer.parameters} | record for record in log.records(taus)]


def _timeline(arms: list[ArmConfig], experiment: ExperimentConfig, rounds: int, blocks: int, per_round: int) -> list:
    """Return the rounds in order: None = of training text, else which members are shown the special batch, once.

    Passes that follow one another end after `inject_at` epochs, however many they are; spaced ones begin there.
    """
    out: list = []
    at = round(experiment.inject_at * blocks / per_round)
    spaced = {}
    for member, arm in enumerate(arms):
        apart = max(1, round(arm.spacing * blocks / per_round))
        for number in range(arm.passes if arm.spacing else 0):
            spaced.setdefault(at + number * apart, set()).add(member)
    for number in range(rounds):
        if number == at and number:
            most = max((arm.passes for arm in arms if not arm.spacing), default=0)
            for left in range(most, 0, -1):
                out.append([arm.passes >= left and not arm.spacing for arm in arms])
        if number in spaced:
            out.append([member in spaced[number] for member in range(len(arms))])
        out.append(None)
    return out


class _Log:
    """What the rounds of a group say of each member."""

    def __init__(self, members: int, text: Text, names: tuple, shape: TrackerShape, batch_size: int):
        self._members, self._text, self._names, self._shape, self._size = members, text, names, shape, batch_size
        zeros = lambda width: np.zeros((members, shape.rounds, width), np.uint32)  # noqa: E731
        self._last = {"hits": zeros(len(names)), "targets": zeros(len(names)), "lengths": zeros(shape.bins)}
        self._open: dict[int, dict] = {}  # unfinished epochs
        self._epochs: list[dict] = []  # arrays [members, ...] of each finished one
        self._scores: list[tuple[float, bool, dict]] = []  # epochs so far, whether a round of training text, scores
        self._updates: list[np.ndarray] = []  # cumulative hits and targets [members, steps, 2]
        self._since = 0

    def newest(self) -> np.ndarray:
        """Return M of the newest finished epoch, [members]."""
        return self._m(self._epochs[-1]) if self._epochs else np.zeros(self._members)

    def add(self, result, step: int, ordinary: bool) -> None:
        """Note a round that ended after `step` steps on training text."""
        end = step * self._size
        self._scores.append((end / self._text.blocks, ordinary, result.scores))
        if not ordinary:
            return
        self._updates.append(np.stack([result.hits, result.targets], axis=-1))
        change = {name: (result.counts[name] - self._last[name]).astype(np.int64) for name in self._last}  # modulo 2^32
        for epoch in range(self._since // self._text.blocks, (end - 1) // self._text.blocks + 1):
            part = {name: value[:, epoch % self._shape.rounds] for name, value in change.items()}
            known = self._open.setdefault(epoch, {name: np.zeros_like(value) for name, value in part.items()})
            self._open[epoch] = {name: known[name] + part[name] for name in part}
            if (epoch + 1) * self._text.blocks <= end:
                self._epochs.append(self._open.pop(epoch))
        self._last, self._since = {name: result.counts[name] for name in self._last}, end

    @staticmethod
    def _m(epoch: dict) -> np.ndarray:
        return epoch["hits"][:, :2].sum(1) / epoch["targets"][:, :2].sum(1)

    def records(self, taus: tuple) -> list[dict]:
        """Return the record of each member: see `scaling_results`."""
        counts = np.concatenate(self._updates, axis=1)
        gain = np.diff(counts.astype(np.int64), axis=1, prepend=0) % 2**32
        update = gain[..., 0] / np.maximum(gain[..., 1], 1)
        return [self._record(member, update[member], taus) for member in range(self._members)]

    def _record(self, member: int, update: np.ndarray, taus: tuple) -> dict:
        names = ("hits", "targets", "lengths")
        hits, targets, lengths = (np.stack([epoch[name][member] for epoch in self._epochs]) for name in names)
        count = lengths.sum(1)
        share = lambda hits, targets: [float(h / t) if t else None for h, t in zip(hits, targets, strict=True)]  # noqa: E731
        place = np.arange(1, lengths.shape[1] + 1)
        used = [n for n, name in enumerate(self._names) if targets[:, n].any()]
        scored: dict[str, dict] = {}
        for name in self._text.sets:
            scored[name] = {key: [] for key in ("epochs", "ordinary", "nll", "m", "nll_pii", "m_pii", "spans_whole")}
            for epochs, ordinary, scores in self._scores:
                if name not in scores:
                    continue
                nll, right, of = (np.asarray(x[member]) for x in scores[name][:3])
                spans, whole = (int(x[member]) for x in scores[name][3:])
                values = (epochs, ordinary, float(nll.sum() / of.sum()), float(right.sum() / of.sum()),
                          float(nll[1] / of[1]) if of[1] else None, float(right[1] / of[1]) if of[1] else None,
                          whole / spans if spans else None)  # fmt: skip
                for key, value in zip(scored[name], values, strict=True):
                    scored[name][key].append(value)
        return {
            "m": share(hits[:, :2].sum(1), targets[:, :2].sum(1)),
            "slices": {self._names[n]: share(hits[:, n], targets[:, n]) for n in used},
            "unit_mean": share(hits[:, :2].sum(1), count),
            "unit_longest": [int(place[row > 0].max(initial=0)) for row in lengths],
            "unit_histogram": lengths[-1].tolist(),
            "t_update": updates_until(update, taus),
            "sets": scored,
        }
