"""Pack documents into rows whole: none is cut but those longer than a row."""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Order documents so that rows of stride + 1 tokens can be cut which hold short documents whole.

    A document longer than a row fills rows of its own, each of which shares one token with the next; what is left of it
    begins another. Then each of the others, the longest first, goes into the row with the least room that is enough. Rows
    are at least half full on average, and take at most 11/9 of the least number that would do where all documents are
    short (the same bound as for first fit).

    Args:
      lengths: int [documents], tokens of each; empty ones are left out.
      stride: new target tokens of a full row.

    Returns: int64 [documents], the order; int64 [groups + 1], the places in the text in this order that no row crosses, from
    0 to its end.

    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms".
    """
    width = stride + 1
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> the groups that have it, the last one first in turn
    rooms = 0  # bit r is set where some group has room r

    def put(document: int, group: int, room: int) -> None:
        nonlocal rooms
        groups[group].append(document)
        if room:
            by_room.setdefault(room, []).append(group)
            rooms |= 1 << room

    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == 0:
            continue
        fitting = rooms >> length
        if length > width or not fitting:
            groups.append([])
            last = length - stride * ((length - 2) // stride) if length > width else length
            put(document, len(groups) - 1, width - last)
            continue
        room = length + (fitting & -fitting).bit_length() - 1
        group = by_room[room].pop()
        if not by_room[room]:
            rooms ^= 1 << room
        put(document, group, room - length)
    sizes = [sum(int(lengths[document]) for document in group) for group in groups]
    return np.array([document for group in groups for document in group], np.int64), np.cumsum([0, *sizes])
