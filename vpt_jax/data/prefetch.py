"""Batches made in the background, so that reading never makes an accelerator wait."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Prefetch:
    """Calls a function ahead of time, in threads, and hands out the results in order; a context manager.

    The function must depend on its argument only, as `Batches.batch` does: then it makes no difference to what comes
    out that several calls run at once, or that an interrupted run made some in vain.

    Args:
      make: what is computed, for instance `batches.batch`; called from several threads.
      arguments: of the calls, in order.
      threads: how many calls run at once.
      ahead: how many results are held at most; they take memory.
    """

    def __init__(self, make: Callable[[Any], Any], arguments: Iterable[Any], threads: int = 0, ahead: int = 0):
        threads = threads or min(4, os.cpu_count() or 1)
        self._make, self._arguments = make, iter(arguments)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix='prefetch')
        self._ahead: deque = deque()
        for _ in range(ahead or 2 * threads):
            self._submit()
        #: Seconds that the last `next` waited.
        self.waited = 0.0

    def _submit(self) -> None:
        for argument in self._arguments:
            self._ahead.append(self._pool.submit(self._make, argument))
            return

    def __iter__(self) -> 'Prefetch':
        return self

    def __next__(self) -> Any:
        """The next result; raises what its call raised."""
        if not self._ahead:
            raise StopIteration
        began = time.perf_counter()
        result = self._ahead.popleft().result()
        self.waited = time.perf_counter() - began
        self._submit()
        return result

    def __enter__(self) -> 'Prefetch':
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)


class WaitMeter:
    """The share of a run's time in which the device had nothing to do because the next batch was not there.

    The host runs ahead of the device: as long as an earlier step is still being computed, waiting costs nothing. A wait
    during which the device became idle is counted in full, so the share is an upper bound.
    """

    def __init__(self):
        self._seconds, self._began = 0.0, time.perf_counter()

    def restart(self) -> None:
        """Forgets what was before (the compilation of the first step)."""
        self._seconds, self._began = 0.0, time.perf_counter()

    def add(self, seconds: float, device_is_idle: bool) -> None:
        """Tells of one wait, and whether the device had finished everything when it was over."""
        if device_is_idle:
            self._seconds += seconds

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return min(self._seconds / max(time.perf_counter() - self._began, 1e-9), 1.0)
