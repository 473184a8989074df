"""A small frozen ViT, and ways to run methods on it quickly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpt_jax.methods import forward
from vpt_jax.models.vit import ViT

DEPTH, CLASSES = 3, 5
# Programs here run once or twice: compiling them is what takes the time.
OPTIONS = {'compiler_options': {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}}


class Tiny:
    """A frozen ViT of width 16 on 16 x 16 images (a 4 x 4 grid), with weights that are not special."""

    def __init__(self, depth=DEPTH):
        self.model = ViT(width=16, depth=depth, mlp_dim=32, heads=2, patch_size=4, image_size=16)
        self.images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
        self.labels = np.arange(4) % CLASSES
        shapes = jax.eval_shape(lambda: self.model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))['params']
        self.params = self.drawn(shapes, seed=1)

    @staticmethod
    def drawn(shapes, size=0.2, seed=2):
        """A tree of these shapes, drawn so that nothing is zero or tied; scales are around one."""
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            one = getattr(path[-1], 'key', '') == 'scale'
            return jnp.asarray(one + size * rng.normal(size=leaf.shape), jnp.float32)

        return jax.tree_util.tree_map_with_path(draw, shapes)

    def shapes(self, method):
        """The method's prompts as shapes, which compiles nothing."""
        method.check(self.model)
        return jax.eval_shape(lambda p: method.init(jax.random.key(0), self.model, p, CLASSES), self.params)

    def init(self, method, seed=2):
        """Prompts as the method draws them."""
        method.check(self.model)
        draw = jax.jit(lambda params: method.init(jax.random.key(seed), self.model, params, CLASSES), **OPTIONS)
        return draw(self.params)

    def prompts(self, method, size=0.2, seed=2):
        """Prompts of the method's shapes, none of them special."""
        return self.drawn(self.shapes(method), size, seed)

    def logits(self, method, prompts, *, scan=False, train=False, images=None, **clone):
        """Class scores, compiled."""
        model = self.model.clone(scan=scan, **clone)
        images = self.images if images is None else images

        def run(params, prompts, images):
            key = jax.random.key(7, impl='unsafe_rbg') if train else None
            state = method.init_state(model)
            return forward(model, method, model.stored(params), prompts, images, state=state, train=train, key=key)[0]

        return np.asarray(jax.jit(run, **OPTIONS)(self.params, prompts, images))

    def gradient(self, method, prompts, *, scan=False, train=False):
        """(logits, gradient of the mean cross entropy with respect to the prompts), compiled."""
        model = self.model.clone(scan=scan)

        def loss(prompts, params):
            key = jax.random.key(7, impl='unsafe_rbg') if train else None
            state, stored = method.init_state(model), model.stored(params)
            logits, _ = forward(model, method, stored, prompts, self.images, state=state, train=train, key=key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, self.labels).mean(), logits

        run = jax.jit(jax.grad(loss, has_aux=True), **OPTIONS)
        grads, logits = run(prompts, self.params)
        return np.asarray(logits), jax.tree.map(np.asarray, grads)


@pytest.fixture(scope='session')
def tiny():
    return Tiny()


@pytest.fixture(scope='session')
def tiny_at_depth():
    return Tiny
