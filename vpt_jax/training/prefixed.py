"""Training without the blocks before the first trained one: what they make of the training images is computed once.

Where images are not augmented, every epoch would compute it anew. It is kept on the device if it takes less than half
of what is free there, else in the host's memory if it takes less than a quarter of that, else in a file that goes
when the run ends. The numbers are those of training on the images, up to the rounding of differently cut programs.
"""

import math
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from vpt_jax.data import Batches, Split
from vpt_jax.data.cache import free_memory
from vpt_jax.errors import UsageError
from vpt_jax.methods import prefix
from vpt_jax.training.mesh import feeder
from vpt_jax.training.recipe import Recipe
from vpt_jax.training.step import Program, PyTree, entering_step


def applies(program: Program, recipe: Recipe) -> bool:
    """Whether a run has blocks before the first trained one, whose work is the same in every epoch."""
    fixed = program.preprocess.augment == 'none' and not (program.mixup or program.method.backbone_dropout)
    several = recipe.epochs > 1 and jax.process_count() == 1
    return recipe.cache_prefix and fixed and several and prefix.entry(program.method, program.model) > 0


def rows(program: Program, mesh, params: PyTree, split: Split, batch_size: int, folder: Path | None = None):
    """What enters the first block that the method touches, for every example of a split.

    Args:
      program: its method says which block that is.
      mesh: the device mesh.
      params: backbone weights.
      split: decoded by the program's preprocessing.
      batch_size: how many images at a time.
      folder: where a file may be written if there is not enough memory; None for the system's temporary folder.

    Returns:
      [N, ...], in the type that the network computes in: a `jax.Array` if it is on the device, else a numpy array.

    Raises:
      UsageError: there is room for it neither in memory nor on the disk.
    """
    step = entering_step(program, mesh)
    batches = Batches(split, program.preprocess, batch_size, train=False)
    batch = feeder(batches, mesh)
    found, done = None, 0
    for t in tqdm(range(batches.steps_per_epoch), 'frozen blocks, once', leave=False, delay=2, disable=None):
        part = step(params, None, batch(t))
        if found is None:
            found = _room((len(split), *part.shape[1:]), part.dtype, mesh, folder)
        count = min(len(part), len(split) - done)
        if isinstance(found, jax.Array):
            found = _put(found, part[:count], done)
        else:
            found[done : done + count] = np.asarray(part)[:count]
        done += count
    return found


def _room(shape: tuple[int, ...], dtype, mesh, folder: Path | None):
    """An array to be filled, where there is room for it."""
    size = math.prod(shape) * dtype.itemsize
    device = mesh.devices.flat[0]
    if device.platform != 'cpu' and jax.process_count() == 1:
        memory = device.memory_stats() or {}
        if size < (memory.get('bytes_limit', 0) - memory.get('bytes_in_use', 0)) / 2:
            return jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, PartitionSpec()))
    if size < free_memory() / 4:
        return np.empty(shape, dtype)
    place = folder or tempfile.gettempdir()
    if shutil.disk_usage(place).free < 1.2 * size:  # a mapped file on a full disk would end the process
        raise UsageError(
            f'what the frozen blocks make of the training images takes {size / 1e9:.1f} GB, and neither the memory nor '
            f'the disk of {place} has room for it: give --config.train.cache_prefix=False, or another --workdir'
        )
    with tempfile.TemporaryFile(dir=folder) as file:  # gone from the folder at once, from the disk with the array
        return np.memmap(file, dtype, 'w+', shape=shape)


@partial(jax.jit, donate_argnums=0)
def _put(held: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(held, part, start, 0)


class PrefixedBatches:
    """Batches in which `entering` [B, ...] takes the place of `image`.

    Args:
      batches: of training images, not augmented.
      rows: from `rows`, of the same split.
      mesh: the device mesh.
    """

    def __init__(self, batches: Batches, rows, mesh):
        self.batches, self.rows = batches, rows
        sharding = NamedSharding(mesh, PartitionSpec('data'))
        self._take = jax.jit(lambda rows, index: rows[index], out_shardings=sharding)

    @property
    def split(self) -> Split:
        """The images' split."""
        return self.batches.split

    @property
    def batch_size(self) -> int:
        """As of the images."""
        return self.batches.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """As of the images."""
        return self.batches.steps_per_epoch

    def batch(self, t: int, rows: np.ndarray | None = None) -> dict:
        """Batch number t, or `rows` of it, of the same examples as the images' batch t."""
        index, weight = self.batches.examples(t)
        if rows is not None:
            index, weight = index[rows], weight[rows]
        on_device = isinstance(self.rows, jax.Array)
        entering = self._take(self.rows, index) if on_device else np.asarray(self.rows[index])
        return {'entering': entering, 'label': self.split.labels[index].astype(np.int32), 'weight': weight}
