"""Compares our numbers with those of the published implementations: `python -m tests.parity FOLDER`.

A case is `NAME.npz` (weights, inputs, the reference's outputs and gradients) and `NAME.json` (its configuration). One
line is printed a case: `ok` with the largest errors, `FAIL` with what is out of tolerance, or `unsupported` with the
reason. The exit status is 0, 1 if anything failed, 2 if there was nothing to run.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.parity.runner import pairs, run_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    parser = argparse.ArgumentParser(prog='python -m tests.parity', description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path, help='folder of cases: pairs of NAME.npz and NAME.json')
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        print(f'there is no folder {folder}', file=sys.stderr)
        return 2
    if not pairs(folder):
        print(f'{folder} holds no cases, that is, no pairs of NAME.npz and NAME.json', file=sys.stderr)
        return 2
    counts = Counter()
    for outcome in run_folder(folder):
        counts[outcome.status] += 1
        print(f'{outcome.name}  {outcome.text}', flush=True)
    print(', '.join(f'{counts[status]} {status}' for status in ('ok', 'FAIL', 'unsupported')))
    return 1 if counts['FAIL'] else 0


if __name__ == '__main__':
    sys.exit(main())
