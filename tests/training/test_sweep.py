"""Sweeps: what is tried, what is chosen, what is seen by whom, and that stopping makes no difference."""

import dataclasses
import json
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from configs import vapt, vpt_deep
from tests.training.test_resume import stop_at
from vpt_jax.errors import UsageError
from vpt_jax.sweep import choose_tasks, read_seeds
from vpt_jax.training import config as configs
from vpt_jax.training.linear_trials import linear_trials
from vpt_jax.training.stopping import StoppedError
from vpt_jax.training.sweep import GRIDS, SEEDS, benchmark_of, best, label, search_space, sweep
from vpt_jax.training.trials import Outcome, TaskRun, Trial, changed, run_trials


def settings(**changes):
    config = vpt_deep.get_config('dataset=npz:none')
    return changed(config, {f'sweep.{name}': value for name, value in changes.items()})


class Recorded:
    """An executor that trains nothing: accuracies by rate and decay; may be interrupted."""

    def __init__(self, accuracy=lambda lr, wd: 0.5, stop_after=None):
        self.accuracy, self.stop_after, self.ran = accuracy, stop_after, []

    def __call__(self, run: TaskRun, trials: Sequence[Trial]) -> Iterator[Outcome]:
        for trial in trials:
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append((label(run.config.dataset), trial.key))
            fields = dict(trial.changes)
            noise = 0 if trial.phase == 'search' else trial.seed / 10**4
            yield Outcome(trial, self.accuracy(fields['optim.lr'], fields['optim.weight_decay']) + noise, 196)


@pytest.fixture
def tasks(npz):
    return {npz: 'Natural'}


@pytest.fixture
def run(backbone, tasks, tmp_path):
    def start(execute, folder='sweep', config=None, **options):
        options = {'seeds': (42, 44)} | options
        config = config or settings(lr=(1.0, 5.0), weight_decay=(0.01, 0.0))
        return sweep(config, tasks, tmp_path / folder, execute=execute, backbone=backbone, say=lambda line: None,
                     **options)  # fmt: skip

    return start


def test_the_grids_are_the_published_ones():
    assert {name: len(lr) * len(wd) for name, (lr, wd) in GRIDS.items()} == {
        'prompt': 40, 'prompt_fgvc': 36, 'prompt_largerlr': 16, 'prompt_resnet': 36, 'linear': 40, 'linear_mae': 52,
        'finetune': 16, 'finetune_resnet': 32,
    }  # fmt: skip
    space = search_space(vapt.get_config('benchmark=vtab'))
    assert space[0] == (('optim.lr', 50.0), ('optim.weight_decay', 0.01))
    assert space[1] == (('optim.lr', 50.0), ('optim.weight_decay', 0.001)) and len(space) == 40
    assert space[-1] == (('optim.lr', 0.05), ('optim.weight_decay', 0.0))
    assert search_space(vapt.get_config('benchmark=fgvc'))[-1][0] == ('optim.lr', 0.1)


def test_more_fields_can_be_searched():
    space = search_space(settings(lr=(1.0,), weight_decay=(0.0,), axes='method.num_tokens=1|5; method.dropout=0.0|0.1'))
    assert [dict(s)['method.num_tokens'] for s in space] == [1, 1, 5, 5]
    assert [dict(s)['method.dropout'] for s in space] == [0.0, 0.1, 0.0, 0.1]
    for axes, message in (('method.num_tokens', 'is written field=value'), ('a=one', 'is written field=value')):
        with pytest.raises(UsageError, match=message):
            search_space(settings(axes=axes))
    with pytest.raises(UsageError, match="unknown grid 'promt': did you mean 'prompt'"):
        search_space(settings(grid='promt'))


@pytest.mark.parametrize(('ties', 'chosen'), [('smaller', (1.0, 0.01)), ('larger', (5.0, 0.01))])
def test_ties(ties, chosen):
    grid = [(25.0, 0.0), (5.0, 0.01), (5.0, 0.0), (1.0, 0.01), (1.0, 0.0), (0.5, 0.01)]
    scores = [0.2, 0.70001, 0.7, 0.69999, 0.7, 0.1]  # equal in per cent with two decimals
    outcomes = [
        Outcome(Trial('search', (('optim.lr', lr), ('optim.weight_decay', wd)), 0), score, 1)
        for (lr, wd), score in zip(grid, scores, strict=True)
    ]
    assert tuple(dict(best(outcomes, ties).trial.changes).values()) == chosen
    with pytest.raises(UsageError, match='unknown rule for ties'):
        best(outcomes, 'first')
    with pytest.raises(UsageError, match='every setting of the grid diverged'):
        best([dataclasses.replace(o, accuracy=0.0, trained_parameters=None) for o in outcomes], ties)


