"""The processes of one run keep an eye on each other: when one is gone or stuck, the others end and say which."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping

import jax

from rmft_jax.errors import Preempted, UserError
from rmft_jax.processes import barrier
from rmft_jax.progress import say

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with this process, the same command may well succeed
_PREFIX = "rmft_jax/peers"
_WARN_EVERY = 600  # seconds


def peer_timeout() -> float:
    """Return the seconds without a sign of life after which a process counts as gone: RMFT_PEER_TIMEOUT, else 60.

    Raises UserError unless it is a number from 1 on.
    """
    told = os.environ.get("RMFT_PEER_TIMEOUT", "60")
    try:
        seconds = float(told)
    except ValueError:
        seconds = 0.0
    if not seconds >= 1:
        raise UserError(f"RMFT_PEER_TIMEOUT is {told!r}: set it to seconds, 1 or more")
    return seconds


def stragglers(seconds: Mapping[int, float], step: float) -> list[int]:
    """Return the processes whose hosts hold the others up.

    Args:
      seconds: of each process, what its host works for a dispatch (input, handing over) rather than wait for devices.
      step: seconds of a dispatch.

    A straggler takes over twice the median of the others, and over a fifth of a dispatch. One whose devices are slow does
    not show: in collectives all devices wait for the slowest.
    """
    found = []
    for process, own in seconds.items():
        others = [value for other, value in seconds.items() if other != process]
        if others and own > 2 * statistics.median(others) and own > step / 5:
            found.append(process)
    return found


class Peers:
    """A context in which a thread of each process tells the others how far it is, through JAX's coordination service.

    A process that gives no sign for `timeout` seconds is gone; one that is a dispatch behind for five times as long is
    stuck. Then the others print one line with its number and host, and exit with code 75, whatever they wait for. With one
    process nothing is done.
    """

    def __init__(self, timeout: float):
        self._timeout, self._dispatches = timeout, 0
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._me, self._count = jax.process_index(), jax.process_count()
        self._seen: dict[int, tuple[str, float]] = {}  # sign of life, and when it last changed
        self._heard: Counter[int] = Counter()  # signs
        self._behind: dict[int, float] = {}  # since when
        self._hosts: dict[int, str] = {}
        self._work, self._began, self._warned = 0.0, 0.0, 0.0
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._aborted())

    def __enter__(self) -> Peers:
        if self._count > 1:
            barrier("the first step")  # who starts later than others is not gone
            threading.Thread(target=self._watch, daemon=True, name="peers").start()
            # JAX aborts as soon as the coordinating process is gone. Python's own handlers never run after an abort.
            ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._count > 1:
            if kind is not None and issubclass(kind, Exception) and not issubclass(kind, (UserError, Preempted)):
                self._wait_for_signs()  # most likely a connection to a process that is gone: the thread will name it
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._ended.set()

    def _wait_for_signs(self) -> None:
        """Return once all others have given two signs from now on, or when the thread should have found one gone by far.

        One sign is not enough: a process that is gone may have left one that has not been looked at yet.
        """
        failed, heard = time.monotonic(), self._heard.copy()
        while time.monotonic() - failed < 3 * self._timeout:
            if all(self._heard[process] > heard[process] + 1 for process in range(self._count) if process != self._me):
                return
            time.sleep(self._timeout / 20)

    def advance(self, work: float = 0.0) -> None:
        """Note that one more dispatch has been handed over, which took the host `work` seconds."""
        self._began = self._began or time.monotonic()
        self._work = work if self._dispatches < 2 else 0.9 * self._work + 0.1 * work  # the first one compiles
        self._dispatches += 1

    def _watch(self) -> None:
        from jax._src import distributed  # there is no public way to the service

        client, beat, answered = distributed.global_state.client, 0, time.monotonic()
        while not self._ended.wait(self._timeout / 6):
            beat, now = beat + 1, time.monotonic()
            sign = f"{beat} {self._dispatches} {self._work:.6f} {socket.gethostname()}"
            try:
                client.key_value_set(f"{_PREFIX}/{self._me}", sign, allow_overwrite=True)
                signs = dict(client.key_value_dir_get(_PREFIX))
                answered = now
            except Exception:  # whatever the transport makes of a service that is gone
                if now - answered >= self._timeout:
                    self._end(0, f"which coordinates the run, has not answered for {now - answered:.0f} s")
                continue
            for process in range(self._count):
                self._judge(process, signs.get(f"{_PREFIX}/{process}", ""), now)
            self._look_for_stragglers(signs, now)

    def _judge(self, process: int, sign: str, now: float) -> None:
        before, since = self._seen.get(process, ("", now))
        if sign != before or process not in self._seen:
            self._seen[process] = (sign, now)
            self._heard[process] += 1
            since = now
        if now - since >= self._timeout:
            self._end(process, f"has given no sign of life for {now - since:.0f} s")
        if not sign:
            return
        _, dispatches, _, host = sign.split(maxsplit=3)
        self._hosts[process] = host
        if int(dispatches) < self._dispatches:
            since = self._behind.setdefault(process, now)
            if now - since >= 5 * self._timeout:
                self._end(process, f"is stuck at dispatch {dispatches}, the others at {self._dispatches}")
        else:
            self._behind.pop(process, None)

    def _look_for_stragglers(self, signs: Mapping[str, str], now: float) -> None:
        if self._me or self._dispatches < 20 or now - self._warned < _WARN_EVERY:
            return
        work = {int(key.rsplit("/", 1)[1]): float(sign.split()[2]) for key, sign in signs.items()}
        step = (now - self._began) / self._dispatches
        for process in stragglers(work, step):
            self._warned = now
            say(f"warning: process {process} on {self._hosts.get(process)} holds the others up: its host works "
                f"{work[process]:.3f} s for each dispatch of {step:.3f} s; look at what else runs there, and at its storage",
                always=True)  # fmt: skip

    def _aborted(self) -> None:
        from jax._src import distributed

        host, port = distributed.global_state.coordinator_address.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            process = min(self._seen, key=lambda peer: self._seen[peer][1], default=0)
        except OSError:
            process = 0
        self._end(process, "has left the run")

    def _end(self, process: int, why: str) -> None:
        self._ending.acquire()  # for good: who comes second waits for the end
        if self._ended.is_set():
            return
        host = f" on {self._hosts[process]}" if process in self._hosts else ""
        print(
            f"error: process {process} of {self._count}{host} {why}: process {self._me} ends too; start all of them again, "
            f"they go on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if self._me == 0 and process:
            time.sleep(self._timeout / 2)  # the others look for signs at process 0: without it they would name that one
        os._exit(EXIT_CODE)
