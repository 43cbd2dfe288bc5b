"""The vocabulary and the grammar of the bundled corpus: invented people, companies and things to say."""

from __future__ import annotations


def split_words(text: str) -> list[str]:
    return text.split()


def choices(text: str) -> list[str]:
    return [choice.strip() for choice in text.replace("\n", " ").split("|")]


FIRST = split_words("""James Mary Robert Patricia John Jennifer Michael Linda David Elizabeth William Barbara
Richard Susan Joseph Jessica Thomas Sarah Charles Karen Chris Lisa Daniel Nancy Matthew Betty Anthony Margaret
Mark Sandra Donald Ashley Steven Kimberly Paul Emily Andrew Donna Joshua Michelle Kenneth Carol Kevin Amanda
Brian Dorothy George Melissa Edward Deborah Ronald Stephanie Timothy Rebecca Jason Sharon Jeffrey Laura Ryan
Cynthia Jacob Kathleen Gary Amy Nicholas Angela Eric Shirley Jonathan Anna Stephen Brenda Larry Pamela Justin
Emma Scott Nicole Brandon Helen Benjamin Samantha Samuel Katherine Gregory Christine Frank Debra Alexander
Rachel Raymond Carolyn Patrick Janet Jack Catherine Dennis Maria Jerry Heather Tyler Diane Aaron Ruth Jose
Julie""")
LAST = split_words("""Smith Johnson Williams Brown Jones Garcia Miller Davis Rodriguez Martinez Hernandez Lopez
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
LABELS = split_words("""alder birch cedar dogwood elmfield foxglove granite harbor ironwood juniper keystone
larkspur maple northgate oakridge pinecrest quarry riverbend sandpiper timber upland vale westbrook yarrow
zephyr amber bluehill copper driftwood eastmoor fernway glacier heron indigo jasper kestrel lantern meadow
nimbus orchard""")
PROJECTS = split_words("""Harrier Redwood Compass Lighthouse Falcon Meridian Sable Cobalt Ember Tundra Orion
Pelican Summit Beacon Catalina Drummond Everest Fulcrum Gambit Halcyon Ivory Jubilee Kodiak Lagoon Magnolia
Nomad Osprey Patriot Quartz Raven Saturn Trident Unity Vector Walrus Yukon Zenith Anvil Borealis Cascade""")
TRADES = split_words("Energy Partners Logistics Systems Consulting Supply Foods Holdings Engineering Insurance")
TITLES = choices("""Analyst | Senior Analyst | Director | Vice President | Office Manager | Contracts
Administrator | Accountant | Counsel | Trading Assistant | Systems Engineer | Regional Manager | Executive
Assistant | Planner""")
DAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# One slot a line: its name, then the choices, which may hold slots again.
SLOTS = """
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
MAIL = """
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
ANYTIME = choices("""let me know if you have any questions. | call me at {phone} if this is not clear. |
thanks for your help on {project}. | I will be out of the office on {weekday}. | {colleague} has the details.
| sorry for the short notice. | I will follow up on {weekday}. | please keep this between us and {dept} for
now.""")
CONTACT = choices("""please contact {name} at {address} with questions. | for access to the {doc}, write to
{address}. | {name} ({address}) is covering for {colleague} this week. | you can reach {name} at {address} or
{direct}. | I copied this from {name}, {address}, who knows {project} best. | please add {address} to the list
for {project}.""")
GREETINGS = choices("|{to_first},|{to_first},|Hi {to_first},|{to_first} -|Hello {to_first},|All,|Good day,")
CLOSINGS = choices("|Thanks,|Thanks,|Regards,|Best regards,|Thank you,|Cheers,|See you {weekday},")
SIGNATURES = """{first} {last}\n{title}, {company}\n{phone}\n{email}
~--\n{first} {last} / {company}\nTel. {phone}\n{email}
~{first} {last}, {title}\n{company}, {phone}, {email}"""
DISCLAIMERS = (
    "This e-mail and any attachment are intended only for the person or company to which they are "
    "addressed. If you received this message in error, please delete it and tell the sender at once.",
    "CONFIDENTIALITY NOTICE: The information in this message may be privileged. Any review, copying or "
    "distribution by anyone other than the intended recipient is prohibited.",
    "Nothing in this message is an offer or an acceptance, and no agreement exists until a written contract "
    "has been signed by both parties.",
    "The views expressed here are those of the sender and not necessarily those of the company. Please "
    "check this message for viruses before opening any attachment.",
)
WEB_SLOTS = """
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
WEB = """
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
LEADS = choices("""for tickets, write to | to reserve a place, contact the secretary at | questions are
welcome; send an e-mail to | for more information, please contact | to join the mailing list, send a message
to | the organizer can be reached at | volunteers should write to the coordinator at | to report a mistake on
this page, e-mail""")
