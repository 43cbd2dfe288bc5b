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


def _words(text: str) -> list[str]:
    return text.split()


def _choices(text: str) -> list[str]:
    return [choice.strip() for choice in text.replace("\n", " ").split("|")]


_FIRST = _words("""James Mary Robert Patricia John Jennifer Michael Linda David Elizabeth William Barbara
Richard Susan Joseph Jessica Thomas Sarah Charles Karen Chris Lisa Daniel Nancy Matthew Betty Anthony Margaret
Mark Sandra Donald Ashley Steven Kimberly Paul Emily Andrew Donna Joshua Michelle Kenneth Carol Kevin Amanda
Brian Dorothy George Melissa Edward Deborah Ronald Stephanie Timothy Rebecca Jason Sharon Jeffrey Laura Ryan
Cynthia Jacob Kathleen Gary Amy Nicholas Angela Eric Shirley Jonathan Anna Stephen Brenda Larry Pamela Justin
Emma Scott Nicole Brandon Helen Benjamin Samantha Samuel Katherine Gregory Christine Frank Debra Alexander
Rachel Raymond Carolyn Patrick Janet Jack Catherine Dennis Maria Jerry Heather Tyler Diane Aaron Ruth Jose
Julie""")
_LAST = _words("""Smith Johnson Williams Brown Jones Garcia Miller Davis Rodriguez Martinez Hernandez Lopez
Gonzalez Wilson Anderson Thomas Taylor Moore Jackson Martin Lee Perez Thompson White Harris Sanchez Clark
Ramirez Lewis Robinson Walker Young Allen King Wright Scott Torres Nguyen Hill Flores Green Adams Nelson Baker
Hall Rivera Campbell Mitchell Carter Roberts Gomez Phillips Evans Turner Diaz Parker Cruz Edwards Collins
Reyes Stewart Morris Morales Murphy Cook Rogers Gutierrez Ortiz Morgan Cooper Peterson Bailey Reed Kelly
Howard Ramos Kim Cox Ward Richardson Watson Brooks Chavez Wood James Bennett Gray Mendoza Ruiz Hughes Price
Alvarez Castillo Sanders Patel Myers Long Ross Foster Jimenez Powell Jenkins Perry Russell Sullivan Bell
Coleman Butler Henderson Barnes Fisher Vasquez Simmons Romero Jordan Patterson Alexander Hamilton Graham
Reynolds Griffin Wallace West Cole Hayes Chen Bryant Herrera Gibson Ellis Tran Medina Stevens Murray Ford
Castro Marshall Owens Harrison Fernandez Woods Washington Kennedy Wells Vargas Henry Freeman Webb Tucker
Guzman Burns Crawford Olson Simpson Porter Hunter Gordon Mendez Silva Shaw Snyder Mason Dixon Munoz Hunt Hicks
Holmes Palmer Wagner Black Robertson Boyd Rose Stone Salazar Fox Warren Mills Meyer Rice Schmidt Garza Daniels
Ferguson Nichols Stephens Soto Weaver Ryan Gardner Payne Grant Dunn Kelley Spencer Hawkins Arnold Pierce
Hansen Peters Santos Hart Bradley""")
_LABELS = _words("""alder birch cedar dogwood elmfield foxglove granite harbor ironwood juniper keystone
larkspur maple northgate oakridge pinecrest quarry riverbend sandpiper timber upland vale westbrook yarrow
zephyr amber bluehill copper driftwood eastmoor fernway glacier heron indigo jasper kestrel lantern meadow
nimbus orchard""")
_PROJECTS = _words("""Harrier Redwood Compass Lighthouse Falcon Meridian Sable Cobalt Ember Tundra Orion
Pelican Summit Beacon Catalina Drummond Everest Fulcrum Gambit Halcyon Ivory Jubilee Kodiak Lagoon Magnolia
Nomad Osprey Patriot Quartz Raven Saturn Trident Unity Vector Walrus Yukon Zenith Anvil Borealis Cascade""")
_TRADES = _words("Energy Partners Logistics Systems Consulting Supply Foods Holdings Engineering Insurance")
_TITLES = _choices("""Analyst | Senior Analyst | Director | Vice President | Office Manager | Contracts
Administrator | Accountant | Counsel | Trading Assistant | Systems Engineer | Regional Manager | Executive
Assistant | Planner""")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# One slot a line: its name, then the choices, which may hold slots again.
_SLOTS = """
link=||||||also,|by the way,|as you know,|for the record,|as we discussed,|however,
could=could|can|would|might
look=look at|review|check|go over|read through|comment on
send=send|forward|fax|bring|get
doc=draft|spreadsheet|summary|memo|agreement|term sheet|forecast|presentation|checklist|report|schedule
soon=by {weekday}|by noon on {weekday}|by the end of the week|by close of business|when you can|by {date}
seems=looks|seems|is
good=fine|reasonable|close|in good shape|better than I expected|a little high|about right
dept=accounting|legal|the trading desk|operations|the help desk|human resources|credit|facilities|tax
guest=José Marín|Zoë Keller|Renée Dubois|Mr. Okafor|Dr. Lindqvist|the auditors|the client|Søren Holm
site=the main office|the Dallas office|the plant|the annex|the downtown hotel|the warehouse
city=Houston|Portland|Denver|Chicago|Calgary|Austin|London|Omaha|Tulsa|Boston|Phoenix|Atlanta
weekday=Monday|Tuesday|Wednesday|Thursday|Friday
date={month} {small}
month=January|February|March|April|May|June|July|August|September|October|November|December
hour=8:30|9:00|9:30|10:00|10:30|11:00|1:00|1:30|2:00|2:30|3:00|3:30|4:00
span=9–11|10–12|1–3|2–4
item=a new server|two printers|the phone lines|the badge readers|the projector|the copier|the backup drive
food=sandwiches|pizza|barbecue|a light lunch|coffee and rolls|salads
trouble=a late delivery|a billing error|a storm last night|a missing signature|a typo|a change of plan
"""

