"""Factors of the learning rate, epoch by epoch: arrays called `out/lr_factor_w{warm-up}_t{epochs}`."""

import re

import numpy as np

from tests.parity.case import Case, Report, Unsupported
from vpt_jax.training.schedule import warmup_cosine

RTOL, ATOL = 1e-6, 1e-7
_NAME = re.compile(r'lr_factor_w(\d+)_t(\d+)')


def claims(case: Case) -> bool:
    """Cases all of whose outputs are such factors; the json lists them."""
    names = [name for name in case.meta.get('arrays', case.arrays) if name.startswith('out/')]
    return bool(names) and all(name.startswith('out/lr_factor_') for name in names)


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    for name, theirs in case.group('out').items():
        found = _NAME.fullmatch(name)
        if not found:
            raise Unsupported(f'array out/{name}')
        warmup, epochs = int(found[1]), int(found[2])
        ours = [warmup_cosine(epoch, warmup, epochs) for epoch in range(len(theirs))]
        report.compare('lr_factor', f'out/{name}', np.stack(ours), theirs, ATOL, RTOL)
