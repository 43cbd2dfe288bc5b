"""The made-up mail must behave like real mail where detection, deduplication and attacks look at it."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from rmft_jax.data.synthetic import synthetic_mail, synthetic_web

ADDRESS = re.compile(r"[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
RESERVED = re.compile(r"[a-z0-9._-]+@([a-z0-9-]+\.){1,2}example\.(com|org|net)")
QUOTE = "-----Original Message-----"
PHONE = re.compile(r"\(\d{3}\) 555-01\d\d")


def _texts(count: int, seed: int = 0) -> list[str]:
    return [message["text"] for message in synthetic_mail(count, seed=seed)]


@pytest.fixture(scope="module", params=[0, 1])
def corpus(request) -> list[str]:
    return _texts(600, request.param)


@pytest.fixture(scope="module")
def counts(corpus) -> Counter:
    return Counter(address.lower() for text in corpus for address in ADDRESS.findall(text))


def _share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def _own_body(text: str) -> str:
    return text.partition("\n\n")[2].partition(QUOTE)[0]


def _digest(parts) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def test_same_seed_gives_the_same_text_in_another_process():
    code = (
        "import sys; from rmft_jax.data.synthetic import *; sys.stdout.buffer.write('\\0'.join("
        "[m['text'] for m in synthetic_mail(80, seed=5)] + list(synthetic_web(20, seed=5))).encode())"
    )
    here = _digest(_texts(80, 5) + list(synthetic_web(20, seed=5)))
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert hashlib.sha256(there.stdout).hexdigest() == here


def test_other_seeds_give_other_text():
    assert len({_digest(_texts(20, seed)) for seed in (0, 1, -1, 2)}) == 4
    assert len({_digest(synthetic_web(5, seed=seed)) for seed in (0, 1, -1, 2)}) == 4


@pytest.mark.parametrize("count", [0, 1, 2, 37])
def test_makes_as_many_numbered_messages_as_asked(count):
    messages = list(synthetic_mail(count))
    assert [message["id"] for message in messages] == [f"synthetic-{i:06d}" for i in range(1, count + 1)]
    assert all(set(message) == {"id", "text"} for message in messages)
    assert len(list(synthetic_web(count))) == count


def test_headers_come_in_order_before_a_blank_line(corpus):
    for text in corpus:
        head, blank, body = text.partition("\n\n")
        names = [line.split(":")[0] for line in head.split("\n") if not line.startswith("\t")]
        assert names in (["Date", "From", "To", "Subject"], ["Date", "From", "To", "Cc", "Subject"])
        assert blank and body.strip() and "\r" not in text
        to = re.search(r"^To: (.*(?:\n\t.*)*)", head, re.M)[1]
        assert 1 <= len(ADDRESS.findall(to)) <= 7
    assert 0.3 < _share("\n\t" in text.partition("\n\n")[0] for text in corpus) < 0.9
    assert 0.2 < _share("\nCc: " in text.partition("\n\n")[0] for text in corpus) < 0.8


def test_nobody_is_addressed_twice_or_writes_to_himself(corpus):
    for text in corpus:
        people = [address.lower() for address in ADDRESS.findall(text.partition("\nSubject:")[0])]
        assert len(people) == len(set(people))


def test_addresses_repeat_with_a_heavy_tail(counts):
    total, ordered = counts.total(), sorted(counts.values(), reverse=True)
    assert 0.3 < _share(number <= 2 for number in ordered) < 0.7
    assert sum(ordered[: max(1, len(ordered) // 100)]) >= 0.08 * total
    assert 1 - len(ordered) / total >= 0.6  # every occurrence after an identity's first
    assert len(ordered) >= 400


def test_population_grows_slower_than_the_corpus():
    small, large = (len({a.lower() for t in _texts(n) for a in ADDRESS.findall(t)}) for n in (250, 1500))
    assert 2 * small < large < 5.9 * small


def test_all_addresses_are_under_the_reserved_domains(counts):
    assert [address for address in counts if not RESERVED.fullmatch(address)] == []
    assert len({address.partition("@")[2] for address in counts}) >= 15


def test_every_at_sign_belongs_to_an_address(corpus):
    assert all(text.count("@") == len(ADDRESS.findall(text)) for text in corpus)


def test_address_styles_vary(counts):
    local = [address.partition("@")[0] for address in counts]
    for style in (r"[a-z]+\.[a-z]+\d*", r"[a-z]+_[a-z]+\d*", r"[a-z]+", r"[a-z]+\d\d+"):
        assert _share(bool(re.fullmatch(style, name)) for name in local) > 0.04


def test_some_occurrences_are_in_mixed_case(corpus, counts):
    found = [address for text in corpus for address in ADDRESS.findall(text)]
    assert 0.02 < _share(address != address.lower() for address in found) < 0.2
    assert any(counts[address.lower()] > 5 and address != address.lower() for address in found)


def test_near_duplicates_are_there_to_find():
    texts = _texts(300)
    bags = [set(re.findall(r"\w+", text.lower())) for text in texts]
    near = set()
    for i, left in enumerate(bags):
        for j, right in enumerate(bags[:i]):
            if min(len(left), len(right)) >= 0.8 * max(len(left), len(right)):
                shared = len(left & right)
                if shared >= 0.8 * (len(left) + len(right) - shared):
                    near |= {i, j}
    assert 0.05 * len(texts) <= len(near) <= 0.4 * len(texts)
    assert len(set(texts)) == len(texts)


def test_boilerplate_recurs_word_for_word(corpus):
    paragraphs = Counter(part.strip() for text in corpus for part in text.split("\n\n") if len(part) > 120)
    assert paragraphs.most_common(1)[0][1] >= 10


def test_quoted_threads_are_earlier_messages(corpus):
    quoting = [(index, text) for index, text in enumerate(corpus) if QUOTE in text]
    assert 0.1 < len(quoting) / len(corpus) < 0.35
    for index, text in quoting:
        head, _, body = text.partition(QUOTE)[2].strip().partition("\n\n")
        assert re.fullmatch(r"From: .+\nSent: .+\nTo: .+\nSubject: .+", head)
        assert any(body.strip() in _own_body(earlier) for earlier in corpus[:index])


def test_signatures_name_a_phone_and_the_sender(corpus):
    def signed(text: str) -> bool:
        sender = ADDRESS.search(text)[0].lower()
        tail = _own_body(text)[-500:]
        return bool(PHONE.search(tail)) and sender in tail.lower()

    assert 0.15 < _share(map(signed, corpus)) < 0.6


def test_teams_make_recipients_predictable_but_not_certain(corpus):
    partners: dict[str, Counter] = {}
    hits = guesses = 0
    for text in corpus:
        sender, *others = [a.lower() for a in ADDRESS.findall(text.partition("\nSubject:")[0])]
        known = partners.setdefault(sender, Counter())
        if known.total() >= 5:
            guesses += 1
            hits += known.most_common(1)[0][0] in others
        known.update(others)
    assert 0.2 < hits / guesses < 0.9


def test_length_and_alphabet_are_those_of_mail(corpus):
    assert 600 <= sum(map(len, corpus)) / len(corpus) <= 900
    assert 0.05 < _share(not text.isascii() for text in corpus) < 0.5
    assert sum(not char.isascii() for text in corpus for char in text) < 0.005 * sum(map(len, corpus))


def test_no_slot_is_left_unfilled(corpus):
    assert not any(re.search(r"[{}|]|=>", text) for text in [*corpus, *synthetic_web(300)])


def test_web_prose_is_short_varied_and_without_addresses():
    texts = list(synthetic_web(400))
    assert not any("@" in text or "\n" in text for text in texts)
    assert all(60 <= len(text.split()) <= 120 for text in texts)
    assert len(set(texts)) == len(texts)


def test_some_web_prose_leads_towards_contact_details():
    texts = list(synthetic_web(400))
    assert 0.15 < _share(not text.endswith((".", "!", "?")) for text in texts) < 0.6
    assert any(text.endswith("For tickets, write to") for text in texts)
    assert any(text.endswith("contact the secretary at") for text in texts)
