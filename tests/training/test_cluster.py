"""Sweeps by jobs: what the process that waits for them does. `tests/test_sweep_cli.py` runs real jobs."""

import json
import subprocess
import threading

import pytest

from configs import linear
from vpt_jax.errors import UsageError
from vpt_jax.training import cluster


def test_a_job_that_is_under_way_is_waited_for(npz, tmp_path, monkeypatch):
    job = subprocess.Popen(['sleep', '1'])
    threading.Thread(target=job.wait).start()
    (tmp_path / 'jobs').mkdir()
    (tmp_path / 'jobs' / 'submitted.json').write_text(json.dumps({npz: str(job.pid)}))
    monkeypatch.setattr(cluster, '_problem', lambda job: f'{job.job_id} left nothing')
    lines = []
    with pytest.raises(UsageError, match=f'1 of 1 tasks failed .patterns: {job.pid} left nothing') as error:
        cluster.sweep_by_jobs(linear.get_config(f'dataset={npz}'), {npz: 'Natural'}, tmp_path, 'local', {},
                              say=lines.append)  # fmt: skip
    assert 'the same command goes on' in str(error.value)
    assert job.returncode == 0
    assert lines[0] == f'patterns: job {job.pid} is under way already' and not any('submitted' in x for x in lines)


def test_options_are_read_as_values():
    given = ['timeout_min=600', 'slurm_partition=gpu', 'mem_gb=1.5']
    assert cluster.read_options(given) == {'timeout_min': 600, 'slurm_partition': 'gpu', 'mem_gb': 1.5}
    with pytest.raises(UsageError, match="got 'gpu'"):
        cluster.read_options(['gpu'])
