"""Learning-rate tables: VPT's factors (`out/lr_factor_w{warm-up}_t{epochs}`), and the rates of PGN, VP and ILM-VP."""

import re

import numpy as np

from tests.parity.case import Case, Report, Unsupported
from vpt_jax.training import schedule

RTOL, ATOL = 1e-6, 1e-7
_NUMBER = r'([\d.]+(?:e-?\d+)?)'
# The reference's names, and the schedule, highest rate, warm-up, length and steps an epoch that they stand for.
_TABLES = (
    (r'lr_factor_w(\d+)_t(\d+)', lambda w, t: ('cosine', 1, w, t, 1)),
    (rf'pgn_warmup_cosine_W(\d+)_T(\d+)_lr{_NUMBER}', lambda w, t, lr: ('pgn', lr, w, t, 1)),
    # In steps: one epoch of one step each is the same thing.
    (rf'vp_cosine_warm(\d+)_total(\d+)_lr{_NUMBER}', lambda w, t, lr: ('vp', lr, w, t, 1)),
    (rf'ilm_multistep_E(\d+)_lr{_NUMBER}', lambda t, lr: ('multistep', lr, 0, t, 1)),
)


def _table(name: str) -> tuple | None:
    for pattern, arguments in _TABLES:
        found = re.fullmatch(pattern, name)
        if found:
            return arguments(*map(float, found.groups()))
    return None


def claims(case: Case) -> bool:
    """Cases all of whose outputs look like such tables; the json lists them."""
    names = [name for name in case.meta.get('arrays', case.arrays) if name.startswith('out/')]
    starts = ('out/lr_factor_', 'out/pgn_warmup_cosine_', 'out/vp_cosine_', 'out/ilm_multistep_')
    return bool(names) and all(name.startswith(starts) for name in names)


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    for name, theirs in case.group('out').items():
        arguments = _table(name)
        if arguments is None:
            raise Unsupported(f'array out/{name}')
        kind, rest = arguments[0], arguments[1:]
        ours = schedule.rate(kind, np.arange(len(theirs)), *rest)
        # Relative to the highest rate: near the end of a cosine, float32 has few digits left.
        report.compare('lr_factor', f'out/{name}', ours / rest[0], theirs / rest[0], ATOL, RTOL)
