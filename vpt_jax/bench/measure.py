"""Times this package's compiled train and evaluation steps on synthetic images."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax import methods
from vpt_jax.bench import flops
from vpt_jax.models.zoo import Backbone
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.loop import default_preprocess

CLASSES = 100

#: What is timed under each name; 10 prompts, the middle of the published grids.
METHODS: dict[str, Callable[[], methods.Method]] = {
    'linear': methods.Linear,
    'vpt_shallow': lambda: methods.VPT(num_tokens=10),
    'vpt_deep': lambda: methods.VPT(num_tokens=10, deep=True),
    'vapt': lambda: methods.VAPT(num_tokens=10),
    'bias': methods.Bias,
    'adapter': methods.Adapter,
    'full': methods.Full,
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every measured call of one program.

    Attributes:
      seconds: one entry a call, warm-up excluded.
      images: images a call.
    """

    seconds: tuple[float, ...]
    images: int

    @property
    def images_per_second(self) -> float:
        """At the median call."""
        return self.images / float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / float(np.median(self.seconds))


def timed(call: Callable[[], object], images: int, warmup: int, repeats: int) -> Timing:
    """Times `call`, which must return only when its work is done."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds), images)


class Measured:
    """The compiled steps of one method, backbone, batch and precision.

    Attributes:
      compile_seconds: tracing and compiling both steps.
      peak_memory_bytes: arguments, results and temporaries of the train step, as XLA plans them.
      xla_flops: operations of a train step as XLA counts them, None where the platform does not say.
      formula_flops: likewise by `flops.train_flops`.
    """

    def __init__(self, backbone: Backbone, method: str, batch: int, precision: str):
        self.backbone, self.batch_size = backbone, batch
        self.method = methods.with_head(METHODS[method]())
        preprocess = default_preprocess(backbone)
        program = steps.Program(backbone.model, self.method, preprocess, CLASSES, precision=precision)
        self.mesh = meshes.data_mesh()
        self.params = meshes.cast_backbone(backbone.params, precision, self.mesh)
        state = steps.init_state(program, backbone.params, seed=0, learning_rate=1e-3, weight_decay=1e-4,
                                 warmup_epochs=0, epochs=100, steps_per_epoch=100)  # fmt: skip
        self.state = meshes.replicate(state, self.mesh)
        rng = np.random.default_rng(0)
        size = backbone.model.image_size
        self.batch = {
            'image': rng.integers(0, 256, (batch, size, size, 3), np.uint8),
            'label': rng.integers(0, CLASSES, batch).astype(np.int32),
            'weight': np.ones(batch, np.float32),
        }
        on_device = meshes.shard_batch(self.batch, self.mesh)
        trained = (self.state.prompts, self.state.state)
        start = time.perf_counter()
        train = steps.train_step(program, self.mesh).lower(self.params, self.state, on_device).compile()
        evaluate = steps.eval_step(program, self.mesh).lower(self.params, trained, on_device).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = train.memory_analysis()
        self.peak_memory_bytes = int(
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )  # fmt: skip
        self.xla_flops = (train.cost_analysis() or {}).get('flops')
        prompts = sum(getattr(m, 'num_tokens', 0) for m in getattr(self.method, 'methods', ()))
        self.formula_flops = batch * flops.train_flops(backbone.model, self.method, prompts)
        self._train, self._evaluate, self._on_device = train, evaluate, on_device

    def train(self) -> None:
        """One train step, waited for."""
        self.state, metrics = self._train(self.params, self.state, self._on_device)
        jax.block_until_ready((self.state, metrics))

    def evaluate(self) -> jax.Array:
        """One evaluation step, waited for; logits [B, C]."""
        out = self._evaluate(self.params, (self.state.prompts, self.state.state), self._on_device)
        return jax.block_until_ready(out)['logits']


def matmul_rate(precision: str, size: int = 0, repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product in a precision of `Program`: what MFU is a fraction of."""
    size = size or (2048 if jax.default_backend() == 'cpu' else 8192)
    dtype = jnp.bfloat16 if precision == 'bfloat16' else jnp.float32
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision='highest' if dtype == jnp.float32 else 'default'))
    timing = timed(lambda: jax.block_until_ready(product(a, a)), 1, 2, repeats)
    return 2 * size**3 / min(timing.seconds)
