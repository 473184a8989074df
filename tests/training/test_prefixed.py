"""Training from what the frozen blocks made of the images, once, is training on the images."""

import dataclasses
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

import vpt_jax as vj
from tests.methods.conftest import Tiny
from tests.networks import QUICK, drawn
from tests.training.conftest import RECIPE
from vpt_jax.errors import UsageError
from vpt_jax.methods import AP, CVPT, VPT, Linear, MLPHead, NormTune, Partial, Stack, forward, prefix
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.vit import ViT
from vpt_jax.training import mesh as meshes
from vpt_jax.training import prefixed
from vpt_jax.training import step as steps
from vpt_jax.training.loop import default_preprocess

VIT = ViT(width=16, depth=4, mlp_dim=32, heads=2, patch_size=4, image_size=16)
NETWORKS = {
    'vit': VIT,
    'scanned': VIT.clone(scan=True),
    'resnet': ResNet(depths=(1, 2), inner=(4, 8), outer=(8, 16), bottleneck=False, stem_width=8, image_size=16),
}
#: Methods and where a network of 4 (the ResNet: 3) blocks may be cut for them.
METHODS = {
    'linear': (Linear(), {'vit': 4, 'scanned': 4, 'resnet': 3}),
    'mlp': (MLPHead(layers=2), {'vit': 4, 'resnet': 3}),
    'ap': (Stack(AP(at=(2, 'end')), Linear()), {'vit': 2, 'scanned': 2, 'resnet': 2}),
    'end': (Stack(AP(at=('end',), shape='channel'), Linear()), {'vit': 3, 'resnet': 2}),
    'partial': (Stack(Partial(blocks=1), Linear()), {'vit': 3, 'scanned': 3}),
    'cvpt': (Stack(CVPT(num_tokens=2, layers=(1, 3)), Linear()), {'vit': 1, 'scanned': 1}),
    'pooled': (Stack(AP(at=(3,)), VPT(num_tokens=2, deep=True, pool='img_pool'), Linear()), {'vit': 0}),
}
CASES = [(method, network) for method, (_, networks) in METHODS.items() for network in networks]


@pytest.mark.parametrize(('name', 'network'), CASES)
def test_gradients_are_those_of_the_whole_network(name, network):
    (method, cuts), model = METHODS[name], NETWORKS[network]
    cut = prefix.entry(method, model)
    assert cut == cuts[network]
    if not cut:
        return
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    params = model.stored(drawn(VIT if network == 'scanned' else model))
    canonical = model.canonical(params)
    prompts = Tiny.drawn(jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p, 3), canonical))
    state, key = method.init_state(model, 3, jax.random.key(1)), jax.random.key(2)

    def loss(prompts, entering):
        scores, _ = forward(model, method, params, prompts, images if entering is None else None, state=state,
                            train=True, key=key, entering=entering)  # fmt: skip
        return (scores**2).sum(), scores

    entering = jax.jit(lambda params: prefix.entering(model, method, params, images), **QUICK)(params)
    step = jax.jit(jax.grad(loss, has_aux=True), **QUICK)
    grads, scores = step(prompts, entering)
    whole_grads, whole = step(prompts, None)
    np.testing.assert_allclose(scores, whole, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(grads, whole_grads, atol=1e-4, rtol=1e-4)
    assert max(float(abs(g).max()) for g in jax.tree.leaves(grads)) > 0


def test_blocks_before_the_cut_are_not_run():
    def flops(method, entering):
        params = jax.eval_shape(lambda: VIT.init(jax.random.key(0), np.zeros((1, 16, 16, 3)))['params'])
        prompts = jax.eval_shape(lambda p: method.init(jax.random.key(0), VIT, p, 3), params)
        shape = jax.eval_shape(lambda p, x: prefix.entering(VIT, method, p, x), params, np.zeros((2, 16, 16, 3)))
        images = None if entering else jax.ShapeDtypeStruct((2, 16, 16, 3), np.float32)
        run = jax.jit(lambda params, prompts, images, x: forward(VIT, method, params, prompts, images, entering=x)[0])
        return run.lower(params, prompts, images, shape if entering else None).compile().cost_analysis()['flops']

    late = Stack(AP(at=(3,), shape='channel'), Linear())
    assert flops(late, True) < 0.3 * flops(late, False)
    assert flops(Linear(), True) < 0.01 * flops(Linear(), False)


@pytest.fixture(scope='module')
def deeper():
    return vj.load_backbone('random:Ti/8@16', depth=3, width=32, mlp_dim=32, heads=2)


@pytest.mark.parametrize('method', [Linear(), Stack(AP(at=(2,)), Linear())], ids=['linear', 'ap'])
def test_a_run_ends_with_the_same_prompts(tmp_path, deeper, npz, method):
    results = [
        vj.fit(method, npz, deeper, workdir=tmp_path / str(cached),
               recipe=dataclasses.replace(RECIPE, cache_prefix=cached))
        for cached in (True, False)
    ]  # fmt: skip
    chex.assert_trees_all_close(results[0].prompts, results[1].prompts, atol=1e-5, rtol=1e-4)
    assert results[0].metrics['cached_blocks'] == prefix.entry(method, deeper.model) > 0
    assert results[1].metrics['cached_blocks'] == 0
    assert results[0].metrics['test_accuracy'] == pytest.approx(results[1].metrics['test_accuracy'], abs=0.05)


def test_only_fixed_images_are_cached(deeper):
    def asked(method, recipe=RECIPE, **changes):
        program = steps.Program(deeper.model, method, default_preprocess(deeper), 3)
        return prefixed.applies(dataclasses.replace(program, **changes), recipe)

    assert asked(Linear())
    assert not asked(Linear(), dataclasses.replace(RECIPE, cache_prefix=False))
    assert not asked(Linear(), mixup=0.2)
    assert not asked(Linear(), preprocess=default_preprocess(deeper, 'flip'))
    assert not asked(Stack(NormTune(), Linear())) and not asked(Stack(VPT(), Linear()))


def test_what_memory_cannot_hold_goes_to_a_file(tmp_path, deeper, npz, monkeypatch):
    preprocess = default_preprocess(deeper)
    split = vj.data.load(npz, preprocess).train
    program = steps.Program(deeper.model, Stack(AP(at=(2,)), Linear()), preprocess, 3)
    mesh = meshes.data_mesh()
    params = meshes.cast_backbone(deeper.params, 'float32', mesh)
    held = prefixed.rows(program, mesh, params, split, 16, tmp_path)
    monkeypatch.setattr(prefixed, 'free_memory', lambda: 0)
    on_disk = prefixed.rows(program, mesh, params, split, 16, tmp_path)
    assert isinstance(on_disk, np.memmap) and not isinstance(held, np.memmap)
    np.testing.assert_array_equal(held, on_disk)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(prefixed.shutil, 'disk_usage', lambda place: SimpleNamespace(free=0))
    with pytest.raises(UsageError, match='has room for it: give --config'):
        prefixed.rows(program, mesh, params, split, 16, tmp_path)
