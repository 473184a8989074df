"""Methods on a tiny ResNet through the real train step: what is offered trains, what is not is refused."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.networks import drawn
from tests.training.conftest import arrays
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.errors import UsageError
from vpt_jax.methods import VPT, Context, Full, Linear, Stack, VPTAdd, VPTBelow, VPTPad, VPTPixels
from vpt_jax.models.convolution import ResidualStages
from vpt_jax.models.resnet import ResNet
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps

MODEL = ResNet(depths=(1, 1), inner=(4, 8), outer=(16, 32), stem_width=8, image_size=16)
BELOW = VPTBelow(num_channels=2, pixel_init='imagenet')


def _train(method, count=6):
    """Losses of `count` steps on one batch, the state afterwards, and the program with its weights."""
    method = Stack(method, Linear())
    program = steps.Program(MODEL, method, Preprocess(16), 4)
    mesh, params, data = meshes.data_mesh(), drawn(MODEL), arrays()
    weight = np.ones(16, np.float32)
    weight[-3:] = 0  # as in a last, partial batch
    batch = {'image': data['images'][:16], 'label': data['labels'][:16].astype(np.int32), 'weight': weight}
    state = steps.init_state(program, params, seed=0, learning_rate=0.05, weight_decay=0.0, warmup_epochs=0,
                             epochs=100, steps_per_epoch=count)  # fmt: skip
    first = jax.tree.map(np.asarray, (state.prompts, state.state))
    state, losses = meshes.replicate(state, mesh), []
    for _ in range(count):
        state, metrics = steps.train_step(program, mesh)(params, state, meshes.shard_batch(batch, mesh))
        losses.append(float(metrics['loss']))
    return losses, first, state, (program, mesh, params, batch)


@pytest.mark.parametrize(
    'method', [None, VPTPad(num_pixels=3), VPTPad(num_pixels=2, pixel_init='gaussian'), BELOW],
    ids=['linear', 'pad', 'pad-gaussian', 'below'],
)  # fmt: skip
def test_the_loss_falls(method):
    method = Stack() if method is None else method
    losses, (prompts, _), state, _ = _train(method)
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    moved = jax.tree.map(lambda old, new: bool((old != np.asarray(new)).any()), prompts, state.prompts)
    assert all(jax.tree.leaves(moved))


def test_below_trains_the_first_layers_with_their_norm_on_the_batch():
    _, (prompts, first), state, (program, mesh, params, batch) = _train(BELOW, count=3)
    assert prompts['vpt_below']['conv1']['kernel'].shape == (7, 7, 5, 8)
    np.testing.assert_array_equal(prompts['vpt_below']['conv1']['kernel'][:, :, :3], params['conv1']['kernel'])
    assert set(prompts['vpt_below']['bn1']) == {'scale', 'bias'}
    assert prompts['vpt_below']['channels'].min() >= 0 and prompts['vpt_below']['channels'].max() <= 1
    carried = state.state['vpt_below']
    assert jax.tree.structure(carried) == jax.tree.structure(first['vpt_below'])
    np.testing.assert_allclose(carried['kept'], 0.9**3, rtol=1e-6)
    assert (np.asarray(carried['added']['bn1']['var']) > 0).all()
    # Evaluation looks at the running statistics, so what was carried changes what it says.
    look = steps.eval_step(program, mesh)
    batch = meshes.shard_batch(batch, mesh)
    logits = [look(params, (state.prompts, s), batch)['logits'] for s in (state.state, first)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_below_on_a_network_without_batch_norm_carries_nothing(backbone):
    assert BELOW.init_state(backbone.model) == {}


def test_full_fine_tuning_leaves_the_statistics_alone():
    params = drawn(MODEL)
    prompts = Full().init(jax.random.key(0), MODEL, params, 4)
    names = {name for name in flatten_dict(params, sep='/') if not name.endswith(('/mean', '/var'))}
    assert set(flatten_dict(prompts, sep='/')) == names
    restored = Full().weights(prompts, params)
    assert jax.tree.structure(restored) == jax.tree.structure(params)


@pytest.mark.parametrize(('pixel_init', 'value'), [('gaussian', 0.7), ('imagenet', (0.7 - 0.485) / 0.229)])
def test_frames_are_normalised_or_not(pixel_init, value):
    method = VPTPad(num_pixels=1, pixel_init=pixel_init)
    prompts = {'top_bottom': np.full((2, 6, 3), 0.7, np.float32), 'left_right': np.full((4, 2, 3), 0.7, np.float32)}
    red = np.array(method.pixels(prompts, np.zeros((1, 4, 4, 3), np.float32), Context()))[0, :, :, 0]
    assert (red[1:-1, 1:-1] == 0).all()
    red[1:-1, 1:-1] = value
    np.testing.assert_allclose(red, value, rtol=1e-6)


def test_tokens_are_refused():
    for method in (VPT(), VPTAdd(), VPTPixels()):
        with pytest.raises(UsageError, match=r"changes the 'tokens' of a network, which ResNet does not offer"):
            method.check(MODEL)
    Stack(VPTPad(num_pixels=1), BELOW, Linear()).check(MODEL)


def test_a_network_may_keep_its_first_convolution():
    class Closed(ResidualStages):
        places = frozenset({'weights', 'pixels'})

    with pytest.raises(UsageError, match='widens the first convolution, which Closed does not offer'):
        BELOW.check(Closed())