# "@topic:", its subjects, "=>" and its sentences. Capitals are put in when a sentence is filled.
_MAIL = """
@budget: {project} budget for {month}|Revised {project} numbers|{month} expenses|Cost estimate - {project} =>
the {doc} for {project} {seems} {good}, but the travel line went from ${thousands} to ${thousands}. | {dept}
needs the {month} figures {soon}, so {could} you {look} the attached {doc}? | we are about {small} percent
over plan, mostly because of {trouble}. | I moved ${thousands} from {project} to {item}; let me know if that
is a problem. | the total now {seems} {good} at ${thousands}, down from ${thousands} in {month}. | {colleague}
asked {dept} to approve ${thousands} for the next quarter. | please do not charge anything else to cost center
{big} until {weekday}.
@meeting: {weekday} meeting|{project} meeting in {site}|Staff meeting moved to {hour}|Agenda for {weekday} =>
we will meet on {weekday} at {hour} in room {big} to {look} the {doc}. | {guest} will join us from {city}, so
please be on time. | {colleague} has a conflict at {hour}; {could} everyone do {weekday}, {span}, instead? |
the agenda has {few} items: the {project} {doc}, {item}, and the plan for {month}. | the dial-in is {phone},
passcode {big}. | please {send} me your slides {soon}. | lunch will be {food}, so tell {colleague} if you
cannot make it.
@contract: {project} agreement|Draft {doc} - {project}|Comments on the {project} contract|Amendment no. {few}
=> attached is the {doc} for {project} with the changes {guest} asked for. | {dept} has {few} comments on
section {few}, and {colleague} is working on them. | the counterparty wants to cap the liability at
${thousands}, which {seems} {good}. | {could} you {look} the {doc} and {send} your comments to {colleague}
{soon}? | we need two signed originals in {city} {soon}. | the term runs from {date} through {date}, with a
renewal option of {few} months. | I spoke with {guest} and the guaranty {seems} {good}.
@gas: {city} volumes for {date}|Nominations {date}|{project} imbalance|Meter {big} => the volume at meter
{big} {seems} {good}: we show {thousands} against {thousands} nominated. | please change deal {big} to
{thousands} a day starting {date}. | {colleague} found {trouble} in the {month} data and will fix it {soon}. |
the pipeline cut us by {small} percent on {weekday} because of {trouble}. | {could} you {look} the path for
{project} and tell {dept} what the rate is? | the desk in {city} sold {thousands} at an average of
${few}.{small}. | I have not heard back about the imbalance from {month}, which is about {thousands}.
@hiring: Interview on {weekday}|Candidate for the {project} team|Resume - {guest}|New analyst in {dept} =>
{guest} will be in {site} on {weekday} for the analyst position. | {could} you take the {hour} slot,
{colleague} has the one after that? | the candidate has {few} years with a firm in {city} and {seems} {good}
on paper. | please {send} your evaluation to {dept} {soon}. | {colleague} would start on {date} at
${thousands} plus the usual bonus. | we have {few} open positions on {project} and {small} resumes to {look}.
@systems: Outage on {weekday} night|{project} server|Password change|Ticket {big}: {item} => {item} will be
down on {weekday} from {hour} while we move {project}. | please save your work and log out before {hour}. |
ticket {big} is still open because of {trouble}. | {colleague} reset the password, and the system {seems}
{good} now. | the new release of {project} goes to {small} users in {city} on {date}. | if you see error
{big}, restart and call {dept} at {phone}. | we lost about {small} minutes of data, which {colleague} will
load again {soon}.
@customer: Order {big}|Invoice {big}|{city} account|Complaint from {guest} => {guest} called about order
{big}, which was short by {small} units. | we credited ${thousands} on invoice {big} after {trouble}. | the
next shipment leaves {site} on {weekday} and should reach {city} by {date}. | {colleague} promised them the
{doc} {soon}. | they want {small} percent off for {project}, and I told them that {seems} {good}. | {could}
you call them at {phone} before {dept} closes the account?
@social: Lunch on {weekday}|Birthday for {colleague}|Saturday game|Tickets for {date} => we are having {food}
for {colleague} on {weekday} at {hour}. | I have {few} extra tickets for the game in {city} on {date}, if
anyone wants them. | the {project} team is {few} runs ahead of {dept}, so practice matters. | please bring
${few} for the card to {colleague} {soon}. | it was great to see everyone at {site}; the pictures are with
{colleague}. | my family will be in {city} until {date}, so I am free most evenings.
"""
_ANYTIME = _choices("""let me know if you have any questions. | call me at {phone} if this is not clear. |
thanks for your help on {project}. | I will be out of the office on {weekday}. | {colleague} has the details.
| sorry for the short notice. | I will follow up on {weekday}. | please keep this between us and {dept} for
now.""")
_CONTACT = _choices("""please contact {name} at {address} with questions. | for access to the {doc}, write to
{address}. | {name} ({address}) is covering for {colleague} this week. | you can reach {name} at {address} or
{direct}. | I copied this from {name}, {address}, who knows {project} best. | please add {address} to the list
for {project}.""")
_GREETINGS = _choices("|{to_first},|{to_first},|Hi {to_first},|{to_first} -|Hello {to_first},|All,|Good day,")
_CLOSINGS = _choices("|Thanks,|Thanks,|Regards,|Best regards,|Thank you,|Cheers,|See you {weekday},")
_SIGNATURES = """{first} {last}\n{title}, {company}\n{phone}\n{email}
~--\n{first} {last} / {company}\nTel. {phone}\n{email}
~{first} {last}, {title}\n{company}, {phone}, {email}"""
_DISCLAIMERS = (
    "This e-mail and any attachment are intended only for the person or company to which they are "
    "addressed. If you received this message in error, please delete it and tell the sender at once.",
    "CONFIDENTIALITY NOTICE: The information in this message may be privileged. Any review, copying or "
    "distribution by anyone other than the intended recipient is prohibited.",
    "Nothing in this message is an offer or an acceptance, and no agreement exists until a written contract "
    "has been signed by both parties.",
    "The views expressed here are those of the sender and not necessarily those of the company. Please "
    "check this message for viruses before opening any attachment.",
)
_WEB_SLOTS = """
town=Millbrook|Ashford|Cedar Falls|Harwick|Lower Denby|Port Ellis|Wexley|Stonebridge|Marlow Heights
season=spring|summer|autumn|winter
number=two|three|four|five|six|eight|ten|a dozen|twenty
often=usually|often|almost always|sometimes|rarely
good=good|simple|reliable|popular|cheap|pleasant|surprisingly easy
who=neighbors|volunteers|local families|beginners|experienced members|retired teachers|students|visitors
when=on Saturday morning|last week|early in {season}|every other Thursday|after the holidays
thing=notebook|thermos|pair of gloves|sharp knife|tape measure|spare battery|small mirror|folding chair
place=the old mill|the town hall|the library|the riverside park|the school gym|the covered market|the station
reason=the soil is heavy|the weather turned|the budget is small|the roof leaked|prices went up
"""
_WEB = """
@garden: => tomatoes {often} do better when they are watered deeply {number} times a week rather than a little
each day. | before planting in {season}, mix compost into the top layer and leave it alone for {number} weeks.
| if {reason}, raised beds are a {good} answer, and {who} in {town} have built {number} of them this year. |
slugs hate dry ground, so water early and keep a {thing} near the door for the morning round. | seeds saved
from last {season} {often} sprout well if they were kept cool and dark. | a bucket under the gutter is the
most {good} tool in the garden. | gardeners in {town} swap seedlings at {place} {when}, and nobody goes home
with empty hands.
@news: => the council in {town} voted {when} to repair {place}, after {number} years of delay. | residents
said the work was overdue because {reason}. | traffic will be sent around {place} for {number} weeks, and
buses will run every {number} minutes. | {who} gathered at {place} {when} to hear the plan, and most of them
liked what they heard. | the mayor called the project {good}, although a second study is due in {season}. |
the money comes from a state grant and from {number} local businesses. | work should be finished before
{season}, weather permitting.
@baking: => a {good} loaf needs only flour, water, salt and time, and time is the part that {who} forget. |
let the dough rest for {number} hours, or overnight in the refrigerator if {reason}. | the oven should be very
hot, with a tray of water on the lowest shelf for the first {number} minutes. | use a {thing} to score the
top, and do not worry if the first {number} loaves look odd. | rye flour {often} makes the crumb denser, but
the flavor is worth it. | the bakers of {town} share their recipes at {place} {when}. | bread keeps for
{number} days in a paper bag and freezes well after that.
@trail: => the trail starts behind {place} in {town} and climbs gently for {number} miles. | pack water, a map
and a {thing}, since there is no shop after the first bridge. | in {season} the upper meadow is {often} full
of flowers, and {who} come to photograph them. | dogs are welcome on a leash, but the last {number} steps are
steep. | we met {number} other hikers {when} and shared a bench with all of them. | the way down is {good},
and the view over {town} makes up for the mud. | parking near {place} fills up early, so take the bus if you
can.
@theater: => the players of {town} open their new comedy at {place} {when}. | the cast of {number} includes
{who} who have never been on a stage before. | rehearsals began in {season}, and the set was painted in
{number} evenings. | the second act is the best part, with a {thing} that gets more laughs than any line. |
seats are {good} but not soft, so bring a cushion. | the profits will go to {place}, where {reason}. | last
year the company sold out {number} nights in a row.
@repair: => a dripping tap is {often} caused by a worn washer, which costs less than a {thing}. | turn off the
water first, then open the tap to let the pipe drain for {number} minutes. | the repair cafe in {town} fixed
{number} toasters {when}, all with parts from {place}. | keep the screws in order on a {thing}, because they
are {often} of different lengths. | old houses need patience, especially where {reason}. | a {good} rule is to
take a picture before every step. | {who} can learn this in {number} evenings without special tools.
"""
_LEADS = _choices("""for tickets, write to | to reserve a place, contact the secretary at | questions are
welcome; send an e-mail to | for more information, please contact | to join the mailing list, send a message
to | the organizer can be reached at | volunteers should write to the coordinator at | to report a mistake on
this page, e-mail""")

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
            paragraph += _sentence(dice, dice.pick(_LEADS), _WEB_CHOICES).split()
        yield " ".join(paragraph)


