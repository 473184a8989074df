"""The comparison of many trials as one program with single commands."""

import pytest

from experiments.trials import together, trials
from vpt_jax.errors import UsageError


def test_trials_are_a_grid_with_one_seed():
    made = trials(24)
    assert len({trial.key for trial in made}) == 24 and {trial.seed for trial in made} == {0}
    with pytest.raises(UsageError, match='--trials=99: at most 36'):
        trials(99)


@pytest.mark.slow
def test_all_run_as_one_program(tmp_path, capsys):
    together(2, 3, tmp_path)
    assert capsys.readouterr().out.count('val') == 2
