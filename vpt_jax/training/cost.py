"""What a prompted network costs, as XLA counts it."""

import dataclasses

import jax
import jax.numpy as jnp

from vpt_jax.data.preprocess import Preprocess
from vpt_jax.methods import Method, forward
from vpt_jax.training import step as steps
from vpt_jax.training.mesh import data_mesh

#: Any will do: the operations are the same.
_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def forward_flops(model, method: Method, num_classes: int, batch_size: int = 64) -> float:
    """Floating-point operations of one image's way to class scores.

    Counted in the program as it is given to the compiler, so the figure does not depend on the device.

    Args:
      model: the backbone module.
      method: the method, with a head.
      num_classes: C.
      batch_size: what the cost of a batch is divided by; some methods compute a part once for all its images.

    Returns:
      Operations an image; a multiply-add is two.
    """
    model = _unrolled(model)
    params = _params(model)
    size, key = method.input_size(model), jax.random.key(0)
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
    prompts = jax.eval_shape(lambda p: method.init(key, model, p, num_classes), params)
    state = jax.eval_shape(lambda: method.init_state(model, num_classes, key))

    def run(params, prompts, state, images):
        return forward(model, method, params, prompts, images, state=state, pixels=_PIXELS)[0]

    return jax.jit(run).lower(params, prompts, state, images).cost_analysis()['flops'] / batch_size


@dataclasses.dataclass(frozen=True)
class TrainCost:
    """What one training image costs.

    Attributes:
      flops: floating-point operations; a multiply-add is two.
      memory: bytes for activations and other intermediate results.
    """

    flops: float
    memory: float


def train_cost(model, method: Method, num_classes: int, batch_size: int = 32) -> TrainCost:
    """What the compiled train step costs an image; no weight or image is made for it.

    SGD in float32, counted in the program that the compiler made, so what nobody needs is not counted.

    Args:
      model: the backbone module.
      method: the method, with a head.
      num_classes: C.
      batch_size: what the cost of a step is divided by.
    """
    model, size = _unrolled(model), method.input_size(model)
    program = steps.Program(model, method, Preprocess(size), num_classes)
    schedule = {'learning_rate': 0.1, 'weight_decay': 0.1, 'warmup_epochs': 1, 'epochs': 2, 'steps_per_epoch': 1}
    params = _params(model)
    state = jax.eval_shape(lambda p: steps.init_state(program, p, seed=0, **schedule), params)
    batch = {
        'image': jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        'weight': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }
    compiled = steps.train_step(program, data_mesh()).lower(params, state, batch).compile()
    flops, memory = compiled.cost_analysis()['flops'], compiled.memory_analysis().temp_size_in_bytes
    return TrainCost(flops / batch_size, memory / batch_size)


def _unrolled(model):
    """The network without a scan, which would be counted as one turn of its loop."""
    return model.clone(scan=False) if getattr(model, 'scan', False) else model


def _params(model):
    """The shapes of a network's weights."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    key = jax.random.key(0)
    return jax.eval_shape(lambda x: model.init({'params': key, 'dropout': key}, x)['params'], images)
