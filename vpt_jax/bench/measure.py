"""Times this package's compiled train and evaluation steps on synthetic images."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax import methods
from vpt_jax.bench import flops
from vpt_jax.methods import prefix
from vpt_jax.models.network import Network
from vpt_jax.models.zoo import Backbone
from vpt_jax.training import mesh as meshes
from vpt_jax.training import step as steps
from vpt_jax.training.loop import default_preprocess

CLASSES = 100

#: What is timed under each name, made for a network; 10 prompts, the middle of the published grids.
METHODS: dict[str, Callable[[Network], methods.Method]] = {
    'linear': lambda model: methods.Linear(),
    'mlp': lambda model: methods.MLPHead(),
    'vpt_shallow': lambda model: methods.VPT(num_tokens=10),
    'vpt_deep': lambda model: methods.VPT(num_tokens=10, deep=True),
    'vapt': lambda model: methods.VAPT(num_tokens=10),
    'cvpt': lambda model: methods.CVPT(num_tokens=10),
    'pgn': lambda model: methods.PGN(num_tokens=10),
    'vp': lambda model: methods.VP(size=max(model.image_size // 8, 1)),
    'ap': lambda model: methods.AP(at=(2 * model.depth // 3,)),  # the last third
    'norm': lambda model: methods.NormTune(),
    'lora': lambda model: methods.LoRA(),
    'bias': lambda model: methods.Bias(),
    'adapter': lambda model: methods.Adapter(),
    'partial': lambda model: methods.Partial(),
    'full': lambda model: methods.Full(),
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

    A method that leaves the first blocks alone trains on what they made of the images, as it does in a run
    (`training.prefixed`); its evaluation is of the whole network.

    Attributes:
      cached_blocks: how many those are.
      compile_seconds: tracing and compiling both steps.
      peak_memory_bytes: arguments, results and temporaries of the train step, as XLA plans them.
      xla_flops: operations of a train step as XLA counts them, None where the platform does not say.
      formula_flops: likewise by `flops.train_flops`.
    """

    def __init__(self, backbone: Backbone, method: str, batch: int, precision: str):
        self.backbone, self.batch_size = backbone, batch
        self.method = methods.with_head(METHODS[method](backbone.model))
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
        images = meshes.shard_batch(self.batch, self.mesh)
        self.cached_blocks = prefix.entry(self.method, backbone.model)
        rows = images
        if self.cached_blocks:
            entering = steps.entering_step(program, self.mesh)(self.params, None, images)
            rows = {'entering': entering, 'label': images['label'], 'weight': images['weight']}
        trained = (self.state.prompts, self.state.state)
        start = time.perf_counter()
        train = steps.train_step(program, self.mesh).lower(self.params, self.state, rows).compile()
        evaluate = steps.eval_step(program, self.mesh).lower(self.params, trained, images).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = train.memory_analysis()
        self.peak_memory_bytes = int(
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )  # fmt: skip
        self.xla_flops = (train.cost_analysis() or {}).get('flops')
        prompts = sum(getattr(m, 'num_tokens', 0) for m in getattr(self.method, 'methods', ()))
        self.formula_flops = batch * flops.train_flops(backbone.model, self.method, prompts)
        self._train, self._evaluate, self._batch, self._images = train, evaluate, rows, images

    def train(self) -> None:
        """One train step, waited for."""
        self.state, metrics = self._train(self.params, self.state, self._batch)
        jax.block_until_ready((self.state, metrics))

    def evaluate(self) -> jax.Array:
        """One evaluation step, waited for; logits [B, C]."""
        out = self._evaluate(self.params, (self.state.prompts, self.state.state), self._images)
        return jax.block_until_ready(out)['logits']


def matmul_rate(precision: str, size: int = 0, repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product in a precision of `Program`: what MFU is a fraction of."""
    size = size or (2048 if jax.default_backend() == 'cpu' else 8192)
    dtype = jnp.bfloat16 if precision == 'bfloat16' else jnp.float32
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision='highest' if dtype == jnp.float32 else 'default'))
    timing = timed(lambda: jax.block_until_ready(product(a, a)), 1, 2, repeats)
    return 2 * size**3 / min(timing.seconds)