def test_the_chosen_setting_is_run_with_every_seed(run, tmp_path):
    execute = Recorded(lambda lr, wd: 0.6 if (lr, wd) == (5.0, 0.01) else 0.4)
    (result,) = run(execute)
    searched = [key for _, key in execute.ran if key.startswith('search')]
    assert searched == [f'search/lr={lr},weight_decay={wd},seed=0' for lr in (5.0, 1.0) for wd in (0.01, 0.0)]
    assert [key for _, key in execute.ran[4:]] == [f'final/lr=5.0,weight_decay=0.01,seed={s}' for s in (42, 44)]
    assert result['chosen'] == {'optim.lr': 5.0, 'optim.weight_decay': 0.01} and result['val_accuracy'] == 0.6
    assert result['test_accuracies'] == pytest.approx([0.6042, 0.6044])
    assert result['examples'] == {'train': 22, 'val': 8, 'test': 13}
    assert json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['config']['optim.name'] == 'sgd'


def test_the_search_does_not_see_test_and_final_runs_train_on_val(run):
    seen = {}

    def execute(run, trials):
        for trial in trials:
            dataset = run.dataset_of(trial)
            seen[trial.phase] = [len(getattr(dataset, split)) for split in ('train', 'val', 'test')]
            yield Outcome(trial, 0.5, 1)

    run(execute)
    assert seen == {'search': [22, 8, 0], 'final': [30, 0, 13]}
    run(execute, 'separate', final_on_val=False)
    assert seen == {'search': [22, 8, 0], 'final': [22, 8, 13]}


@pytest.mark.parametrize('stop_after', range(6))
def test_what_is_done_is_not_done_again(run, stop_after):
    def accuracy(lr, wd):
        return lr / 10 + wd

    whole = Recorded(accuracy)
    expected = run(whole, 'whole')
    first, second, third = Recorded(accuracy, stop_after), Recorded(accuracy), Recorded(accuracy)
    with pytest.raises(KeyboardInterrupt):
        run(first)
    assert run(second) == expected
    assert first.ran + second.ran == whole.ran
    assert run(third) == expected and not third.ran
    more = Recorded(accuracy)
    assert len(run(more, seeds=(42, 44, 82))[0]['seeds']) == 3 and len(more.ran) == 1


def test_the_short_search(run):
    execute = Recorded(lambda lr, wd: lr / 10 + wd)
    config = settings(lr=(1.0, 5.0, 10.0), weight_decay=(0.01, 0.001, 0.0))
    (result,) = run(execute, config=config, fast=True, seeds=(42,))
    searched = [key for _, key in execute.ran if key.startswith('search')]
    assert searched[:3] == [f'search/lr=5.0,weight_decay={wd},seed=0' for wd in (0.01, 0.001, 0.0)]
    assert searched[3:] == [f'search/lr={lr},weight_decay=0.01,seed=0' for lr in (10.0, 1.0)]
    assert result['chosen'] == {'optim.lr': 10.0, 'optim.weight_decay': 0.01} and result['settings_tried'] == 5
    with pytest.raises(UsageError, match=r'fast_lr=2\.0, which is not in the grid'):
        run(execute, 'other', config=settings(lr=(1.0,), fast_lr=2.0), fast=True)


def test_another_sweep_is_refused(run):
    run(Recorded())
    other = changed(settings(lr=(1.0, 5.0), weight_decay=(0.01, 0.0)), {'train.epochs': 7, 'train.warmup_epochs': 1})
    with pytest.raises(UsageError, match=r'another configuration.*train\.epochs: 100 there, 7 now'):
        run(Recorded(), config=other)


