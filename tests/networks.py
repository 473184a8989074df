"""Small networks for tests: parameters that are not special, drawn and run without much compilation."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# Programs in tests run once or twice: compiling them is what takes the time.
_OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def _quick():
    """The options, and one that halves the time where XLA has it: it is internal to its CPU backend."""
    quicker = {**_OPTIONS, 'xla_cpu_use_fusion_emitters': False}
    try:
        jax.jit(lambda: 0, compiler_options=quicker)()
    except jax.errors.JaxRuntimeError:
        return {'compiler_options': _OPTIONS}
    return {'compiler_options': quicker}


QUICK = _quick()


def shapes(model):
    """Canonical names to shapes of a network's parameters; computes nothing."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return flatten_dict(jax.eval_shape(lambda: model.init(jax.random.key(0), images))['params'], sep='/')


def drawn(model, seed=0):
    """Parameters in which nothing is zero or tied: kernels keep the scale of their input, variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        values = rng.normal(size=shape)
        if name.endswith('kernel'):
            return values * np.prod(shape[:-1]) ** -0.5
        return np.exp(0.2 * values) if name.endswith(('scale', 'var')) else 0.2 * values

    flat = {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in shapes(model).items()}
    return unflatten_dict(flat, sep='/')


def features(model, params, images):
    """What the network gives, compiled."""
    return np.asarray(_compiled(model)(params, images))


@lru_cache(maxsize=8)
def _compiled(model):
    return jax.jit(lambda params, images: model.apply({'params': params}, images), **QUICK)
