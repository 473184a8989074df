"""A parity case, and the report of how far our numbers are from its."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np


class Unsupported(Exception):
    """The case needs something that is not there (yet); the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays and description, as `NAME.npz` and `NAME.json` hold them.

    Attributes:
      name: NAME.
      meta: the json.
      arrays: the npz, by full name (`out/logits`).
      folder: where they were, and where weight files may lie that the json lists under `files`.
    """

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path = Path()

    @classmethod
    def load(cls, npz: Path) -> 'Case':
        """Reads a pair of files; never unpickles."""
        meta = json.loads(npz.with_suffix('.json').read_text())
        if not isinstance(meta, dict):
            raise Unsupported('its json is not an object')
        with np.load(npz, allow_pickle=False) as file:
            return cls(npz.stem, meta, {name: file[name] for name in file.files}, npz.parent)

    @property
    def files(self) -> list[Path]:
        """The weight files of the case that lie beside it."""
        paths = (self.folder / name for name in self.meta.get('files', ()))
        return [path for path in paths if path.exists()]

    @property
    def config(self) -> dict[str, Any]:
        """The `config` of the json, empty if there is none."""
        config = self.meta.get('config')
        return config if isinstance(config, dict) else {}

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, without it."""
        start = f'{prefix}/'
        return {name.removeprefix(start): a for name, a in self.arrays.items() if name.startswith(start)}


class Report:
    """Collects comparisons: the largest error of every group, and everything out of tolerance."""

    def __init__(self):
        self.errors: dict[str, float] = {}
        self.failures: list[str] = []

    def compare(self, group: str, name: str, ours: Any, theirs: np.ndarray, atol: float = 0.0, rtol: float = 0.0):
        """Records |ours - theirs| <= atol + rtol |theirs|; the error shown is relative where atol is 0."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            self.fail(f'{name} has shape {list(ours.shape)}, expected {list(theirs.shape)}')
            return
        distance = np.abs(ours - theirs)
        if atol == 0.0:
            distance = np.where(distance == 0, 0.0, distance / np.maximum(np.abs(theirs), np.finfo(np.float64).tiny))
        allowed = rtol if atol == 0.0 else atol + rtol * np.abs(theirs)
        worst = float(distance.max(initial=0.0))
        self.errors[group] = float(np.fmax(self.errors.get(group, 0.0), worst))
        if not (distance <= allowed).all():  # false for NaN too
            tolerance = (
                f'rtol {rtol:.0e}' if atol == 0.0 else f'atol {atol:.0e}' + (f' rtol {rtol:.0e}' if rtol else '')
            )
            self.fail(f'{name} error {worst:.1e} tolerance {tolerance}')

    def fail(self, message: str) -> None:
        """Records something that is wrong."""
        self.failures.append(message)

    def line(self) -> str:
        """`ok  ...` with the errors, or `FAIL  ...` with what is wrong."""
        if self.failures:
            shown = '; '.join(self.failures[:3])
            return f'FAIL  {shown}' + (f'; and {len(self.failures) - 3} more' if len(self.failures) > 3 else '')
        return 'ok  ' + ' '.join(f'{group} {error:.0e}' for group, error in self.errors.items())
