"""The run's folder: refusals before training, and damaged or half-written checkpoints."""

import shutil

import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.training import run_folder
from vpt_jax.training.run_folder import Progress, RunFolder


def state(value):
    # Random numbers, so that compression leaves bytes to damage.
    noise = np.random.default_rng(value).normal(size=(64, 64)).astype(np.float32)
    return {'step': np.array(value, np.int32), 'prompts': {'noise': noise}}


@pytest.fixture
def folder(tmp_path):
    """A run folder with checkpoints of steps 1 and 2."""
    run = RunFolder(tmp_path / 'run', {'a': 1})
    run.save(1, state(1))
    run.save(2, state(2))
    run.close()
    return run.path


def restored(path):
    """The step that a resumed run starts from; the arrays must be those of that step."""
    run = RunFolder(path, {'a': 1})
    try:
        got = run.restore(state(0))
        np.testing.assert_array_equal(got['prompts']['noise'], state(int(got['step']))['prompts']['noise'])
        return int(got['step'])
    finally:
        run.close()


def data_file(checkpoint):
    """The file that holds the arrays of a checkpoint: its largest."""
    return max((p for p in checkpoint.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint):
    path = data_file(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(checkpoint):
    path = data_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def lose_the_item(checkpoint):
    shutil.rmtree(checkpoint / 'default')


def lose_the_manifest(checkpoint):
    (checkpoint / 'default' / 'manifest.ocdbt').unlink()


def test_the_newest_checkpoint_is_restored(folder):
    assert restored(folder) == 2


def test_a_fresh_folder_starts_from_the_given_state(tmp_path):
    assert restored(tmp_path / 'new') == 0


@pytest.mark.parametrize('suffix', ['.orbax-checkpoint-tmp', '.orbax-checkpoint-tmp-1723'])
def test_a_half_written_checkpoint_is_invisible(folder, suffix):
    shutil.copytree(folder / 'checkpoints' / '2', folder / 'checkpoints' / f'3{suffix}')
    assert restored(folder) == 2


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, empty, lose_the_item, lose_the_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(folder, damage, capsys):
    damage(folder / 'checkpoints' / '2')
    assert restored(folder) == 1
    assert 'the checkpoint of step 2' in (warning := capsys.readouterr().err)
    assert 'is damaged' in warning
    assert 'going on from step 1' in warning
    # It is gone, so that the repeated step 2 can be saved.
    run = RunFolder(folder, {'a': 1})
    run.save(2, state(2))
    run.close()
    assert restored(folder) == 2


# Orbax leaves its event loop behind when it fails.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_nothing_but_damaged_checkpoints_is_an_error_that_removes_nothing(folder):
    for step in ('1', '2'):
        truncate(folder / 'checkpoints' / step)
    with pytest.raises(UsageError, match=r'no checkpoint in .* can be read \(step 2: .*remove that folder'):
        restored(folder)
    assert (folder / 'checkpoints' / '1').exists()
    assert (folder / 'checkpoints' / '2').exists()


def test_only_the_newest_are_kept(folder):
    run = RunFolder(folder, {'a': 1}, keep=2)
    run.save(3, state(3))
    run.close()
    assert sorted(p.name for p in (folder / 'checkpoints').iterdir()) == ['2', '3']


def test_a_folder_that_cannot_be_written_is_refused(fit, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(UsageError, match=r'cannot write to --workdir .*choose another folder'):
        fit(tmp_path / 'file' / 'run')


def test_a_disk_that_is_nearly_full_is_refused(fit, tmp_path, monkeypatch):
    usage = run_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    with pytest.raises(UsageError, match=r'0 MiB free, and this run needs about \d+ MiB'):
        fit(tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(folder, monkeypatch):
    run = RunFolder(folder, {'a': 1})

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(run._manager, 'save', full)
    with pytest.raises(UsageError, match=r'step 3 .*No space left.*last complete one is step 2'):
        run.save(3, state(3))
    run.close()
    assert restored(folder) == 2


def test_a_damaged_config_json_is_named(folder):
    (folder / 'config.json').write_text('{"a": ')
    with pytest.raises(UsageError, match=r'config\.json is not valid JSON'):
        RunFolder(folder, {'a': 1})


def test_metrics_beyond_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    run = RunFolder(tmp_path, {})
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 3}\n{"step": 4, "loss": 2}\n{"step": 5, "lo')
    run.open_metrics(3)
    run.log(4, {'loss': 2.5})
    run.close()
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "loss": 3}\n{"step": 4, "loss": 2.5}\n'


def test_progress_without_a_terminal_is_plain_lines(capsys):
    progress = Progress(total=10, start=0, images_per_step=4, every_seconds=0.0)
    progress.update(1)  # nothing measured yet: nothing to tell
    progress.update(5, {'loss': 0.51234})
    progress.update(10, {'loss': 0.25})
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith('step 5/10  loss 0.5123  ')
    assert first.endswith(' left')
    assert 'images/s' in first
    assert last.startswith('step 10/10  loss 0.25  ')