def _parse_slots(text: str) -> dict[str, list[str]]:
    pairs = (line.partition("=") for line in text.strip().split("\n"))
    return {name: _choices(choices) for name, _, choices in pairs}


def _parse_topics(text: str) -> dict[str, tuple[list[str], list[str]]]:
    topics = {}
    for chunk in text.split("@")[1:]:
        name, _, rest = chunk.partition(":")
        subjects, _, sentences = rest.partition("=>")
        topics[name] = _choices(subjects), _choices(sentences)
    return topics


_NUMBERS = {
    "few": lambda dice: str(dice.between(2, 9)),
    "small": lambda dice: str(dice.between(2, 28)),
    "big": lambda dice: str(dice.between(1000, 99999)),
    "thousands": lambda dice: f"{dice.between(4, 400) * 250:,}",
    "phone": lambda dice: f"({dice.between(201, 989)}) 555-01{dice.between(0, 99):02d}",
}
_MAIL_CHOICES, _MAIL_TOPICS = _parse_slots(_SLOTS), _parse_topics(_MAIL)
_WEB_CHOICES, _WEB_TOPICS = _parse_slots(_WEB_SLOTS), _parse_topics(_WEB)
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
    labels = dice.some(_LABELS, len(_LABELS))
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
    disclaimer = dice.pick(_DISCLAIMERS) if dice.chance(0.6) else ""
    name = f"{label.capitalize()} {dice.pick(_TRADES)}"
    company = _Company(name, domain, dice.between(0, 3), dice.pick((0, 0, 1, 2)), disclaimer)
    taken: set[str] = set()
    while len(company.people) < size:
        company.people.append(_make_person(dice, company, taken))
    return company


