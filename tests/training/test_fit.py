"""`fit` from beginning to end, and what its folder holds afterwards."""

import dataclasses
import json

import numpy as np
import pytest

import vpt_jax as vj
from tests.training.conftest import METHOD, RECIPE
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.inference import Predictor
from vpt_jax.training.loop import default_preprocess


def read_metrics(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def the_program(backbone):
    method = vj.methods.with_head(METHOD)
    return steps.Program(backbone.model, method, default_preprocess(backbone), 4, momentum=RECIPE.momentum)


def test_result_json_says_what_was_reached(finished, backbone):
    result = json.loads((finished.folder / 'result.json').read_text())
    assert result == json.loads(json.dumps(finished.metrics))
    assert 0.5 < result['test_accuracy'] <= 1  # chance is 0.25
    assert 0 <= result['val_mean_class_accuracy'] <= 1
    assert (result['test_examples'], result['val_examples'], result['classes']) == (13, 8, 4)
    # 2 prompts of 32 in one block, and a head of 32 x 4 + 4.
    assert result['trained_parameters'] == 2 * 32 + 132
    assert result['percent_of_backbone'] == pytest.approx(100 * (64 + 132) / backbone.num_params)
    assert result['steps'] == 9
    assert result['train_images_per_second'] > 0
    assert result['compile_seconds'] > 0
    assert result['precision'] == 'float32'


def test_the_prompt_file_gives_the_same_logits(finished, backbone):
    trained = vj.load_trained(finished.folder, backbone)
    in_memory = dataclasses.replace(trained, file=dataclasses.replace(trained.file, prompts=finished.prompts))
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    got, expected = (Predictor(t, 8).probabilities(images) for t in (trained, in_memory))
    assert got.shape == (5, 4)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_metrics_are_lines_of_json_and_tensorboard_events(finished):
    steps_logged = [row['step'] for row in read_metrics(finished.folder)]
    assert steps_logged == [2, 4, 6, 8, 9]
    assert read_metrics(finished.folder)[0].keys() == {'step', 'loss', 'accuracy', 'learning_rate'}
    events = list((finished.folder / 'tensorboard').glob('events.out.tfevents.*'))
    assert len(events) == 1
    assert b'learning_rate' in events[0].read_bytes()


def test_the_rate_is_zero_in_the_first_epoch_and_scaled_to_the_batch(finished):
    rates = {row['step']: row['learning_rate'] for row in read_metrics(finished.folder)}
    assert rates[2] == 0  # steps 1 to 3 are epoch 0
    assert rates[4] == pytest.approx(4.0 / 256 * 8)


def test_other_rates_and_seeds_do_not_compile_again(fit, finished, backbone, tmp_path):
    compiled = steps.train_step(the_program(backbone), meshes.data_mesh())
    assert compiled._cache_size() == 1
    other = fit(tmp_path, base_lr=1.0, weight_decay=0.1, seed=3, epochs=2)
    assert compiled._cache_size() == 1
    assert (other.prompts['vpt']['prompts'] != finished.prompts['vpt']['prompts']).any()


def test_a_finished_run_is_not_trained_again(fit, finished):
    again = fit(finished.folder)
    assert again.metrics['train_images_per_second'] == finished.metrics['train_images_per_second']
    np.testing.assert_array_equal(again.prompts['vpt']['prompts'], finished.prompts['vpt']['prompts'])


def test_validation_during_training_is_logged(fit, tmp_path):
    result = fit(tmp_path, eval_every_epochs=1, epochs=2)
    rows = [row for row in read_metrics(result.folder) if 'val_accuracy' in row]
    assert [row['step'] for row in rows] == [3, 6]
    assert rows[-1]['val_accuracy'] == result.metrics['val_accuracy']


def test_bfloat16_runs_on_the_cpu(fit, tmp_path):
    result = fit(tmp_path, method=vj.methods.Linear(), precision='bfloat16', epochs=2)
    assert result.metrics['precision'] == 'bfloat16'
    assert all(np.asarray(a).dtype == np.float32 for a in result.prompts['last_layer'].values())
    assert np.isfinite(result.metrics['test_loss'])
