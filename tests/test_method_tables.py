"""docs/methods.md says what the code says."""

import pytest

from experiments.method_tables import PAGE, ROWS, TABLES, main, matrix, section, trained
from vpt_jax.errors import UsageError
from vpt_jax.methods import METHODS

COSTS = {line.split('|')[1].strip(): line for line in section(PAGE.read_text(), 'costs').split('\n')[2:]}


def test_the_matrix_is_todays():
    """Which cells train is tested with the methods; here, which are refused, and for want of what."""
    assert section(PAGE.read_text(), 'matrix') == matrix()


def test_every_method_has_a_row():
    assert not [name for name in METHODS if not any(f'`{name}`' in row for row in COSTS)]
    assert not set(ROWS) - set(COSTS)


@pytest.mark.parametrize('row', ['`vapt`', '`condensed`', '`vptm`', '`cvpt`'])
def test_trained_parameters_are_todays(row):
    for method in ROWS[row].values():
        assert f'{trained(method):,}' in COSTS[row].split('|')[5]


def test_names_of_tables():
    with pytest.raises(UsageError, match="unknown table 'matrx': did you mean 'matrix'"):
        main(['matrx'])
    with pytest.raises(UsageError, match='has no <!-- matrix -->'):
        section('', 'matrix')
    assert set(TABLES) == {'matrix', 'costs', 'ap'}
