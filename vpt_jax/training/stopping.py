"""SIGTERM and Ctrl-C as a request to save and stop after the current step."""

import signal
from pathlib import Path

from vpt_jax.training import distributed


class StoppedError(RuntimeError):
    """A signal ended the run after its state was saved. `signal` is its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


class StopRequest:
    """Catches the two signals inside a `with` block; outside the main thread they stay the caller's.

    Attributes:
      number: of the signal that came, 0 before. A second Ctrl-C is meant: it raises KeyboardInterrupt.
    """

    def __init__(self):
        self.number = 0
        self._before: dict = {}

    def __enter__(self) -> 'StopRequest':
        try:
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that was not set from Python, such as XLA's

    def _note(self, number: int, frame: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self, ask: bool) -> int:
        """The signal to stop for, 0 if none came.

        Several processes must stop at the same step: they exchange what they got, at those steps where `ask` is true.
        """
        if distributed.several():
            if not ask:
                return 0
            self.number = distributed.largest(self.number)
        return self.number

    def error(self, done: int, total: int, folder: Path) -> StoppedError:
        """The error to raise once step `done` of `total` is saved in `folder`."""
        name = signal.Signals(self.number).name
        return StoppedError(
            self.number,
            f'{name}: stopped after step {done} of {total}, which is saved in {folder}; run the same command again to '
            'resume',
        )
