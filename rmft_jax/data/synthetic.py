"""Seeded made-up office mail and web prose: the bundled corpus of the demo and the tests."""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from itertools import accumulate

from rmft_jax.data import synthetic_words as words


class _Dice:
    """Random choices made from `random()` alone, the one method Python promises never to change."""

    def __init__(self, seed: str):
        self.roll = random.Random(seed).random

    def chance(self, share: float) -> bool:
        return self.roll() < share

    def between(self, low: int, high: int) -> int:
        return low + int(self.roll() * (high - low + 1))

    def pick(self, choices: Sequence):
        return choices[int(self.roll() * len(choices))]

    def weighted(self, choices: Sequence, cumulative: Sequence[float]):
        return choices[min(bisect(cumulative, self.roll() * cumulative[-1]), len(choices) - 1)]

    def some(self, choices: Sequence, number: int) -> list:
        rest = list(choices)
        return [rest.pop(int(self.roll() * len(rest))) for _ in range(min(number, len(rest)))]


@dataclass(eq=False, slots=True)
class _Company:
    name: str
    domain: str
    style: int  # how its addresses are built
    display: int  # how its headers name people
    disclaimer: str
    people: list[_Person] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Person:
    first: str
    last: str
    address: str
    company: _Company
    title: str
    phone: str
    signature: str  # empty for those who never sign
    team: _Team | None = None
    circle: list[_Person] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Team:
    members: list[_Person]
    odds: list[float]
    projects: list[str]
    topics: list[str]
    recent: list[_Message] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Message:
    sender: _Person
    to: list[_Person]
    cc: list[_Person]
    date: datetime
    subject: str
    own: str  # what the sender wrote
    topic: str
    quoted: str = ""  # the earlier message below it


@dataclass(eq=False, slots=True)
class _World:
    people: list[_Person]
    desks: list[_Person]
    teams: list[_Team]
    odds: list[float]
    copyable: list[_Message] = field(default_factory=list)


