"""Every method on every family of networks: it lowers the loss, or is refused for want of a place that it names."""

import chex
import jax
import numpy as np
import pytest

from experiments.method_matrix import NETWORKS, SIDE, case, descend, missing
from tests.methods.conftest import Tiny
from tests.networks import QUICK, drawn
from vpt_jax.errors import UsageError
from vpt_jax.methods import AP, METHODS, VP, LabelMapping, Linear, LoRA, NormTune, Stack, VPTPad

TOKENS = [name for name, model in NETWORKS.items() if 'tokens' in model.places]
MAPS = [name for name in NETWORKS if name not in TOKENS]
IMAGES = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)
MEMBERS = (VP(kind='random_patch', size=4), AP(at=(0, 'end'), shape='channel'), LoRA(rank=2, targets='all'), Linear())


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('heads')


def cells(name, folder):
    """Of the networks that a method takes, in tokens and in maps: by turns one of each, and all others."""
    picked, others = [], []
    for group in (TOKENS, MAPS):
        taken = [found for found in (case(name, network, folder) for network in group) if not missing(*found)]
        turn = list(METHODS).index(name) % max(len(taken), 1)
        picked += taken[turn : turn + 1]
        others += taken[:turn] + taken[turn + 1 :]
    return picked, others


def assert_the_loss_falls(method, model):
    losses, _, _ = descend(method, model, drawn(model), IMAGES, options=QUICK)
    assert np.isfinite(losses).all() and losses[-1] < losses[0], (method, model, losses)


@pytest.mark.parametrize('name', METHODS)
def test_the_loss_falls(name, folder):
    picked, _ = cells(name, folder)
    assert picked
    for method, model in picked:
        assert_the_loss_falls(method, model)


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_the_loss_falls_on_all_other_networks(name, folder):
    for method, model in cells(name, folder)[1]:
        assert_the_loss_falls(method, model)


def test_what_is_refused_says_for_want_of_what(folder):
    refused = set()
    for name in METHODS:
        for network in NETWORKS:
            method, model = case(name, network, folder)
            if place := missing(method, model):
                refused.add(name)
                sentence = rf'method .?{name}.? .*{place}.*{type(model).__name__}|{place}.*this backbone'
                with pytest.raises(UsageError, match=sentence):
                    method.check(model)
    assert len(refused) > 10
    assert not refused & {'linear', 'mlp', 'full', 'bias', 'norm', 'lora', 'ap', 'vp', 'vpt_pad', 'label_mapping'}


def test_a_frame_must_fit_the_network():
    with pytest.raises(UsageError, match='images of 24x24 pixels make a map of 3x3 in stage 1'):
        VPTPad(num_pixels=4).check(NETWORKS['Swin'])


@pytest.mark.parametrize('name', ['ResNet', 'Swin'])
def test_every_prompt_of_a_stack_moves(name):
    model = NETWORKS[name]
    method = Stack(NormTune(statistics='batch' if name == 'ResNet' else 'stored'), *MEMBERS)
    # Drawn like this nothing is zero, and a gradient that is lost shows.
    start = Tiny.drawn(jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p, 3), drawn(model)))
    losses, before, after = descend(method, model, drawn(model), IMAGES, prompts=start, options=QUICK)
    assert np.isfinite(losses).all() and (np.diff(losses) < 0).all(), losses
    still = {jax.tree_util.keystr(path) for path, same in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a == b).all()), before, after)) if same}  # fmt: skip
    assert not still


def test_scanned_blocks_tell_the_same(tiny):
    method = Stack(NormTune(), AP(at=(0, 1, 'end')), *MEMBERS[2:])
    prompts = tiny.prompts(method)
    logits, grads = tiny.gradient(method, prompts, train=True)
    scanned, scanned_grads = tiny.gradient(method, prompts, train=True, scan=True)
    np.testing.assert_allclose(logits, scanned, atol=2e-5)
    chex.assert_trees_all_close(grads, scanned_grads, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize('name', ['ViT', 'ResNet'])
def test_a_frame_learns_for_a_frozen_classifier(name):
    model = NETWORKS[name].clone(classes=5)
    images = np.random.default_rng(0).normal(size=(4, 11, 11, 3)).astype(np.float32)
    method = Stack(VP(kind='expansive', inner=11), LabelMapping(mapping='random'))
    losses, before, after = descend(method, model, drawn(model), images, promised=0.05, options=QUICK)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-3, losses
    assert jax.tree.leaves(before)[0].shape == (16, 16, 3) and len(jax.tree.leaves(after)) == 1