def test_mistakes_are_noticed_before_anything_runs(run, backbone, tmp_path, tasks):
    execute = Recorded()
    with pytest.raises(UsageError, match=r'the config has no field method\.tokens'):
        run(execute, config=settings(axes='method.tokens=1|2'))
    with pytest.raises(UsageError, match=r"the field method\.num_tokens of the config cannot be 'one'"):
        run(execute, config=settings(axes="method.num_tokens='one'"))
    with pytest.raises(UsageError, match='vtab:dtd is not on this machine'):
        sweep(changed(settings(), {'data.dir': str(tmp_path)}), {**tasks, 'vtab:dtd': 'Natural'}, tmp_path / 'x',
              execute=execute, backbone=backbone)  # fmt: skip
    with pytest.raises(UsageError, match='two of these tasks have the same name: birds, birds'):
        sweep(settings(), {'npz:a/birds.npz': '', 'folder:b/birds': ''}, tmp_path / 'y', backbone=backbone)
    assert not execute.ran


@pytest.fixture
def small():
    """Two settings of VPT, one of which diverges; few steps."""
    config = vpt_deep.get_config('dataset=npz:none')
    return changed(config, {
        'method.num_tokens': 2, 'train.epochs': 3, 'train.warmup_epochs': 1, 'train.batch_size': 8,
        'sweep.lr': (4.0, 1e38), 'sweep.weight_decay': (0.001,), 'checkpoint.every_steps': 2,
    })  # fmt: skip


def test_a_sweep_that_is_stopped_gives_the_same_results(run, small, tmp_path, monkeypatch):
    expected = run(run_trials, 'whole', config=small)
    assert expected[0]['chosen']['optim.lr'] == 4.0  # the other one diverged and counts as 0
    rows = {p.name: json.loads(p.read_text()) for p in (tmp_path / 'whole').rglob('trials/search/*.json')}
    assert rows['lr=1e+38,weight_decay=0.001,seed=0.json']['accuracy'] == 0
    for stop in (2, 17):  # in the search and in a final run
        with monkeypatch.context() as patch:
            stop_at(patch, stop, signal.SIGTERM)
            with pytest.raises(StoppedError, match='run the same command again'):
                run(run_trials, f'stopped{stop}', config=small)
        assert run(run_trials, f'stopped{stop}', config=small) == expected
    left = sorted(str(p.relative_to(tmp_path / 'whole')) for p in (tmp_path / 'whole').rglob('checkpoints'))
    assert left == []
    assert len(list((tmp_path / 'whole').rglob('prompt.safetensors'))) == 2


def test_linear_heads_at_once_equal_single_runs(run, backbone, tmp_path, monkeypatch):
    config = configs.default('dataset=npz:none')
    config.method = configs.method('linear')
    config = changed(config, {
        'train.epochs': 8, 'train.warmup_epochs': 2, 'train.batch_size': 8, 'sweep.lr': (8.0, 0.5),
        'sweep.weight_decay': (0.01, 0.0),
    })  # fmt: skip
    single = run(run_trials, 'single', config=config)
    monkeypatch.setattr('vpt_jax.training.linear_trials.trials_together', lambda run, trials: iter(()))
    together = run(linear_trials, 'together', config=config)
    assert together == single

    def rows(folder):
        return {p.name: json.loads(p.read_text()) for p in (tmp_path / folder).rglob('trials/*/*.json')}

    assert rows('single') == rows('together') and len(rows('single')) == 6
    assert np.mean(single[0]['test_accuracies']) > 0.5


def test_names():
    assert label('vtab:cifar100') == 'vtab:cifar100' and label('npz:/x/birds.npz') == 'birds'
    assert label('folder:~/photos') == 'photos' and label('digits') == 'digits'
    known = benchmark_of('fgvc').tasks
    assert list(choose_tasks(known, [])) == list(known) and len(known) == 5
    assert list(choose_tasks(known, ['cars', 'fgvc:cub'])) == ['fgvc:cars', 'fgvc:cub']
    with pytest.raises(UsageError, match="unknown task 'car': did you mean 'cars'"):
        choose_tasks(known, ['car'])
    with pytest.raises(UsageError, match="unknown benchmark 'vatb'"):
        benchmark_of('vatb')


def test_seeds():
    assert read_seeds('5') == SEEDS == (42, 44, 82, 100, 800)
    assert read_seeds('2') == (42, 44) and read_seeds('7,8') == (7, 8)
    for text in ('0', '6', 'many', '1,x'):
        with pytest.raises(UsageError, match='--seeds'):
            read_seeds(text)