def _make_person(dice: _Dice, company: _Company, taken: set[str]) -> _Person:
    first, last = dice.pick(_FIRST), dice.pick(_LAST)
    nick = f"{first[:4]}{last[0]}{dice.between(10, 99)}"
    name = (f"{first}.{last}", first[0] + last, f"{first}_{last}", nick)[company.style].lower()
    while name in taken:
        name += str(dice.between(2, 99))
    taken.add(name)
    signature = dice.pick(_SIGNATURES.split("\n~")) if dice.chance(0.5) else ""
    phone = _NUMBERS["phone"](dice)
    title = dice.pick(_TITLES)
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
        team = _Team(members, odds, dice.some(_PROJECTS, 3), dice.some(list(_MAIL_TOPICS), 3))
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
        templates.insert(dice.between(1, len(templates)), dice.pick(_ANYTIME))
    if dice.chance(0.3):
        templates.append(dice.pick(_CONTACT))
    text = _sentence(dice, templates[0].removeprefix("{link} "), slots)
    for template in templates[1:]:
        text += dice.pick((" ", " ", "  ", "\n\n")) + _sentence(dice, template, slots)
    greeting, closing = _fill(dice, dice.pick(_GREETINGS), slots), dice.pick(_CLOSINGS)
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
    sent = f"{_DAYS[when.weekday()]}, {months[when.month - 1]} {when.day}, {when.year} {clock}"
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
    first, hour, day = dice.pick(world.copyable), dice.pick(_MAIL_CHOICES["hour"]), dice.pick(_DAYS[:5])
    known = first.to + first.cc
    fresh = [person for person in _recipients(dice, world, first.sender, 1) if person not in known]
    to = fresh + first.to[1 if fresh and dice.chance(0.7) else 0 :]
    greeting, gap, rest = first.own.partition("\n")
    own = greeting.replace(first.to[0].first, to[0].first) + gap + rest
    edited = re.sub(r"\b\d?\d:\d\d\b", hour, own, count=1)
    if edited == own:
        edited = re.sub(rf"\b({'|'.join(_DAYS)})\b", day, own, count=1)
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
