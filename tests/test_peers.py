"""An error in a run of several processes: it is raised at once where all live, and waits for the watch where one is gone."""

import threading
import time

import pytest

from rmft_jax.errors import UserError
from rmft_jax.training.peers import Peers


@pytest.fixture
def peers():
    """Return Peers that watch in vain over two others, none of whom is heard yet."""
    peers = Peers(timeout=1.0)
    peers._count, peers._me = 3, 0
    for process in range(3):
        peers._judge(process, "1 0 0.0 host", time.monotonic())
    return peers


def leave(peers, error) -> float:
    """Return the seconds that an error takes to get through."""
    begin = time.monotonic()
    peers.__exit__(type(error), error, None)
    return time.monotonic() - begin


def hear(peers, *processes, signs=40) -> None:
    """Let so many signs of these processes come from now on."""

    def come():
        for beat in range(signs):
            time.sleep(0.1)
            for process in processes:
                peers._judge(process, f"{beat + 2} 0 0.0 host", time.monotonic())

    threading.Thread(target=come, daemon=True).start()


def test_an_error_of_whatever_kind_waits_for_the_signs_of_all(peers):
    hear(peers, 1, 2)
    assert 0.05 < leave(peers, ValueError("of an own mistake")) < 2


def test_where_one_is_not_heard_it_waits_for_the_watch_to_end_the_process(peers):
    hear(peers, 1)
    hear(peers, 2, signs=1)  # left before it was gone
    assert leave(peers, ValueError("a barrier of a save that 2 did not come to")) >= 3


def test_a_mistake_of_the_user_does_not_wait(peers):
    assert leave(peers, UserError("lower training.batch_size")) < 0.5
