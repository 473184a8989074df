"""Where a run starts: prompts made of training images, and prompts of another run."""

import jax
import numpy as np
import pytest

import vpt_jax as vj
from tests.training.conftest import arrays
from tests.training.test_resume import stop_at
from vpt_jax import data
from vpt_jax.errors import UsageError
from vpt_jax.methods import SPT
from vpt_jax.methods.spt import tokens_of
from vpt_jax.training.loop import default_preprocess
from vpt_jax.training.stopping import StoppedError

METHOD = SPT(num_tokens=2, deep=False)


@pytest.fixture
def looks(monkeypatch):
    """What every call of SPT's `init_from` gave."""
    calls, original = [], SPT.init_from

    def init_from(self, *args):
        found = original(self, *args)
        calls.append(jax.device_get(found))  # training donates what it is given
        return found

    monkeypatch.setattr(SPT, 'init_from', init_from)
    return calls


def test_a_stopped_run_does_not_look_again_and_ends_with_the_same_bits(fit, tmp_path, monkeypatch, looks):
    whole = fit(tmp_path / 'whole', METHOD)
    assert len(looks) == 1
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StoppedError):
            fit(tmp_path / 'stopped', METHOD)
    assert len(looks) == 2
    np.testing.assert_array_equal(looks[0]['prompts'], looks[1]['prompts'])
    resumed = fit(tmp_path / 'stopped', METHOD)
    assert len(looks) == 2
    jax.tree.map(np.testing.assert_array_equal, resumed.prompts, whole.prompts)


def test_prompts_start_as_tokens_of_training_images_only(fit, backbone, npz, tmp_path):
    result = fit(tmp_path / 'a', METHOD, base_lr=0.0, epochs=2)
    preprocess = default_preprocess(backbone)
    train = data.load(npz, preprocess).train
    images = data.preprocess.normalise(train.images, preprocess.mean, preprocess.std)
    tokens = np.asarray(tokens_of(backbone.model, backbone.params, images, 1)).reshape(-1, 32)
    nearest = np.abs(tokens[None] - result.prompts['spt']['prompts'][:, None]).max(-1)
    assert nearest.min(1).max() < 1e-5
    other = fit(tmp_path / 'b', METHOD, base_lr=0.0, epochs=2, seed=1)
    assert np.abs(other.prompts['spt']['prompts'] - result.prompts['spt']['prompts']).max() > 1e-3


def test_a_run_goes_on_from_the_prompts_of_another(fit, finished, backbone, npz, tmp_path):
    settings = {'dataset': npz, 'backbone': backbone, 'recipe': vj.Recipe(epochs=1, warmup_epochs=0, batch_size=8,
                                                                         base_lr=0.0)}  # fmt: skip
    again = vj.fit(vj.methods.VPT(num_tokens=2), workdir=tmp_path, start=finished, **settings)
    jax.tree.map(np.testing.assert_array_equal, again.prompts, finished.prompts)
    assert again.metrics['test_accuracy'] == finished.metrics['test_accuracy']
    drawn = fit(tmp_path / 'drawn', vj.methods.VPT(num_tokens=2), base_lr=0.0)
    with pytest.raises(UsageError, match=r'another configuration \(start\.crc32'):
        vj.fit(vj.methods.VPT(num_tokens=2), workdir=tmp_path, start=drawn, **settings)
    with pytest.raises(UsageError, match='prompts to start from are not those of this method'):
        vj.fit(vj.methods.VPT(num_tokens=3), workdir=tmp_path / 'other', start=finished, **settings)


def test_views_do_not_depend_on_who_asks_when():
    made = arrays((6, 0, 0), side=20)
    preprocess = data.Preprocess(20, 'bicubic', 'flip')
    split = data.Split(made['images'], made['labels'], tuple('abcdef'))
    batches = data.Batches(split, preprocess, 2, seed=3)
    views = batches.views(np.arange(6))
    np.testing.assert_array_equal(views[[4, 1]], batches.views(np.array([4, 1])))
    flipped = [bool((view == image[:, ::-1]).all()) for view, image in zip(views, made['images'], strict=True)]
    assert set(flipped) == {True, False}
