"""The short form of `python -m tests.kill`."""

import pytest

from tests.kill import check


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path, capsys):
    assert check(2, 1, tmp_path) == 0, capsys.readouterr().out
