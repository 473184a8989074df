"""Scores against counts made with NumPy, the linear probe, and the evaluation of loaded prompts."""

import dataclasses
import re

import numpy as np
import pytest

import vpt_jax as vj
from tests.training.conftest import arrays
from vpt_jax import data
from vpt_jax.checkpoints import prompt_file
from vpt_jax.errors import UsageError
from vpt_jax.training.inference import Predictor, check_classes, predict, top_classes
from vpt_jax.training.loop import default_preprocess


@pytest.fixture(scope='module')
def trained(finished, backbone):
    return vj.load_trained(finished.folder, backbone)


def split_of(images, labels):
    return data.Split(images, np.asarray(labels, np.int32), tuple(map(str, range(len(labels)))))


def test_scores_equal_a_count_with_the_padded_last_batch_and_unbalanced_classes(trained):
    # 13 examples in batches of 8; class 1 does not occur, and two labels of class 0 are called 2.
    made = arrays()
    index = np.concatenate([np.flatnonzero(made['labels'] == c)[:n] for c, n in ((0, 7), (2, 3), (3, 3))])
    images, labels = made['images'][index], made['labels'][index].copy()
    labels[:2] = 2
    predictor = Predictor(trained, batch_size=8)
    scores = predictor.scores(split_of(images, labels))
    probabilities = predictor.probabilities(images)
    hit = probabilities.argmax(-1) == labels
    assert scores['accuracy'] == pytest.approx(hit.mean())
    assert scores['mean_class_accuracy'] == pytest.approx(np.mean([hit[labels == c].mean() for c in (0, 2, 3)]))
    assert scores['accuracy'] != pytest.approx(scores['mean_class_accuracy'])
    assert scores['loss'] == pytest.approx(-np.log(probabilities[np.arange(13), labels]).mean(), rel=1e-4)
    assert scores['examples'] == 13
    assert scores['images_per_second'] > 0
    rows = scores['per_class']
    assert [row['examples'] for row in rows] == [5, 0, 5, 3]
    assert rows[1] == {'class': '1', 'examples': 0, 'correct': 0, 'accuracy': None}
    assert sum(row['correct'] for row in rows) == hit.sum()


def test_fit_reports_the_same_test_accuracy(trained, finished, npz):
    test = data.load(npz, trained.preprocess).test
    scores = Predictor(trained, batch_size=8).scores(test)
    assert scores['accuracy'] == finished.metrics['test_accuracy']
    assert scores['loss'] == pytest.approx(finished.metrics['test_loss'])


def test_predict_takes_images_of_any_size(trained):
    rng = np.random.default_rng(0)
    mixed = [rng.integers(0, 256, shape).astype(np.uint8) for shape in [(16, 16, 3), (30, 20), (9, 50, 3)]]
    got = predict(trained, mixed, batch_size=8)
    assert got.shape == (3, 4)
    decoded = np.stack([trained.preprocess.decode(image) for image in mixed])
    np.testing.assert_array_equal(got, predict(trained, decoded, batch_size=8))
    assert predict(trained, []).shape == (0, 4)
    with pytest.raises(UsageError, match='batch_size must be >= 1'):
        predict(trained, mixed, batch_size=0)


def test_top_classes_come_best_first():
    best = top_classes(np.array([[0.2, 0.5, 0.3]]), ('a', 'b', 'c'), 2)
    assert best == [[('b', 0.5), ('c', 0.3)]]
    assert len(top_classes(np.array([[0.2, 0.5, 0.3]]), ('a', 'b', 'c'), 9)[0]) == 3


def with_names(trained, names):
    meta = {**trained.file.meta, 'class_names': names}
    return dataclasses.replace(trained, file=prompt_file.PromptFile({}, {}, meta))


def test_another_set_of_classes_is_refused(trained, npz):
    dataset = data.load(npz, trained.preprocess)
    check_classes(trained, dataset)
    check_classes(with_names(trained, ['ant', 'bee', 'cat', 'dog']), dataset)  # the dataset's are only numbers
    with pytest.raises(UsageError, match=r'the prompt knows 3 classes and npz:.* has 4'):
        check_classes(with_names(trained, ['a', 'b', 'c']), dataset)
    named = dataclasses.replace(dataset, class_names=('ant', 'bee', 'cow', 'dog'))
    with pytest.raises(UsageError, match="4 classes each, but not the same: class 2 is 'cat' in the prompt and 'cow'"):
        check_classes(with_names(trained, ['ant', 'bee', 'cat', 'dog']), named)


def test_another_backbone_is_refused(finished, backbone):
    other = dataclasses.replace(backbone, name='another', sha256='0' * 64)
    with pytest.raises(UsageError, match=r'trained on random:Ti/8@16 .* not on another'):
        vj.load_trained(finished.folder, other)


def test_the_same_weights_with_other_settings_are_refused(finished, backbone):
    other = dataclasses.replace(backbone, model=backbone.model.clone(activation='gelu_tanh', scan=True))
    with pytest.raises(UsageError, match="other settings: activation 'gelu' in training and 'gelu_tanh' now;"):
        vj.load_trained(finished.folder, other)


def test_a_backbone_loaded_by_name_gets_the_settings_of_training(finished, backbone):
    trained = vj.load_trained(finished.folder)
    assert trained.backbone.describe() == backbone.describe()
    assert trained.class_names == ('0', '1', '2', '3')
    assert trained.seed == 0


def test_a_prompt_for_a_file_asks_where_the_file_is(finished, tmp_path):
    file = prompt_file.load(finished.folder)
    meta = {**file.meta, 'backbone': {**file.meta['backbone'], 'name': 'mine.npz'}}
    prompt_file.save(tmp_path, file.prompts, file.state, meta)
    with pytest.raises(UsageError, match=r'a file mine\.npz: say where it is with --backbone=PATH'):
        vj.load_trained(tmp_path)


@pytest.mark.parametrize('key', ['method', 'preprocess', 'class_names'])
def test_an_incomplete_prompt_file_is_named(finished, tmp_path, key):
    file = prompt_file.load(finished.folder)
    prompt_file.save(tmp_path, file.prompts, file.state, {k: v for k, v in file.meta.items() if k != key})
    with pytest.raises(UsageError, match=re.escape(f"'{key}' is missing from its json")):
        vj.load_trained(tmp_path)


def test_the_linear_probe_beats_chance_and_equals_a_linear_run(fit, backbone, tmp_path):
    # Overlapping patterns, so that 100 % is not what both reach.
    made = arrays((60, 20, 60), seed=5)
    noise = np.random.default_rng(6).normal(0, 90, made['images'].shape)
    made['images'] = np.clip(made['images'] + noise, 0, 255).astype(np.uint8)
    np.savez(tmp_path / 'noisy.npz', **made)
    preprocess = default_preprocess(backbone)
    dataset = data.load(f'npz:{tmp_path / "noisy.npz"}', preprocess)
    probe = vj.linear_probe(backbone, dataset, preprocess, batch_size=16, epochs=20, warmup_epochs=2)
    assert probe['test_accuracy'] > 0.4  # chance is 0.25
    assert probe['trained_parameters'] == 32 * 4 + 4
    run = fit(tmp_path / 'run', vj.methods.Linear(), dataset, base_lr=probe['base_lr'], weight_decay=0.0, batch_size=16,
              epochs=20, warmup_epochs=2, checkpoint_every_steps=1000)  # fmt: skip
    assert run.metrics['test_accuracy'] == pytest.approx(probe['test_accuracy'], abs=0.1)
    assert run.metrics['trained_parameters'] == probe['trained_parameters']
