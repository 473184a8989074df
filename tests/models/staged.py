"""What the tests of networks of stages share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax.methods import forward
from vpt_jax.models.places import UNCHANGED

CLASSES = 3
# Programs here run a few times: compiling them is what takes the time.
OPTIONS = {'compiler_options': {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}}


def drawn(module, x, size=0.2, seed=0):
    """Parameters that are not special, scales around one; drawing them compiles nothing."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(x)))['params']
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return ((path[-1].key in ('scale', 'layer_scale')) + size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def apply(module, params, x, *args, **kwargs):
    """What a module gives, compiled once and quickly."""
    return jax.jit(lambda params, x: module.apply({'params': params}, x, *args, **kwargs), **OPTIONS)(params, x)


def traced(model, size, method=UNCHANGED):
    """Shape of the features of one image of `size` (height, width); nothing is compiled or computed."""
    images = jnp.zeros((1, *size, 3))
    key = jax.random.key(0)
    return jax.eval_shape(lambda: model.init_with_output(key, images, method)[0]).shape


def count(model):
    """Number of parameters."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def assert_methods_learn(model, method, steps=4):
    """A few steps of gradient descent on one batch lower the loss, and every prompt gets a gradient."""
    method.check(model)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, model.image_size, model.image_size, 3)).astype(np.float32)
    labels = np.arange(4) % CLASSES
    params = drawn(model, images)
    prompts = method.init(jax.random.key(1), model, params, CLASSES)

    def loss(prompts):
        logits, _ = forward(model, method, params, prompts, images, state=method.init_state(model), train=True,
                            key=jax.random.key(2))  # fmt: skip
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = jax.jit(jax.value_and_grad(loss), **OPTIONS)
    losses = []
    for _ in range(steps):
        value, grads = step(prompts)
        losses.append(float(value))
        # The key bias shifts all scores of a query alike: the softmax does not see it.
        silent = {jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads)
                  if not np.abs(g).max() > 1e-7}  # fmt: skip
        assert all("['key']['bias']" in name for name in silent), silent
        prompts = jax.tree.map(lambda p, g: p - 0.02 * g, prompts, grads)
    assert losses[-1] < losses[0] - 1e-3, losses
