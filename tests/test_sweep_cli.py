"""`vpt_jax.sweep` and `vpt_jax.fetch` from the command line, and benchmarks in `vpt_jax.train`."""

import json

import pytest
from PIL import Image

from tests.commands import Commands, write_task
from tests.training.conftest import arrays


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('sweep')


@pytest.fixture(scope='module')
def command(place):
    with Commands() as commands:
        yield commands


@pytest.fixture(scope='module')
def backbone(place):
    return write_task(place)[0]


@pytest.fixture(scope='module')
def vtab(place):
    """Two tasks of VTAB-1k in the folder form, tiny: the folder they are under."""
    made = arrays((24, 8, 12), classes=2)
    for name in ('patch_camelyon', 'eurosat'):
        root = place / 'data' / 'vtab-1k' / name
        (root / 'images').mkdir(parents=True)
        lines = [[], [], []]
        rows = zip(made['images'], made['labels'], made['split'], strict=True)
        for i, (image, label, split) in enumerate(rows):
            Image.fromarray(image).save(root / 'images' / f'{i}.png')
            lines[split].append(f'images/{i}.png {label}')
        for split, part in zip(('train800', 'val200', 'test'), lines, strict=True):
            (root / f'{split}.txt').write_text('\n'.join(part))
    return place / 'data'


def refused(done, *parts):
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stdout + done.stderr
    for part in ('error: ', *parts):
        assert part in done.stderr


def test_a_benchmark_is_a_name(command, backbone, vtab, place):
    arguments = (
        f'--config=configs/linear.py:benchmark=vtab,backbone={backbone}', f'--config.data.dir={vtab}',
        '--tasks=patch_camelyon,eurosat', '--seeds=2', '--config.train.epochs=5', '--config.train.warmup_epochs=1',
        '--config.train.batch_size=8', f'--workdir={place / "run"}',
    )  # fmt: skip
    done = command('sweep', *arguments)
    assert done.returncode == 0, done.stderr
    assert 'vtab:patch_camelyon search 40/40' in done.stdout and 'vtab:eurosat final 2/2' in done.stdout
    table = json.loads((place / 'run' / 'table.json').read_text())
    assert [row['task'] for row in table['tasks']] == ['vtab:patch_camelyon', 'vtab:eurosat']
    assert table['tasks'][0]['data_source'] == f'lists {vtab}/vtab-1k/patch_camelyon'
    assert table['published']['Linear, vit_b16_in21k (published)']['tasks']['vtab:eurosat'] == 87.5
    assert (place / 'run' / 'table.md').read_text() in done.stdout
    again = command('sweep', *arguments)
    assert again.returncode == 0 and 'search' not in again.stdout.replace('settings', '')
    assert json.loads((place / 'run' / 'table.json').read_text()) == table


def test_a_job_for_every_task(command, backbone, vtab, place):
    """The second time one task is left to do, and the first one's job finds its work done."""
    arguments = (
        f'--config=configs/linear.py:benchmark=vtab,backbone={backbone}', f'--config.data.dir={vtab}',
        '--tasks=patch_camelyon,eurosat', '--seeds=2', '--config.train.epochs=5', '--config.train.warmup_epochs=1',
        '--config.train.batch_size=8',
    )  # fmt: skip
    done = command('sweep', *arguments, '--launcher=local', '--jobs=1', f'--workdir={place / "jobs"}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'vtab:patch_camelyon: submitted job' in done.stdout and 'vtab:eurosat: submitted job' in done.stdout
    alone = command('sweep', *arguments, f'--workdir={place / "run"}')
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (json.loads((place / name / 'table.json').read_text()) for name in ('jobs', 'run'))
    assert ours == theirs and [row['task'] for row in ours['tasks']] == ['vtab:patch_camelyon', 'vtab:eurosat']
    # By one process it is the same sweep: nothing is done again.
    again = command('sweep', *arguments, f'--workdir={place / "jobs"}')
    assert again.returncode == 0 and 'search 1/' not in again.stdout
    broken = place / 'jobs' / 'vtab_eurosat' / 'trials' / 'final'
    next(broken.glob('*.json')).write_text('{')
    failed = command('sweep', *arguments, '--launcher=local', f'--workdir={place / "jobs"}')
    refused(failed, '1 of 2 tasks failed (vtab:eurosat: it was stopped or ended with an error, see')


def test_bad_launchers_are_refused(command, backbone, vtab, place):
    config = (f'--config=configs/linear.py:benchmark=vtab,backbone={backbone}', f'--config.data.dir={vtab}',
              '--tasks=eurosat', f'--workdir={place / "refused"}')  # fmt: skip
    refused(command('sweep', *config, '--launcher=slrum'), "unknown launcher 'slrum': did you mean 'slurm'")
    refused(command('sweep', *config, '--launcher=local', '--launcher_options=timeout'), 'name=value', "'timeout'")
    refused(command('sweep', *config, '--launcher=local', '--launcher_options=timeout_mins=3'), 'timeout_mins')


def test_what_is_missing_is_said_at_once(command, backbone, vtab, place):
    config = f'--config=configs/vapt.py:benchmark=vtab,backbone={backbone}'
    done = command('sweep', config, f'--config.data.dir={vtab}', f'--workdir={place / "missing"}')
    refused(done, 'vtab:cifar100 is not on this machine', 'python -m vpt_jax.fetch vtab:cifar100', '161 MiB')
    refused(command('sweep', config, '--tasks=cifar1000'), "unknown task 'cifar1000'")
    refused(command('sweep', config, '--seeds=9'), '--seeds=9')
    refused(command('sweep', '--config=configs/vapt.py'), 'say which benchmark')
    refused(command('sweep', '--config=configs/vapt.py:benchmark=vatb'), "unknown benchmark 'vatb'")
    refused(command('train', config), 'benchmark=vtab is for `python -m vpt_jax.sweep`')
    refused(command('train', '--config=configs/vapt.py:benchmark=vtab,dataset=digits'), 'not both')


def test_one_task_is_trained_as_the_benchmark_has_it(command, backbone, vtab, place):
    done = command(
        'train', f'--config=configs/linear.py:dataset=vtab:eurosat,backbone={backbone}', f'--config.data.dir={vtab}',
        '--config.data.train_on=train+val', '--config.data.normalise=half', '--config.train.epochs=2',
        '--config.train.warmup_epochs=1', '--config.train.batch_size=8', f'--workdir={place / "one"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((place / 'one' / 'result.json').read_text())
    assert result['dataset'] == 'vtab:eurosat+val' and result['classes'] == 10 and result['test_examples'] == 12
    assert result['normalisation'] == {'mean': [0.5] * 3, 'std': [0.5] * 3} and result['resize'] == 'vtab'
    assert result['data_source'] == f'lists {vtab}/vtab-1k/eurosat' and 'val_accuracy' not in result
    assert 0 <= result['share_of_time_waiting_for_data'] <= 1


def test_fetch(command, place):
    refused(command('fetch'), 'say what to fetch')
    refused(command('fetch', 'fgvc:nabirds', f'--data_dir={place}'), 'nabirds.tar.gz', 'not for commercial use')
    refused(command('fetch', 'vtab:nothing', f'--data_dir={place}'), "unknown task of vtab 'nothing'")
