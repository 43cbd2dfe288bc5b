"""Mail as text: a message parsed by the standard library, and the places where mail is kept."""

from __future__ import annotations

import email
import email.policy
import tarfile
from collections.abc import Iterator
from email.message import EmailMessage
from html.parser import HTMLParser
from pathlib import Path
from typing import IO

_HEADERS = ("Date", "From", "To", "Cc", "Bcc", "Subject")
_DEPTH = 100  # parts within parts: more than any mail program makes


def text_of(raw: bytes) -> tuple[str, tuple[str, ...]]:
    """Return a message as text, and what was out of order with it.

    The text is the headers Date, From, To, Cc, Bcc and Subject, decoded, each on a line of its own as far as there are
    any; a blank line; and the plain text parts in their order, a blank line between two. Lines end in a line feed. Where
    there is no plain text, HTML parts stand in, without their tags. Attachments and forwarded messages are left out.

    Faults: attachment, html, undecodable (bytes that are replaced by U+FFFD), malformed (what the parser had to mend).
    """
    message = email.message_from_bytes(raw, policy=email.policy.default)
    faults: set[str] = set()
    lines = [f"{name}: {value}" for name in _HEADERS for value in _values(message, name, faults)]
    plain, html = [], []
    for part in _parts(message, faults):
        if part.defects:
            faults.add("malformed")
        kind = part.get_content_type()
        if part.get_filename() or part.get_content_disposition() == "attachment" or not kind.startswith("text/"):
            faults.add("attachment")
        elif kind == "text/html":
            html.append(_without_tags(_content(part, faults)))
        else:
            plain.append(_content(part, faults))
    if html and not plain:
        faults.add("html")
    texts = [text.replace("\r\n", "\n").replace("\r", "\n").strip("\n") for text in plain or html]
    body = "\n\n".join(text for text in texts if text.strip())
    return "\n".join(lines) + ("\n\n" if lines and body else "") + body, tuple(sorted(faults))


def read_mbox(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the messages of an mbox (the form called mboxrd).

    Each begins at a line `From ` after a blank one. Lines of a body that are `From ` after any number of `>` lose one.
    """
    message: list[bytes] | None = None
    blank = True
    for line in file:
        if blank and line.startswith(b"From "):
            if message is not None:
                yield b"".join(message)
            message = []
        elif message is not None:
            message.append(line[1:] if line.startswith(b">") and line.lstrip(b">").startswith(b"From ") else line)
        blank = not line.strip(b"\r\n")
    if message is not None:
        yield b"".join(message)


def read_tree(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, message) of every file below a folder, or in a .tar or .tar.gz of one, which is read as it streams.

    That is how maildirs are kept, and the Enron archive. Files of a folder come in the order of their names. Nothing is
    unpacked to the disk; links are not followed.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.is_symlink():
                yield str(file.relative_to(path)), file.read_bytes()
        return
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()


def _parts(message: EmailMessage, faults: set[str]) -> Iterator[EmailMessage]:
    """Yield the leaves of a message, in order, without those of messages that it forwards."""
    waiting = [(message, 0)]
    while waiting:
        part, depth = waiting.pop()
        if part.get_content_maintype() == "multipart" and part.is_multipart() and depth < _DEPTH:
            waiting += [(inner, depth + 1) for inner in reversed(part.get_payload())]
            if part.defects:
                faults.add("malformed")
        elif part.is_multipart():
            faults.add("attachment")
        else:
            yield part


def _values(message: EmailMessage, name: str, faults: set[str]) -> list[str]:
    try:
        values = [str(value) for value in message.get_all(name, [])]
    except Exception:  # noqa: BLE001  the parsers of headers raise what they like on broken ones
        faults.add("malformed")
        values = [str(value) for key, value in message.raw_items() if key.lower() == name.lower()]
    if any("\udc80" <= character <= "\udcff" or character == "\ufffd" for value in values for character in value):
        faults.add("undecodable")
    return [" ".join(value.encode("utf-8", "replace").decode("utf-8").split()) for value in values]


def _content(part: EmailMessage, faults: set[str]) -> str:
    """Return the text of a part in its charset, or as UTF-8 where there is no such charset."""
    data = part.get_payload(decode=True) or b""
    charset = part.get_content_charset() or "utf-8"
    try:
        return data.decode("utf-8" if charset == "us-ascii" else charset)
    except (UnicodeDecodeError, LookupError, ValueError):
        faults.add("undecodable")
        return data.decode("utf-8", errors="replace")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style")
        if tag in ("br", "p", "div", "tr", "li"):
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def _without_tags(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    return "".join(parser.pieces)
