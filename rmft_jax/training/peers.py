"""The processes of one run keep an eye on each other: when one is gone or stuck, the others end and say which."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time

import jax

from rmft_jax.errors import UserError

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with this process, the same command may well succeed
_PREFIX = "rmft_jax/peers"


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


class Peers:
    """A context in which a thread of each process tells the others how far it is, through JAX's coordination service.

    A process that gives no sign for `timeout` seconds is gone; one that is a dispatch behind for five times as long is
    stuck. Then the others print one line with its number and host, and exit with code 75, whatever they wait for. With one
    process nothing is done.
    """

    def __init__(self, timeout: float):
        self._timeout, self._dispatches = timeout, 0
        self._ended = threading.Event()
        self._me, self._count = jax.process_index(), jax.process_count()
        self._seen: dict[int, tuple[str, float]] = {}  # sign of life, and when it last changed
        self._behind: dict[int, float] = {}  # since when
        self._hosts: dict[int, str] = {}
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._aborted())

    def __enter__(self) -> Peers:
        if self._count > 1:
            threading.Thread(target=self._watch, daemon=True, name="peers").start()
            # JAX aborts as soon as the coordinating process is gone. Python's own handlers never run after an abort.
            ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError) and self._count > 1:
            time.sleep(2 * self._timeout)  # most likely a connection to a process that is gone: the thread will name it
        if self._count > 1:
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._ended.set()

    def advance(self) -> None:
        """Note that one more dispatch has been handed over."""
        self._dispatches += 1

    def _watch(self) -> None:
        from jax._src import distributed  # there is no public way to the service

        client, beat, answered = distributed.global_state.client, 0, time.monotonic()
        while not self._ended.wait(self._timeout / 6):
            beat, now = beat + 1, time.monotonic()
            sign = f"{beat} {self._dispatches} {socket.gethostname()}"
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

    def _judge(self, process: int, sign: str, now: float) -> None:
        before, since = self._seen.get(process, ("", now))
        if sign != before or process not in self._seen:
            self._seen[process] = (sign, now)
            since = now
        if now - since >= self._timeout:
            self._end(process, f"has given no sign of life for {now - since:.0f} s")
        if not sign:
            return
        _, dispatches, host = sign.split(maxsplit=2)
        self._hosts[process] = host
        if int(dispatches) < self._dispatches:
            since = self._behind.setdefault(process, now)
            if now - since >= 5 * self._timeout:
                self._end(process, f"is stuck at dispatch {dispatches}, the others at {self._dispatches}")
        else:
            self._behind.pop(process, None)

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
        if self._ended.is_set():
            return
        host = f" on {self._hosts[process]}" if process in self._hosts else ""
        print(
            f"error: process {process} of {self._count}{host} {why}: process {self._me} ends too; start all of them again, "
            f"they go on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)
