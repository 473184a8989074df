"""Masked pretraining at a very small size: the three commands of experiments/vptm.md, resuming, and mistakes."""

import json
import os
import runpy

import numpy as np
import pytest

import vpt_jax as vj
from tests.commands import ROOT, Commands, write_task
from tests.training.test_fit import read_metrics
from tests.training.test_resume import stop_at
from vpt_jax.checkpoints import containers
from vpt_jax.errors import UsageError
from vpt_jax.models import vqkd
from vpt_jax.training import masked
from vpt_jax.training.stopping import StoppedError

# Images of 16 pixels, 2 x 2 patches, of which 2 are hidden.
SMALL = {
    'image_size': 16, 'network.width': 16, 'network.depth': 1, 'network.mlp_dim': 32, 'network.heads': 2,
    'codes.count': 8, 'codes.width': 4, 'masking.share': 0.5, 'masking.smallest': 1, 'masking.branch_from': 1,
    'train.epochs': 10, 'train.warmup_epochs': 1, 'train.batch_size': 8, 'train.log_every_steps': 1, 'optim.lr': 0.1,
}  # fmt: skip


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('masked')


@pytest.fixture(scope='module')
def task(place):
    teacher, dataset = write_task(place)
    return f'backbone={teacher},dataset=npz:{dataset}'


@pytest.fixture(scope='module')
def made(place, task):
    """The folders that the three commands leave behind: tokenizer, network, prompts."""
    tokenizer, network, prompts = (place / name for name in ('tokenizer', 'beit', 'vptm'))
    flags = [f'--config.{name}={value}' for name, value in SMALL.items()]
    # Compiling is most of the time.
    quick = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XLA_FLAGS', f'{os.environ.get("XLA_FLAGS", "")} {quick}')
        commands_here = Commands()
    with commands_here as command:
        commands = [
            ('pretrain', f'--config=configs/pretrain_mim.py:stage=tokenizer,{task}', *flags, tokenizer),
            ('pretrain', f'--config=configs/pretrain_mim.py:stage=beit,tokenizer={tokenizer}/tokenizer.npz,{task}',
             *flags, network),
            ('train', f'--config=configs/vptm.py:backbone={network}/backbone.npz,{task.split(",")[1]}',
             '--config.method.num_tokens=2', '--config.method.prototype_dim=4', '--config.method.read=codebook',
             '--config.train.epochs=2', '--config.train.warmup_epochs=0', prompts),
        ]  # fmt: skip
        for *argv, workdir in commands:
            done = command(*argv, f'--workdir={workdir}')
            assert done.returncode == 0, done.stderr
    return tokenizer, network, prompts


def config_of(stage, task, **changes):
    arg = f'stage={stage},{task}'
    config = runpy.run_path(str(ROOT / 'configs' / 'pretrain_mim.py'))['get_config'](arg)
    config.update_from_flattened_dict(SMALL | changes)
    return config


def test_both_stages_learn(made):
    for folder, name in zip(made, ('rebuild', 'loss'), strict=False):
        rows = read_metrics(folder)
        assert [row['step'] for row in rows] == list(range(1, 31))
        assert np.mean([row[name] for row in rows[-5:]]) < 0.97 * rows[0][name]
        assert json.loads((folder / 'result.json').read_text())[f'test_{name}'] < rows[0][name]


def test_the_tokenizer_is_a_file(made, place):
    with containers.opened(made[0] / 'tokenizer.npz') as source:
        model, params = vqkd.load(source)
    assert (model.codes, model.code_width, model.target_width, model.encoder.image_size) == (8, 4, 32, 16)
    np.testing.assert_allclose(np.linalg.norm(params['codebook'], axis=1), 1, atol=1e-5)
    images = vqkd.check_images(np.random.default_rng(0).random((2, 16, 16, 3), np.float32))
    ids = model.apply({'params': params}, images, method='tokens')
    assert ids.shape == (2, 4) and ids.min() >= 0 and ids.max() < 8
    again = place / 'again.npz'
    vqkd.save(again, model, params)
    assert again.read_bytes() == (made[0] / 'tokenizer.npz').read_bytes()
    with pytest.raises(UsageError, match="unknown family of backbones 'vqkd'"):
        vj.load_backbone(made[0] / 'tokenizer.npz')
    with (
        containers.opened(made[1] / 'backbone.npz') as source,
        pytest.raises(UsageError, match='is no VQ-KD tokenizer: it holds a beit'),
    ):
        vqkd.load(source)


def test_the_network_is_a_backbone_with_the_codes_in_it(made):
    backbone = vj.load_backbone(made[1] / 'backbone.npz')
    model = backbone.model
    assert (model.vocab, model.code_width, model.branch_from, model.relative) == (8, 4, 1, 'shared')
    assert np.abs(backbone.params['relative_bias']).max() > 0  # tables start at zero
    with containers.opened(made[0] / 'tokenizer.npz') as source:
        np.testing.assert_array_equal(backbone.params['codebook'], vqkd.load(source)[1]['codebook'])
    result = json.loads((made[2] / 'result.json').read_text())
    assert result['trained_parameters'] == 2 * 16 + 4 * 4 + 4 * 4


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bytes(task, tmp_path, monkeypatch):
    config = config_of('tokenizer', task, **{'train.epochs': 3})
    masked.run(config, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StoppedError, match='stopped after step'):
            masked.run(config, tmp_path / 'stopped')
    assert not list(tmp_path.glob('stopped/*.npz'))
    masked.run(config, tmp_path / 'stopped')
    whole, resumed = (tmp_path / name / 'tokenizer.npz' for name in ('whole', 'stopped'))
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ('stage', 'changes', 'message'),
    [
        ('tokenisier', {}, "did you mean 'tokenizer'"),
        ('beit', {}, 'needs the tokenizer of the first stage'),
        ('beit', {'tokenizer': 'made', 'network.patch_size': 4}, 'into 2x2 patches and the network into 4x4'),
        ('beit', {'tokenizer': 'made', 'masking.share': 0.0}, '0 of 2x2 patches cannot be hidden'),
        ('tokenizer', {'train.mixup': 0.2}, 'has no labels'),
        ('tokenizer', {'data.augment': 'flip'}, "takes --config.data.augment of 'none' or 'pretrain'"),
    ],
)
def test_mistakes_are_sentences(made, task, tmp_path, stage, changes, message):
    changes = {name: f'{made[0]}/tokenizer.npz' if value == 'made' else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=message):
        masked.run(config_of(stage, task, **changes), tmp_path / 'run')
    assert not list(tmp_path.glob('run/*.npz'))
