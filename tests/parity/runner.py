"""Runs every case of a folder through the family that claims it."""

import dataclasses
import importlib
import os
import pkgutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import jax

from tests.parity import families
from tests.parity.case import Case, Report, Unsupported


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      name: of the case.
      status: 'ok', 'FAIL' or 'unsupported'.
      text: what to print behind the name.
    """

    name: str
    status: str
    text: str


def known_families() -> list[ModuleType]:
    """The modules of `tests.parity.families`."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return [importlib.import_module(f'{families.__name__}.{name}') for name in names]


def pairs(folder: Path) -> list[Path]:
    """The `.npz` files of a folder that have a `.json` beside them."""
    return sorted(path for path in folder.glob('*.npz') if path.with_suffix('.json').exists())


def run_folder(folder: Path, names: Collection[str] | None = None) -> Iterator[Outcome]:
    """Runs the cases of a folder, all or those named, in order of their names."""
    chosen = [path for path in pairs(folder) if names is None or path.stem in names]
    # Compilation is most of the work, and it leaves Python's lock to others.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(run_case, chosen)


def run_case(npz: Path) -> Outcome:
    """Runs one case; whatever it raises becomes a line."""
    report = Report()
    try:
        case = Case.load(npz)
        with jax.default_matmul_precision('highest'):
            _family(case)(case, report)
    except Unsupported as error:
        return Outcome(npz.stem, 'unsupported', f'unsupported: {error}')
    except Exception as error:  # a case must never take the others down with it
        reason = ' '.join(str(error).split()) or 'no message'
        return Outcome(npz.stem, 'FAIL', f'FAIL  {type(error).__name__}: {reason[:300]}')
    if not report.errors and not report.failures:
        report.fail('nothing was compared')
    return Outcome(npz.stem, 'FAIL' if report.failures else 'ok', report.line())


def _family(case: Case) -> Callable[[Case, Report], None]:
    for family in known_families():
        if family.claims(case):
            return family.run
    if 'backbone' in case.config:
        raise Unsupported(f'no reader for cases on the backbone {case.config["backbone"]!r} yet')
    for key in ('method', 'what', 'kind', 'family', 'reference'):
        if key in case.meta:
            raise Unsupported(f'no family of cases here covers the {key} {str(case.meta[key])!r} yet')
    raise Unsupported('no family of cases claims it')
