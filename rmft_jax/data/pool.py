"""The same work on every shard, on all cores; what was finished before is not done again.

Workers are programs of their own that read shards from a pipe. Unlike those of `multiprocessing` they need nothing of the
caller's main module, and they end when the pipe does, however the caller ended.
"""

from __future__ import annotations

import concurrent.futures
import gc
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rmft_jax.data.shards import Shard
from rmft_jax.data.tagged_shards import Job
from rmft_jax.progress import track

Work = Callable[[Job, Shard], None]


def peak_memory() -> tuple[float, float]:
    """Return the most memory that this process had, and the largest of the processes that it has ended, in MiB."""
    kib = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    own, ended = (resource.getrusage(who).ru_maxrss * kib for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")  # the figure above has that of whoever started this process in it
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        own = 1024 * int(found[1])
    return own / 2**20, ended / 2**20


def run_shards(
    work: Work, job: Job, shards: Sequence[Shard], result: Callable[[Shard], Path], what: str, workers: int
) -> None:
    """Do `work`, a function of a module, on each shard whose `result` does not exist, in up to `workers` processes.

    The first error is raised, RuntimeError for a process that died.
    """
    left = [shard for shard in shards if not result(shard).exists()]
    for _ in track(run_in_order(work, job, left, workers), what, len(shards), done=len(shards) - len(left)):
        pass


def run_in_order(work: Callable[[Any, Any], Any], job: Any, items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield `work(job, item)` for each item, in their order."""
    if workers < 2 or len(items) < 2:
        yield from (_do(work, job, item) for item in items)
        return
    mine, started = threading.local(), []

    def ask(item: Any) -> Any:
        if not hasattr(mine, "worker"):
            mine.worker = _Worker()
            started.append(mine.worker)
        return mine.worker.ask((work, job, item))

    with concurrent.futures.ThreadPoolExecutor(min(workers, len(items))) as threads:
        futures = [threads.submit(ask, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in started:
                worker.close()


def _do(work: Callable[[Any, Any], Any], job: Any, item: Any) -> Any:
    """Do work that makes millions of small objects and no cycles: looking for those takes a sixth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return work(job, item)
    finally:
        if was_on:
            gc.enable()


class _Worker:
    """A process that does what it is asked."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
        )

    def ask(self, request: Any) -> Any:
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            error, value = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            hint = ": memory may have run out, name fewer --workers" if code == -9 else ""
            raise RuntimeError(f"a worker process died with exit code {code}{hint}") from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        self._process.kill()  # between two shards, or given up: what it writes is whole or not there
        self._process.communicate()


def serve() -> None:
    """Do what the pipe on stdin asks for, one request after the other, until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, whose end is ours
    while True:
        try:
            work, job, item = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = None, _do(work, job, item)
        except Exception as error:  # noqa: BLE001  it is raised where it is asked for
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            answer = error, None
        pickle.dump(answer, answers)
        answers.flush()

