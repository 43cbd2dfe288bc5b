"""URLs that name a person: with credentials, or with a user's path (/~user, /users/NAME, /home/NAME)."""

from __future__ import annotations

import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.words import words

_CREDENTIALS = re.compile(r"^[A-Za-z]+://([^/@:?#]+)(?::([^/@?#]*))?@")
_USER = re.compile(r"(?i)^[a-z]+://[^/?#]+(?:/[^/?#]+)*?/(?:~([a-z0-9._%+-]+)|(?:users?|home)/([a-z0-9_%+-]+)(?=[/?#]|$))")


def make(config: PiiConfig) -> PiiType:
    """Return the type. User names and passwords are replaced; the scheme, the host and the rest of the path stay."""
    return PiiType(
        name="url",
        split=_split,
        surrogates=lambda kind: words(),
        pattern=r"\b(?i:https?|ftp)://[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    end = start + len(line[start:end].rstrip(".,;:!?'()[]*&"))
    return (start, end) if _names(line[start:end]) else None


def _names(url: str) -> list[tuple[int, int]]:
    """Return where user names and passwords stand, in order."""
    found = [match for match in (_CREDENTIALS.match(url), _USER.match(url)) if match]
    return [match.span(group) for match in found for group in (1, 2) if match[group]]


def _split(url: str) -> list[tuple[int, int, str]]:
    out, done = [], 0
    for start, end in _names(url):
        out += [(done, start, ""), (start, end, "name")]
        done = end
    return [*out, (done, len(url), "")] if done < len(url) else out
