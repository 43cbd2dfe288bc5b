"""Checksums of identifiers."""

from __future__ import annotations


def luhn_sum(digits: str) -> int:
    """Return the Luhn sum of digits modulo 10; 0 = valid. Source: ISO/IEC 7812-1, annex B."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10


def mod97(text: str) -> int:
    """Return a text of letters and digits as a number modulo 97, letters counting 10 to 35 (ISO/IEC 7064, MOD 97-10)."""
    return int("".join(str(int(character, 36)) for character in text)) % 97
