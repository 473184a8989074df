import threading
import time

import pytest

from vpt_jax.data import Prefetch, WaitMeter


def test_results_come_in_order_whatever_takes_longest():
    def make(t):
        time.sleep(0.002 * (t % 3))
        return t * t

    with Prefetch(make, range(20), threads=3) as results:
        assert list(results) == [t * t for t in range(20)]


def test_calls_run_ahead_but_not_far():
    made = []
    with Prefetch(made.append, range(100), threads=1, ahead=4) as results:
        next(results)
        time.sleep(0.1)
        assert 2 <= len(made) <= 6


def test_leaving_early_stops_the_threads():
    with Prefetch(lambda t: t, range(10**6)) as results:
        assert next(results) == 0
    assert not [t for t in threading.enumerate() if t.name.startswith('prefetch')]


def test_an_exception_comes_where_its_result_would():
    def make(t):
        if t == 3:
            raise ValueError('three')
        return t

    with Prefetch(make, range(9)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match='three'):
            next(results)


def test_waiting_is_measured():
    with Prefetch(lambda t: time.sleep(0.05), range(1)) as results:
        next(results)
        assert 0.02 < results.waited < 1


def test_waiting_counts_only_while_the_device_is_idle():
    meter = WaitMeter()
    meter.add(100.0, device_is_idle=False)
    assert meter.share == 0
    meter.add(100.0, device_is_idle=True)
    assert meter.share == 1
    meter.restart()
    assert meter.share == 0