def synthetic_mail(count: int, *, seed: int = 0) -> Iterator[dict]:
    """Make a corpus of office mail between invented people under the reserved example domains.

    The same `count` and `seed` always give the same messages. The population grows with `count`, so a smaller
    corpus is not the start of a larger one. Addresses repeat with a heavy tail, teams write mostly to
    themselves, and about a tenth of the messages are near copies of earlier ones.

    Args:
        count: how many messages to make.
        seed: picks the people and every message.

    Yields:
        {"id": "synthetic-000001", "text": headers, a blank line and the body}.
    """
    dice = _Dice(f"synthetic mail {int(seed)}")
    world = _make_world(dice, max(40, int(min(1.6 * count, 800 * (max(count, 1) / 500) ** 0.85))))
    start = datetime(2001, 1, 8, 7, tzinfo=timezone(timedelta(hours=-6)))
    for index in range(count):
        date = start + timedelta(minutes=index * 700_000 // count + dice.between(0, 540))
        message = _next_message(dice, world, date)
        if len(message.own) > 350 and len(message.to) <= 4:
            world.copyable = [*world.copyable[-150:], message]
        yield {"id": f"synthetic-{index + 1:06d}", "text": _render(dice, message)}


def synthetic_web(count: int, *, seed: int = 0) -> Iterator[str]:
    """Make short paragraphs of general prose, as on web pages, that hold no e-mail address.

    About a third of them end in a lead towards contact details ("For tickets, write to") and stop there.

    Args:
        count: how many paragraphs to make.
        seed: picks every paragraph.

    Yields:
        One paragraph of 60 to 120 words.
    """
    dice, topics = _Dice(f"synthetic web {int(seed)}"), list(_WEB_TOPICS.values())
    for _ in range(count):
        paragraph, length = [], dice.between(60, 85)
        for template in dice.some(dice.pick(topics)[1], 99):
            if len(paragraph) < length:
                paragraph += _sentence(dice, template, _WEB_CHOICES).split()
        if dice.chance(0.35):
            paragraph += _sentence(dice, dice.pick(words.LEADS), _WEB_CHOICES).split()
        yield " ".join(paragraph)


def _parse_slots(text: str) -> dict[str, list[str]]:
    pairs = (line.partition("=") for line in text.strip().split("\n"))
    return {name: words.choices(choices) for name, _, choices in pairs}


def _parse_topics(text: str) -> dict[str, tuple[list[str], list[str]]]:
    topics = {}
    for chunk in text.split("@")[1:]:
        name, _, rest = chunk.partition(":")
        subjects, _, sentences = rest.partition("=>")
        topics[name] = words.choices(subjects), words.choices(sentences)
    return topics


_NUMBERS = {
    "few": lambda dice: str(dice.between(2, 9)),
    "small": lambda dice: str(dice.between(2, 28)),
    "big": lambda dice: str(dice.between(1000, 99999)),
    "thousands": lambda dice: f"{dice.between(4, 400) * 250:,}",
    "phone": lambda dice: f"({dice.between(201, 989)}) 555-01{dice.between(0, 99):02d}",
}
_MAIL_CHOICES, _MAIL_TOPICS = _parse_slots(words.SLOTS), _parse_topics(words.MAIL)
_WEB_CHOICES, _WEB_TOPICS = _parse_slots(words.WEB_SLOTS), _parse_topics(words.WEB)
_SLOT = re.compile(r"\{(\w+)\}")


def _fill(dice: _Dice, template: str, slots: dict) -> str:
    def value(match: re.Match) -> str:
        if (number := _NUMBERS.get(match[1])) is not None:
            return number(dice)
        choices = slots[match[1]]
        return choices if isinstance(choices, str) else _fill(dice, dice.pick(choices), slots)

    return _SLOT.sub(value, template)


def _sentence(dice: _Dice, template: str, slots: dict) -> str:
    text = _fill(dice, template, slots).strip()
    return text[:1].upper() + text[1:]


def _make_world(dice: _Dice, size: int) -> _World:
    shares = [1 / (rank + 1) ** 0.8 for rank in range(max(4, size // 25))]
    labels = dice.some(words.LABELS, len(words.LABELS))
    world = _World([], [], [], [])
    for rank, share in enumerate(shares):
        label = labels[rank % len(labels)] + str(rank // len(labels) or "")
        company = _make_company(dice, label, max(4, round(size * share / sum(shares))))
        world.people += company.people
        world.desks.append(_desk(dice, company))
        world.teams += _make_teams(dice, company)
    world.odds = list(accumulate(1 / (rank + 1) ** 0.9 for rank in range(len(world.teams))))
    return world


def _make_company(dice: _Dice, label: str, size: int) -> _Company:
    prefix = dice.pick(("", "", "", "", "mail.", "corp.", "us."))
    domain = f"{prefix}{label}.example.{dice.pick(('com', 'com', 'org', 'net'))}"
    disclaimer = dice.pick(words.DISCLAIMERS) if dice.chance(0.6) else ""
    name = f"{label.capitalize()} {dice.pick(words.TRADES)}"
    company = _Company(name, domain, dice.between(0, 3), dice.pick((0, 0, 1, 2)), disclaimer)
    taken: set[str] = set()
    while len(company.people) < size:
        company.people.append(_make_person(dice, company, taken))
    return company


def _make_person(dice: _Dice, company: _Company, taken: set[str]) -> _Person:
    first, last = dice.pick(words.FIRST), dice.pick(words.LAST)
    nick = f"{first[:4]}{last[0]}{dice.between(10, 99)}"
    name = (f"{first}.{last}", first[0] + last, f"{first}_{last}", nick)[company.style].lower()
    while name in taken:
        name += str(dice.between(2, 99))
    taken.add(name)
    signature = dice.pick(words.SIGNATURES.split("\n~")) if dice.chance(0.5) else ""
    phone = _NUMBERS["phone"](dice)
    title = dice.pick(words.TITLES)
    return _Person(first, last, f"{name}@{company.domain}", company, title, phone, signature)


def _desk(dice: _Dice, company: _Company) -> _Person:
    box = dice.pick(("news", "announcements", "bulletin"))
    return _Person(company.name, box.capitalize(), f"{box}@{company.domain}", company, "", "", "")


def _make_teams(dice: _Dice, company: _Company) -> list[_Team]:
    teams, rest = [], list(company.people)
    while rest:
        size = len(rest) if len(rest) < 12 else dice.between(5, 9)
        members, rest = rest[:size], rest[size:]
        odds = list(accumulate(1 / (rank + 1) ** 1.3 for rank in range(size)))
        team = _Team(members, odds, dice.some(words.PROJECTS, 3), dice.some(list(_MAIL_TOPICS), 3))
        for person in members:
            person.team = team
            person.circle = dice.some([other for other in members if other is not person], 3)
        teams.append(team)
    return teams


def _next_message(dice: _Dice, world: _World, date: datetime) -> _Message:
    kind, team = dice.roll(), dice.weighted(world.teams, world.odds)
    if kind < 0.11 and world.copyable:
        return _near_copy(dice, world, date)
    if kind < 0.18:
        return _bulletin(dice, world, team, date)
    make = _reply if kind < 0.42 and team.recent else _fresh
    message = make(dice, world, team, date)
    team.recent = [*team.recent[-5:], message]
    return message


def _fresh(dice: _Dice, world: _World, team: _Team, date: datetime) -> _Message:
    sender, topic = dice.weighted(team.members, team.odds), dice.pick(team.topics)
    to = _recipients(dice, world, sender, dice.pick((1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6)))
    cc = _recipients(dice, world, sender, dice.between(1, 3)) if dice.chance(0.35) else []
    if dice.chance(0.3):
        cc.append(team.members[0])  # the lead wants to know
    slots = _context(dice, world, sender, to[0])
    subject = _sentence(dice, dice.pick(_MAIL_TOPICS[topic][0]), slots)
    own = _own_text(dice, topic, sender, slots, dice.between(3, 5))
    cc = [person for person in dict.fromkeys(cc) if person not in (sender, *to)]
    return _Message(sender, to, cc, date, subject, own, topic)


def _recipients(dice: _Dice, world: _World, sender: _Person, number: int) -> list[_Person]:
    chosen: list[_Person] = []
    team, colleagues = sender.team, sender.company.people
    while len(chosen) < number:
        roll = dice.roll()
        if roll < 0.45 and team:
            person = dice.pick(sender.circle)
        elif roll < 0.75 and team:
            person = dice.weighted(team.members, team.odds)
        else:
            person = _known(dice, colleagues if roll < 0.86 else world.people)
        if person is not sender and person not in chosen:
            chosen.append(person)
    return chosen


def _known(dice: _Dice, people: list[_Person]) -> _Person:
    """Pick somebody with a strong lean to the front of the list, so that the back is rarely heard of."""
    return people[int(dice.roll() ** 1.7 * len(people))]


def _context(dice: _Dice, world: _World, sender: _Person, reader: _Person) -> dict:
    other = _known(dice, sender.company.people if dice.chance(0.4) else world.people)
    team = sender.team or reader.team
    names = [name for person in team.members for name in (person.first, f"{person.first} {person.last}")]
    return _MAIL_CHOICES | {
        "project": dice.pick(team.projects),
        "colleague": names,
        "to_first": reader.first,
        "name": f"{other.first} {other.last}",
        "direct": other.phone,
        "address": _show(dice, other.address),
    }


def _own_text(dice: _Dice, topic: str, sender: _Person, slots: dict, number: int) -> str:
    templates = ["{link} " + template for template in dice.some(_MAIL_TOPICS[topic][1], number)]
    if dice.chance(0.4):
        templates.insert(dice.between(1, len(templates)), dice.pick(words.ANYTIME))
    if dice.chance(0.3):
        templates.append(dice.pick(words.CONTACT))
    text = _sentence(dice, templates[0].removeprefix("{link} "), slots)
    for template in templates[1:]:
        text += dice.pick((" ", " ", "  ", "\n\n")) + _sentence(dice, template, slots)
    greeting, closing = _fill(dice, dice.pick(words.GREETINGS), slots), dice.pick(words.CLOSINGS)
    name = _sign(dice, sender) if sender.signature and dice.chance(0.7) else sender.first
    parts = [greeting, text, _fill(dice, closing, slots), name]
    if sender.company.disclaimer and dice.chance(0.25):
        parts.append(sender.company.disclaimer)
    return "\n\n".join(part for part in parts if part)


def _sign(dice: _Dice, person: _Person) -> str:
    fields = {name: getattr(person, name) for name in ("first", "last", "title", "phone")}
    return person.signature.format(**fields, company=person.company.name, email=_show(dice, person.address))


def _reply(dice: _Dice, world: _World, team: _Team, date: datetime) -> _Message:
    first = dice.pick(team.recent)
    sender = dice.pick(first.to)
    forward = dice.chance(0.3)
    others = [person for person in first.to + first.cc if person is not sender]
    to = [first.sender] if not forward else _recipients(dice, world, sender, dice.between(1, 3))
    cc = [person for person in others if person not in to] if not forward and dice.chance(0.4) else []
    slots = _context(dice, world, sender, to[0])
    own = _own_text(dice, first.topic, sender, slots, dice.between(1, 3))
    subject = ("FW: " if forward else "RE: ") + re.sub(r"^((RE|FW): )+", "", first.subject)
    return _Message(sender, to, cc, date, subject, own, first.topic, _quote(dice, first))


def _quote(dice: _Dice, message: _Message) -> str:
    when, months = message.date, _MAIL_CHOICES["month"]
    clock = f"{(when.hour - 1) % 12 + 1}:{when.minute:02d} {'AM' if when.hour < 12 else 'PM'}"
    sent = f"{words.DAYS[when.weekday()]}, {months[when.month - 1]} {when.day}, {when.year} {clock}"
    head = [f"From: {_entry(dice, message.sender)}", f"Sent: {sent}"]
    head += [f"To: {'; '.join(_entry(dice, person) for person in message.to)}", f"Subject: {message.subject}"]
    return "\n".join(["-----Original Message-----", *head, "", message.own])


def _bulletin(dice: _Dice, world: _World, team: _Team, date: datetime) -> _Message:
    desk = next(desk for desk in world.desks if desk.company is team.members[0].company)
    to = _recipients(dice, world, desk, dice.between(1, 4))
    slots = _context(dice, world, desk, team.members[0])
    title = _fill(dice, f"{desk.company.name} weekly, {{date}}", slots)
    items = []
    for topic in dice.some(list(_MAIL_TOPICS), 3):
        lines = " ".join(_sentence(dice, line, slots) for line in dice.some(_MAIL_TOPICS[topic][1], 2))
        items.append(f"* {topic.upper()}\n{lines}")
    leave = f"To leave this list, write to {_show(dice, desk.address)}."
    own = "\n\n".join([title, *items, leave, desk.company.disclaimer]).strip()
    return _Message(desk, to, [], date, title, own, topic)


def _near_copy(dice: _Dice, world: _World, date: datetime) -> _Message:
    first, hour, day = dice.pick(world.copyable), dice.pick(_MAIL_CHOICES["hour"]), dice.pick(words.DAYS[:5])
    known = first.to + first.cc
    fresh = [person for person in _recipients(dice, world, first.sender, 1) if person not in known]
    to = fresh + first.to[1 if fresh and dice.chance(0.7) else 0 :]
    greeting, gap, rest = first.own.partition("\n")
    own = greeting.replace(first.to[0].first, to[0].first) + gap + rest
    edited = re.sub(r"\b\d?\d:\d\d\b", hour, own, count=1)
    if edited == own:
        edited = re.sub(rf"\b({'|'.join(words.DAYS)})\b", day, own, count=1)
    if dice.chance(0.2):
        edited = "Sending this again with a correction.\n\n" + edited
    return replace(first, to=to, date=date, own=edited)


def _render(dice: _Dice, message: _Message) -> str:
    head = [f"Date: {format_datetime(message.date)}", f"From: {_entry(dice, message.sender)}"]
    head.append(_people_header(dice, "To", message.to))
    if message.cc:
        head.append(_people_header(dice, "Cc", message.cc))
    head.append(f"Subject: {message.subject}")
    body = message.own + ("\n\n" + message.quoted if message.quoted else "")
    return "\n".join(head) + "\n\n" + body + "\n"


def _people_header(dice: _Dice, name: str, people: list[_Person]) -> str:
    lines = [f"{name}:"]
    for index, person in enumerate(people):
        entry = _entry(dice, person) + ("," if index + 1 < len(people) else "")
        if index and len(lines[-1]) + len(entry) > 76:
            lines.append("\t" + entry)
        else:
            lines[-1] += " " + entry
    return "\n".join(lines)


def _entry(dice: _Dice, person: _Person) -> str:
    address = _show(dice, person.address)
    plain, named = address, f"{person.first} {person.last} <{address}>"
    return (plain, named, f'"{person.last}, {person.first}" <{address}>')[person.company.display]


def _show(dice: _Dice, address: str) -> str:
    """Write an address as somebody typed it: mostly in lower case, sometimes not."""
    if not dice.chance(0.07):
        return address
    local, _, domain = address.partition("@")
    return address.title() if dice.chance(0.8) else f"{local.upper()}@{domain}"
