"""The short form of `python -m tests.kill`."""

import pytest

from tests.kill import check


def test_a_killed_run_ends_with_the_same_bits(tmp_path, capsys):
    assert check(1, 2, tmp_path) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_many_killed_runs_end_with_the_same_bits(tmp_path, capsys):
    assert check(8, 1, tmp_path) == 0, capsys.readouterr().out
