"""Methods that look at the training images before an epoch, through the real loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vpt_jax as vj
from tests.training.conftest import arrays
from tests.training.test_resume import stop_at
from vpt_jax.data.preprocess import normalise
from vpt_jax.errors import UsageError
from vpt_jax.methods import VP, LabelMapping, Stack, forward
from vpt_jax.methods.label_mapping import frequency_mapping
from vpt_jax.training.inference import predict

METHOD = Stack(VP(kind='expansive', inner=12), LabelMapping())
RECIPE = vj.Recipe(epochs=3, warmup_epochs=0, batch_size=8, base_lr=300.0, weight_decay=0.0, log_every_steps=1,
                   checkpoint_every_steps=2)  # fmt: skip


@pytest.fixture(scope='module')
def classifier():
    return vj.load_backbone('random:Ti/8@16', depth=1, width=32, mlp_dim=32, heads=2, classes=12)


@pytest.fixture(scope='module')
def run(classifier, npz):
    def fit(workdir, method=METHOD, **changes):
        return vj.fit(method, npz, classifier, workdir=workdir, recipe=RECIPE, **changes)

    return fit


@pytest.fixture(scope='module')
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp('iterative'))


def counts(classifier, result, prompts):
    """What the images of each class are taken for, by hand."""
    found = arrays()
    images, labels = found['images'][found['split'] == 0], found['labels'][found['split'] == 0]
    preprocess = vj.training.loop.default_preprocess(classifier, method=METHOD)
    assert preprocess.size == 12
    images = np.stack([preprocess.decode(image) for image in images])
    state = {'label_mapping': {'mapping': jnp.arange(12)[:, None]}}  # every source is a target: the source scores
    with jax.default_matmul_precision('highest'):
        scores, _ = forward(classifier.model, METHOD, classifier.params, prompts,
                            normalise(images, preprocess.mean, preprocess.std), state=state,
                            pixels=(preprocess.mean, preprocess.std))  # fmt: skip
    table = np.zeros((12, 4))
    np.add.at(table, (np.asarray(scores).argmax(-1), labels), 1)
    return table


def test_the_mapping_is_that_of_the_prompts_before_the_last_epoch(run, finished, classifier, tmp_path, monkeypatch):
    seen = []
    original = LabelMapping.conclude

    def conclude(self, epoch, state, sums):
        seen.append((epoch, sums['counts']))
        return original(self, epoch, state, sums)

    monkeypatch.setattr(LabelMapping, 'conclude', conclude)
    again = run(tmp_path)
    assert [epoch for epoch, _ in seen] == [0, 1, 2] and all(table.sum() == 22 for _, table in seen)
    first = {'vp': {'program': jnp.zeros((16, 16, 3))}, 'label_mapping': {}}
    np.testing.assert_array_equal(seen[0][1], counts(classifier, again, first))
    np.testing.assert_array_equal(again.state['label_mapping']['mapping'], frequency_mapping(seen[2][1]))
    assert (seen[0][1] != seen[2][1]).any()  # or the test would see nothing
    jax.tree.map(np.testing.assert_array_equal, (again.prompts, again.state), (finished.prompts, finished.state))
    assert finished.metrics['trained_parameters'] == 3 * 16 * 16


def test_a_stopped_run_resumes_to_the_same_mapping(run, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 10)  # of batches, those of the looks among them
        with pytest.raises(vj.StoppedError, match='stopped after step'):
            run(tmp_path)
    resumed = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, (resumed.prompts, resumed.state), (finished.prompts, finished.state))


def test_the_prompt_file_has_all_that_prediction_needs(finished, classifier):
    meta = json.loads((finished.folder / 'prompt.json').read_text())
    assert meta['preprocess']['size'] == 12 and meta['backbone']['settings']['classes'] == 12
    trained = vj.load_trained(finished.folder)
    np.testing.assert_array_equal(trained.file.state['label_mapping']['mapping'],
                                  finished.state['label_mapping']['mapping'])  # fmt: skip
    assert trained.backbone.model.classes == 12
    assert predict(trained, list(arrays()['images'][:2])).shape == (2, 4)


def test_a_backbone_without_a_classifier_is_refused_at_once(backbone, npz, tmp_path):
    with pytest.raises(UsageError, match='has none: load a backbone with own_classifier=True'):
        vj.fit(METHOD, npz, backbone, workdir=tmp_path, recipe=RECIPE)
    with pytest.raises(UsageError, match='has no classifier that is one linear layer'):
        vj.fit(METHOD, npz, 'tiny_vit64', workdir=tmp_path, recipe=RECIPE)
