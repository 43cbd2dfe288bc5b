"""Progress for people: a bar with an ETA on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def say(message: str) -> None:
    """Print one line for the user on stderr, where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


def track(
    items: Iterable[Item], what: str, total: int, *, done: int = 0, status: Callable[[], str] = lambda: ""
) -> Iterator[Item]:
    """Yield the items, showing progress, the caller's status and the time left.

    On a terminal this is a bar. Elsewhere (a log, `make` in CI) a line appears every 10 seconds, none for quick work.
    """
    if sys.stderr.isatty():
        yield from _bar(items, what, total, done, status)
        return
    begin = last = time.monotonic()
    for count, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = (now - begin) / (count - done) * (total - count)
            parts = (f"{what}: {count}/{total} ({100 * count // max(total, 1)}%)", status(), f"{left:.0f} s left")
            say(", ".join(part for part in parts if part))


def _bar(items: Iterable[Item], what: str, total: int, done: int, status: Callable[[], str]) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = (TextColumn("{task.description}"), TextColumn("{task.fields[status]}"))
    columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text[1])
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, status="")
        for item in items:
            yield item
            progress.update(task, advance=1, status=status())
