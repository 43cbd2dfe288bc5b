"""Every format gives the same documents, mail is parsed as stated, and dirt is counted and changes nobody else's text."""

import gzip
import io
import json
import mailbox
import tarfile
from email.message import EmailMessage

import pytest

from rmft_jax.config import SourceConfig
from rmft_jax.data.mail import text_of
from rmft_jax.data.sources import read_documents
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
