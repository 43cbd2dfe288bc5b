"""Every format gives the same documents, mail is parsed as stated, and dirt is counted and changes nobody else's text."""

import dataclasses
import gzip
import io
import itertools
import json
import mailbox
import sys
import tarfile
from email.message import EmailMessage

import pytest

from rmft_jax.config import SourceConfig
from rmft_jax.data.mail import text_of
from rmft_jax.data.sources import Documents, iterate, read_documents
from rmft_jax.errors import UserError

TEXTS = ["one", 'two, with "quotes"\nand a second line', "three é 😀", "four\r\nmixed\nends\rhere", "five"]


def write_source(path, texts):
    """Write texts in the format that the name says."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": f"n{number}", "text": text} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name = path.name
    if name.endswith(".zst"):
        import zstandard

        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)


def read(path, format, **more):
    documents = read_documents(SourceConfig(format=format, path=str(path), limit=0, heldout_fraction=0.2, **more))
    return documents.train + documents.heldout, documents


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_formats(tmp_path, name):
    write_source(tmp_path / name, TEXTS)
    texts, documents = read(tmp_path / name, name.split(".")[1])
    assert sorted(texts) == sorted(TEXTS) and not +documents.faults
    with pytest.raises(UserError, match="text_field"):
        read(tmp_path / name, name.split(".")[1], text_field="body")
    with pytest.raises(UserError, match=r"cannot be read .*check the path"):
        read(tmp_path / "not" / name, name.split(".")[1])
    if name.endswith((".gz", ".zst", ".parquet")):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(UserError, match=r"cannot be read .*whole"):
            read(tmp_path / name, name.split(".")[1])


OBJECTS = f"""
import grain

ROWS = [{{"id": n, "text": text}} for n, text in enumerate({TEXTS!r})]

class Numbered:
    def __len__(self):
        return len(ROWS)
    def __getitem__(self, number):
        return ROWS[number]

class Failing(Numbered):
    def __getitem__(self, number):
        return ROWS[number] if number != 1 else int(ROWS[number]["text"])

class Holder:
    inner = Numbered()

def generate():
    yield from ROWS

def fail():
    yield ROWS[0]
    raise ValueError(ROWS[1]["text"])

def broken():
    raise ValueError("no access\\nto it")

