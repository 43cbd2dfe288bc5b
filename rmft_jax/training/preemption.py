"""The notice that schedulers give before they take a machine away."""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context that notes SIGTERM rather than dying of it.

    One of several processes hears of what another one was told, and all of them stop after the same dispatch. Outside the
    main thread of a process nothing is noted.
    """

    def __init__(self) -> None:
        self._told, self._asked, self._before = False, 0, None

    def __enter__(self) -> Preemption:
        # where processes work together JAX has a handler of its own
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def notified(self) -> bool:
        """Return whether to save and stop now. To be asked once after each dispatch, by every process."""
        self._asked += 1
        return self._told or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._asked))

    def _note(self, *_: object) -> None:
        self._told = True
