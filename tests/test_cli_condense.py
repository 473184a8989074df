"""`python -m vpt_jax.condense`: from a run to condensed runs that the other programs read."""

import json

import pytest

from tests.commands import Commands, write_task


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('condense')


@pytest.fixture(scope='module')
def command(place):
    with Commands() as commands:
        yield commands


@pytest.fixture(scope='module')
def run(place, command):
    """The folder of a finished run of VPT-deep."""
    backbone, dataset = write_task(place)
    done = command(
        'train', f'--config=configs/vpt_deep.py:dataset=npz:{dataset},backbone={backbone}',
        f'--workdir={place / "run"}',
        '--config.method.num_tokens=4', '--config.train.epochs=4', '--config.train.warmup_epochs=1',
        '--config.train.batch_size=8', '--config.optim.lr=4', '--config.train.linear_probe=False',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place / 'run'


def test_two_ratios_make_a_table_and_prompts_that_evaluate_reads(run, place, command):
    backbone = f'--backbone={place / "tiny.npz"}'
    done = command('condense', f'--prompt={run}', '--keep=0.5,0.25', '--epochs=2', backbone, '--rank=per_layer')
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    head = next(i for i, line in enumerate(lines) if line[:2] == ['keep', 'prompts'])
    assert [line[:2] for line in lines[head + 1 : head + 4]] == [['all', '8'], ['0.5', '4'], ['0.25', '2']]
    assert [line[-2:] for line in lines[head + 2 : head + 4]] == [['2', '2'], ['1', '1']]
    table = json.loads((run / 'condensed' / 'table.json').read_text())
    assert [row['per_block'] for row in table['rows']] == [[4, 4], [2, 2], [1, 1]]
    shown = command('evaluate', f'--prompt={table["rows"][1]["prompt"]}', f'--dataset={table["dataset"]}', backbone)
    assert shown.returncode == 0, shown.stderr
    assert f'accuracy {100 * table["rows"][1]["accuracy"]:.2f}%' in shown.stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--keep=half'], '--keep takes shares of the prompts such as 0.3'),
        (['--keep=1.5'], 'the share of prompts to keep must be in (0, 1], got 1.5'),
        (['--keep=0.01'], 'keeping 0.01 of 8 prompts leaves none'),
        (['--rank=globl'], "unknown ranking 'globl': did you mean 'global'"),
        (['--score=taylr_token'], "unknown score of prompts 'taylr_token': did you mean 'taylor_token'"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(run, place, command, arguments, message):
    done = command('condense', f'--prompt={run}', f'--backbone={place / "tiny.npz"}', *arguments)
    assert done.returncode == 2
    assert message in done.stderr and 'Traceback' not in done.stderr