as_bytes = [row["text"].encode() for row in ROWS]
numbered = Numbered()
mapped = grain.MapDataset.source([row["text"] for row in ROWS]).map(lambda text: {{"text": text}})
filtered = grain.MapDataset.range(3 * len(ROWS)).filter(lambda n: n % 3 == 0).map(lambda n: {{"text": ROWS[n // 3]["text"]}})
iterated = mapped.to_iter_dataset()
loaded = grain.DataLoader(data_source=numbered, sampler=grain.samplers.SequentialSampler(len(ROWS)))
mapping, number = {{"text": "one"}}, 5
"""


@pytest.fixture
def module(tmp_path, monkeypatch, numbers=itertools.count()):  # noqa: B008
    """Return the name of a new module that holds sources, in the current folder alone."""
    name = f"sources_of_test_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(OBJECTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    return name


OF_A_MODULE = "ROWS numbered Numbered Holder.inner generate mapped filtered iterated loaded".split()


@pytest.mark.parametrize("object", [*OF_A_MODULE, "as_bytes"])
def test_objects_of_a_module(module, object):
    field = "" if object == "as_bytes" else "text"
    config = SourceConfig(format="grain", path=f"{module}:{object}", text_field=field, limit=0)
    assert list(iterate(config, Documents())) == TEXTS
    assert list(iterate(dataclasses.replace(config, limit=2, max_characters=3), Documents())) == ["one", "two"]
    both = read_documents(dataclasses.replace(config, heldout_path=config.path, heldout_limit=3))
    assert (both.train, both.heldout) == (TEXTS, TEXTS[:3])


@pytest.mark.parametrize("object, says", [
    ("no_such_module:rows", r"cannot be loaded \(ModuleNotFoundError: No module named 'no_such_module'\)"),
    ("{module}:rows", r"cannot be loaded \(AttributeError: .*has no attribute 'rows'\): check source.path"),
    ("{module}:broken", r"cannot be loaded \(ValueError: no access\): check"),
    ("{module}:mapping", "is of type dict, which is none"),
    ("{module}:number", "is of type int, which is none"),
    ("{module}:as_bytes", "record 0 is no JSON object: set source.text_field=''"),
    ("{module}:Failing", r"record 1 cannot be read \(ValueError\): mend or delete it; or set source.on_error=skip"),
    ("{module}:fail", r"record 1 cannot be read \(ValueError\): mend or delete it$"),
])  # fmt: skip
def test_faults_of_objects_are_one_line(module, object, says):
    config = SourceConfig(format="grain", path=object.format(module=module), limit=0)
    with pytest.raises(UserError, match=says) as raised:
        list(iterate(config, Documents()))
    assert "\n" not in str(raised.value) and "quotes" not in str(raised.value)
    if object == "{module}:Failing":
        found = Documents()
        assert list(iterate(dataclasses.replace(config, on_error="skip"), found)) == [TEXTS[0], *TEXTS[2:]]
        assert found.skipped == 1
    with pytest.raises(UserError, match="text_field"):
        list(iterate(SourceConfig(format="grain", path=f"{module}:ROWS", text_field="body"), Documents()))


def test_array_records(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    for number, part in enumerate((TEXTS[:2], TEXTS[2:])):
        for kind in ("json", "text"):
            writer = ArrayRecordWriter(str(tmp_path / f"{kind}-{number}.array_record"), "group_size:1")
            for text in part:
                writer.write(json.dumps({"id": text, "text": text}).encode() if kind == "json" else text.encode())
            writer.close()
    for kind, field in (("json", "text"), ("text", "")):
        config = SourceConfig(format="array_record", path=str(tmp_path / f"{kind}-*"), text_field=field)
        assert list(iterate(config, Documents())) == TEXTS
    first = dataclasses.replace(config, path=str(tmp_path / "text-0.array_record"))
    assert list(iterate(first, Documents())) == TEXTS[:2]
    torn = tmp_path / "torn.array_record"
    torn.write_bytes((tmp_path / "text-0.array_record").read_bytes()[:-20])
    for path in (torn, tmp_path / "none.array_record"):
        with pytest.raises(UserError, match=r"cannot be read \(.*check the path"):
            list(iterate(dataclasses.replace(config, path=str(path)), Documents()))


def test_mail_of_an_object(tmp_path, monkeypatch):
    (tmp_path / "mail_of_test.py").write_text(f"mails = [{message().as_bytes()!r}, {message().as_string()!r}]")
    monkeypatch.syspath_prepend(tmp_path)
    config = SourceConfig(format="grain", path="mail_of_test:mails", text_field="", mail=True)
    assert list(iterate(config, Documents())) == 2 * [text_of(message().as_bytes())[0]]


def message(body="Hello,\nworld", **headers):
    out, own = EmailMessage(), {"From": "Ann Stone <ann@alder.example.com>", "To": "bob@b.example.org", "Subject": "Hi"}
    for name, value in (own | headers).items():
        out[name] = value
    out.set_content(body)
    return out


def test_a_message_as_text():
    plain = message(**{"X-Mailer": "x", "Date": "Thu, 2 Aug 2001 13:42:57 -0700"})
    headers = ("From: Ann Stone <ann@alder.example.com>", "To: bob@b.example.org", "Subject: Hi")
    expected = "\n".join(["Date: Thu, 02 Aug 2001 13:42:57 -0700", *headers, "", "Hello,", "world"])
    assert text_of(plain.as_bytes()) == (expected, ())
    folded = b"To: a@x.example.com,\r\n\tb@x.example.com\r\nSubject: =?utf-8?q?caf=C3=A9?=\r\n\r\nHi\r\n"
    assert text_of(folded) == ("To: a@x.example.com, b@x.example.com\nSubject: café\n\nHi", ())
    several = message()
    several.add_attachment(b"\0\1", maintype="application", subtype="pdf", filename="a.pdf")
    several.add_attachment(message("inner", Subject="forwarded"))
    text, faults = text_of(several.as_bytes())
    assert text.endswith("Hello,\nworld") and "inner" not in text and faults == ("attachment",)
    both = message()
    both.add_alternative("<p>Hello</p>", subtype="html")
    assert text_of(both.as_bytes())[0].endswith("Subject: Hi\n\nHello,\nworld")
    html = message()
    html.set_content("<style>p {}</style><p>Dear &eacute;</p><br>you", subtype="html")
    text, faults = text_of(html.as_bytes())
    assert text.split("\n\n", 1)[1].split() == ["Dear", "é", "you"] and faults == ("html",)


def test_broken_messages_are_read_and_counted():
    nested = b"\n"
    for number in range(300):
        nested = b'Content-Type: multipart/mixed; boundary="b%d"\n\n--b%d\n' % (number, number) + nested
    cases = {
        b"": "", b"\0\xff\xfe": "undecodable", nested: "",
        b"Content-Type: text/plain; charset=utf-8\n\n\xff\xfe": "undecodable",
        b"Content-Type: text/plain; charset=no-such\n\nhi": "undecodable",
        b"Content-Type: multipart/mixed; boundary=x\n\nno border": "malformed",
        b"From: =?utf-8?b?////?=\nTo: <<<>>,,;;@\nDate: yesterday\n\nhi": "",
        b"Subject: \xff\xfe\n\nhi": "undecodable",
        b"Content-Transfer-Encoding: base64\n\n!!!": "",
    }  # fmt: skip
    for raw, fault in cases.items():
        text, faults = text_of(raw)
        text.encode("utf-8")
        assert not fault or fault in faults, (raw[:60], faults)


@pytest.mark.parametrize("kind", ["mbox", "maildir", "tar"])
def test_places_of_mail(tmp_path, kind):
    """As the standard library's `mailbox` writes them."""
    messages = [message(f"number {number}\n\nFrom here on", Subject=str(number)) for number in range(6)]
    box = mailbox.mbox(tmp_path / "box") if kind == "mbox" else mailbox.Maildir(tmp_path / "box")
    for item in messages:
        box.add(item)
    box.close()
    path = tmp_path / "box"
    if kind == "tar":
        path = tmp_path / "box.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "box", "maildir")
    texts, _ = read(path, "mbox" if kind == "mbox" else "maildir")
    assert sorted(texts) == sorted(text_of(item.as_bytes())[0] for item in messages)


def test_marks_of_an_mbox(tmp_path):
    (tmp_path / "box").write_bytes(b"From a\nTo: a\n\n>From b\n>>From c\n> From d\nFrom e\n\nFrom f\nTo: g\n\nh\n")
    texts, _ = read(tmp_path / "box", "mbox")
    assert sorted(texts) == ["To: a\n\nFrom b\n>From c\n> From d\nFrom e", "To: g\n\nh"]


def test_a_tar_writes_nothing_and_follows_no_link(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../../outside", "/absolute", "fine"):
            info = tarfile.TarInfo(name)
            data = message(name).as_bytes()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    texts, _ = read(tmp_path / "evil.tar", "maildir")
    assert len(texts) == 3 and sorted(tmp_path.rglob("*")) == before


DIRT = {
    "NUL": (b'{"id": "x", "text": "a\\u0000b"}', "ab"),
    "undecodable": (b'{"id": "x", "text": "a \xff b"}', "a \ufffd b"),
    "empty": (b'{"id": "x", "text": " \\n"}', None),
    "repeated id": (b'{"id": "n0", "text": "again"}', "again"),
    "long line": (b'{"id": "x", "text": "' + b"word " * 400_000 + b'"}', "word " * 400_000),
    "half a pair": (b'{"id": "x", "text": "a \\ud800"}', "a ?"),
}


@pytest.mark.parametrize("kind", DIRT)
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_dirt_is_counted_and_changes_no_other_document(tmp_path, kind, ends):
    line, own = DIRT[kind]
    clean = [json.dumps({"id": f"n{number}", "text": text}).encode() for number, text in enumerate(TEXTS)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(ends.join([*clean[:2], line, b"", *clean[2:]]))
    texts, documents = read(path, "jsonl")
    assert sorted(texts) == sorted([*TEXTS, *([own] if own is not None else [])])
    counted = {"long line": {}, "half a pair": {"undecodable": 1}}.get(kind, {kind: 1})
    assert dict(+documents.faults) == counted and documents.skipped == 0


@pytest.mark.slow
def test_a_line_of_100_mb(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "' + b"x" * 100_000_000 + b'"}\n{"text": "after"}\n')
    texts, _ = read(path, "jsonl", max_characters=1000)
    assert sorted(map(len, texts)) == [5, 6, 1000]
