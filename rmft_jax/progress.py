"""Progress for people: a bar with an ETA on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_label, _silent = "", False


def speak_as(process: int, processes: int) -> None:
    """Have each line begin with the number and the host of this process, one of several of a run.

    Only process 0 speaks, unless RMFT_LOG is `all`: what the others do is the same.
    """
    global _label, _silent
    _label = f"[{process}/{processes} {socket.gethostname()}] " if processes > 1 else ""
    _silent = process > 0 and os.environ.get("RMFT_LOG") != "all"


def say(message: str, *, always: bool = False) -> None:
    """Print lines for the user on stderr, where they do not mix with results.

    always: of any process of a run, as where something is wrong with this one.
    """
    if always or not _silent:
        print("\n".join(_label + line for line in message.split("\n")), file=sys.stderr, flush=True)


def track(
    items: Iterable[Item],
    what: str,
    total: int,
    *,
    done: int = 0,
    status: Callable[[], str] = lambda: "",
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yield the items, showing progress, the caller's status and the time left.

    total, done: in units of which an item has `size`.
    On a terminal this is a bar. Elsewhere (a log, `make` in CI) a line appears every 10 seconds, none for quick work.
    """
    if _silent:
        yield from items
        return
    if sys.stderr.isatty():
        yield from _bar(items, what, total, done, status, size)
        return
    last = time.monotonic()
    first: tuple[float, int] | None = None  # when the first item was done, which takes longer: programs are compiled in it
    count = done
    for item in items:
        yield item
        count += size(item)
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = f"{(now - first[0]) / (count - first[1]) * (total - count):.0f} s left" if first else ""
            parts = (f"{what}: {count}/{total} ({100 * count // max(total, 1)}%)", status(), left)
            say(", ".join(part for part in parts if part))
        first = first or (now, count)


def _bar(items, what: str, total: int, done: int, status: Callable[[], str], size: Callable) -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = (TextColumn("{task.description}"), TextColumn("{task.fields[status]}"))
    columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text[1])
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, status="")
        for item in items:
            yield item
            progress.update(task, advance=size(item), status=status())
