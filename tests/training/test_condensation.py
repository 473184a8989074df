"""Condensing a trained prompt: scores over a split, and the table of what fewer prompts cost and give."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import vpt_jax as vj
from vpt_jax import data
from vpt_jax.errors import UsageError
from vpt_jax.methods import VPT, Linear, Stack, forward
from vpt_jax.methods.condense import keep
from vpt_jax.training.condense import condensed, importance, tune
from vpt_jax.training.cost import forward_flops
from vpt_jax.training.inference import Predictor


@pytest.fixture(scope='module')
def task(npz):
    """A backbone of two blocks, and deep prompts trained on it."""
    backbone = vj.load_backbone('random:Ti/8@16', depth=2, width=32, mlp_dim=32, heads=2)
    recipe = vj.Recipe(epochs=6, warmup_epochs=1, batch_size=8, base_lr=4.0)
    return backbone, npz, recipe


@pytest.fixture(scope='module')
def trained(task, tmp_path_factory):
    backbone, npz, recipe = task
    method = VPT(num_tokens=4, deep=True, dropout=0.2)
    result = vj.fit(method, npz, backbone, workdir=tmp_path_factory.mktemp('deep'), recipe=recipe)
    return vj.load_trained(result.folder, backbone)


@pytest.fixture(scope='module')
def dataset(trained, npz):
    return data.load(npz, trained.preprocess)


@pytest.fixture(scope='module')
def by_hand(trained):
    """`by_hand(images, labels)` gives [2, 4], sum_d g_d p_d of the mean loss over some images."""
    preprocess = trained.preprocess
    prompts = jax.tree.map(np.asarray, trained.file.prompts)
    backbone, own = trained.backbone, prompts['vpt']

    @jax.jit
    def gradient(images, labels):
        def loss(vpt):
            images_in = data.preprocess.normalise(images, preprocess.mean, preprocess.std)
            logits, _ = forward(backbone.model, trained.method, backbone.params, {**prompts, 'vpt': vpt}, images_in)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(own)

    def products(images, labels):
        grads = gradient(images, labels)
        return np.stack([(grads['prompts'] * own['prompts']).sum(-1), (grads['deep'] * own['deep']).sum(-1)[0]])

    return products


def test_scores_are_means_over_batches_or_examples_of_the_training_split(trained, dataset, by_hand):
    images, labels = dataset.train.images, dataset.train.labels  # 22 examples: 8, 8 and 6
    by_batch = [by_hand(images[i : i + 8], labels[i : i + 8]) for i in (0, 8, 16)]
    ours = importance(trained, dataset.train, batch_size=8)
    np.testing.assert_allclose(ours, np.abs(by_batch).mean(0), rtol=1e-3, atol=1e-6)
    signed = importance(trained, dataset.train, 'signed_taylor', batch_size=8)
    np.testing.assert_allclose(signed, np.mean(by_batch, 0), rtol=1e-3, atol=1e-6)
    each = np.abs([by_hand(images[i : i + 1], labels[i : i + 1]) for i in range(22)]).mean(0)
    ours = importance(trained, dataset.train, 'taylor_token_samplemean', batch_size=8)
    np.testing.assert_allclose(ours, each, rtol=1e-3, atol=1e-6)
    with pytest.raises(UsageError, match="unknown score of prompts 'taylor'"):
        importance(trained, dataset.train, 'taylor')


def test_a_table_of_ratios_and_prompts_that_load_like_any_other(trained, dataset, tmp_path):
    rows = list(tune(trained, dataset, [0.25, 0.5], tmp_path, epochs=3, batch_size=8))
    assert [(row['keep'], row['prompts']) for row in rows] == [(1.0, 8), (0.25, 2), (0.5, 4)]
    assert rows[1]['gflops'] < rows[2]['gflops'] < rows[0]['gflops']
    assert all(row['images_per_second'] > 0 and row['split'] == 'test' for row in rows)
    scores = importance(trained, dataset.train, batch_size=8)
    for row, ratio in zip(rows[1:], (0.25, 0.5), strict=True):
        kept = keep(scores, ratio)
        assert row['per_block'] == [len(k) for k in kept]
        loaded = vj.load_trained(row['prompt'], trained.backbone)
        assert loaded.method.methods[0].kept == tuple(row['per_block'])
        assert Predictor(loaded, 8).scores(dataset.test)['accuracy'] == row['accuracy']
        before = Predictor(condensed(trained, kept), 8).scores(dataset.test)
        assert before['accuracy'] == row['accuracy_untuned']
        result = json.loads((tmp_path / f'keep_{ratio}' / 'result.json').read_text())
        assert result['test_accuracy'] == row['accuracy']
        assert result['trained_parameters'] == 32 * row['prompts'] + 33 * 4
        config = json.loads((tmp_path / f'keep_{ratio}' / 'config.json').read_text())
        # What changes no result is not written down.
        assert config['recipe'] | {'shard_backbone': False} == {
                                    **dataclasses.asdict(vj.Recipe()), **config['recipe'], 'epochs': 3,
                                    'warmup_epochs': 0, 'base_lr': 4.0, 'optimizer': 'sgd'}  # fmt: skip


def test_tuning_starts_from_the_kept_prompts_and_the_head(trained, dataset, tmp_path):
    row = list(tune(trained, dataset, [0.5], tmp_path, epochs=1, base_lr=0.0, batch_size=8))[1]
    tuned = vj.load_trained(row['prompt'], trained.backbone).file.prompts
    part = condensed(trained, keep(importance(trained, dataset.train, batch_size=8), 0.5)).file.prompts
    jax.tree.map(np.testing.assert_array_equal, tuned, part)
    np.testing.assert_array_equal(tuned['linear']['last_layer']['kernel'],
                                  trained.file.prompts['linear']['last_layer']['kernel'])  # fmt: skip


def test_flops_grow_with_the_sequence_and_do_not_depend_on_scan(trained):
    model = trained.backbone.model
    few, many = (Stack(VPT(num_tokens=n, deep=True), Linear()) for n in (1, 5))
    assert forward_flops(model, few, 4) < forward_flops(model, many, 4)
    assert forward_flops(model, many, 4) == forward_flops(model.clone(scan=True), many, 4)
    # The products of one block's sequence of 1 + 5 + 4 tokens: four of width x width, two of the MLP, two of T x T.
    deeper = model.clone(depth=3)
    block = forward_flops(deeper, many, 4) - forward_flops(model, many, 4)
    products = 8 * 10 * 32 * 32 + 4 * 10 * 32 * 32 + 4 * 10 * 10 * 32
    assert products < block < 1.4 * products


def test_epochs_must_be_positive(trained, dataset, tmp_path):
    with pytest.raises(UsageError, match='epochs to fine-tune must be >= 1, got 0'):
        next(tune(trained, dataset, [0.5], tmp_path, epochs=0))
