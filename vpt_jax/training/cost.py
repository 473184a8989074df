"""What a prompted network costs, as XLA counts it."""

import jax
import jax.numpy as jnp

from vpt_jax.methods import Method, forward

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
    # A scan would be counted as one turn of its loop.
    model = model.clone(scan=False) if getattr(model, 'scan', False) else model
    whole = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    size = method.input_size(model)
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda x: model.init({'params': key, 'dropout': key}, x)['params'], whole)
    prompts = jax.eval_shape(lambda p: method.init(key, model, p, num_classes), params)
    state = jax.eval_shape(lambda: method.init_state(model, num_classes, key))

    def run(params, prompts, state, images):
        return forward(model, method, params, prompts, images, state=state, pixels=_PIXELS)[0]

    return jax.jit(run).lower(params, prompts, state, images).cost_analysis()['flops'] / batch_size
