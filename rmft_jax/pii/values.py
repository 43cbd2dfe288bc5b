"""What may be said of a value without saying the value."""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import zlib


def outline(value: str) -> str:
    """Return a value with 0 for each digit, a and A for each letter (`aaa.aaaa@aaaaa.aaa`, `000-00-0000`)."""
    return re.sub(r"[^\W\d_]", lambda letter: "A" if letter[0].isupper() else "a", re.sub(r"\d", "0", value))


def keyed_hash(value: str, key: bytes) -> str:
    """Return 16 hex digits of HMAC-SHA256: equal values meet, and without the key nobody can try out addresses."""
    return hmac.new(key, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:16]


@functools.lru_cache(1 << 16)
def component_value(text: str) -> int:
    """Return a hash of a component's text in lower case, as an int32: what two components of equal text share."""
    value = zlib.crc32(text.lower().encode("utf-8", "surrogatepass"))
    return value if value < 0x80000000 else value - 0x100000000
