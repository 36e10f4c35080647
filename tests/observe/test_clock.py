"""Clock: phases add up to wall time, also nested and after an exception."""

import time

from megatron_vrl.observe.clock import Clock, peak_rss_bytes


def test_phases_add_up_to_the_wall_time_even_when_nested() -> None:
    began = time.perf_counter()
    clock = Clock()
    with clock("outer"):
        time.sleep(0.01)
        with clock("inner"):
            time.sleep(0.02)
    taken = clock.take()
    wall_s = time.perf_counter() - began
    assert set(taken) == {"other", "outer", "inner"}
    assert taken["inner"] >= 0.02 and taken["outer"] >= 0.01
    assert sum(taken.values()) <= wall_s


def test_a_phase_that_raises_is_still_counted_and_left() -> None:
    clock = Clock()
    try:
        with clock("broken"):
            time.sleep(0.01)
            raise ValueError
    except ValueError:
        time.sleep(0.01)
    taken = clock.take()
    assert taken["broken"] >= 0.01 and taken["other"] >= 0.01
    assert "broken" not in clock.take()


def test_peak_rss_grows_with_an_allocation_and_never_falls() -> None:
    before = peak_rss_bytes()
    block = bytearray(before)  # as much again as was ever held, so the peak must move
    block[::4096] = b"x" * len(block[::4096])
    grown = peak_rss_bytes()
    del block
    assert grown >= before * 1.5
    assert peak_rss_bytes() >= grown
