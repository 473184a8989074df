"""What lies where when several devices, of one process or of many, run one program.

Batches are split over the mesh's axis `data`, trials of a sweep over `trial`. Prompts, optimizer states and, unless it
is asked to be sharded, the backbone are on every device. Host code gives each process's own part of a batch; the
compiled steps never know how many devices there are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from vpt_jax.data import Batches
from vpt_jax.errors import UsageError

PyTree = Any

#: A leaf with fewer numbers is on every device of a sharded backbone: splitting it saves nothing and costs a message.
SMALLEST_SHARDED = 2**15


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))


def trial_mesh(trials: int) -> Mesh:
    """All devices along `trial` as far as they divide the number of trials, the rest along `data`."""
    across = math.gcd(trials, jax.device_count())
    shape = (across, jax.device_count() // across)
    return jax.make_mesh(shape, ('trial', 'data'), axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch(size: int, mesh: Mesh, field: str = 'a batch') -> None:
    """Refuses a batch that the devices along `data` do not divide.

    Args:
      size: examples of a batch, over all devices and processes.
      mesh: with the axis `data`.
      field: what the message calls it.

    Raises:
      UsageError: they do not.
    """
    across = mesh.shape['data']
    if size % across:
        near = max(round(size / across), 1) * across
        raise UsageError(
            f'{field} of {size} examples cannot be split over {across} devices: use a multiple of {across}, such as '
            f'{near}'
        )


def feeder(batches: Batches, mesh: Mesh) -> Callable[[int], dict[str, jax.Array]]:
    """A function from t to batch t on the mesh, for which each process makes its own examples and no others.

    Raises:
      UsageError: if the devices do not divide the batch.
    """
    check_batch(batches.batch_size, mesh)
    rows = None if jax.process_count() == 1 else _rows(batches.batch_size, NamedSharding(mesh, PartitionSpec('data')))
    return lambda t: shard_batch(batches.batch(t, rows), mesh)


def _rows(size: int, sharding: Sharding) -> np.ndarray:
    """The positions in a batch whose examples this process's devices hold, in ascending order."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the mesh, split over `data`; each process gives its own part of the batch.

    Raises:
      UsageError: if the devices do not divide the batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    size = len(batch['label']) * jax.process_count()
    check_batch(size, mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    # A process's devices need not be neighbours in the mesh.
    rows = _rows(size, sharding)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            start = np.searchsorted(rows, first)
            return array[start : start + last - first]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def shard_trial_batch(batch: dict[str, np.ndarray], mesh: Mesh, shared: bool) -> dict[str, jax.Array]:
    """`shard_batch` on a `trial_mesh`; arrays that are not shared by all trials have a leading axis of them.

    Raises:
      UsageError: if the devices that do not go to trials do not divide the batch.
    """
    check_batch(batch['label'].shape[-1], mesh)
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(*batch_axes(shared))))


def batch_axes(shared: bool) -> tuple[str, ...]:
    """Mesh axes that split the leading axes of a batch of several trials."""
    return ('data',) if shared else ('trial', 'data')


def along_trials(states: PyTree, mesh: Mesh) -> PyTree:
    """Puts the stacked states of several trials on a `trial_mesh`."""
    return jax.device_put(states, NamedSharding(mesh, PartitionSpec('trial')))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a tree on every device of the mesh. A step whose first input lay elsewhere would be compiled twice."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, everywhere), tree)


def on_host(tree: PyTree) -> PyTree:
    """A replicated tree for code that computes outside of the mesh's programs: numpy if other processes hold it too."""
    return jax.device_get(tree) if jax.process_count() > 1 else tree


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    whole = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or whole:
        return jax.device_put(leaf, sharding)
    # Every process has the same array. `device_put` would send it around to make sure.
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def cast_backbone(params: PyTree, precision: str, mesh: Mesh, shard: bool = False) -> PyTree:
    """Backbone weights on the mesh, in the type they are computed in, so that no step converts them.

    Args:
      params: weights as the module stores them. Sharded, host arrays never are on any device as a whole.
      precision: 'float32' or 'bfloat16'.
      mesh: any.
      shard: split every large leaf over all devices (`shard_spec`) instead of copying it to each. The compiled steps
        gather it where it is used (as in ZeRO-3, arXiv 1910.02054).
    """
    dtype = jnp.dtype(jnp.bfloat16 if precision == 'bfloat16' else jnp.float32)

    def put(leaf: Any) -> jax.Array:
        if not shard:
            return _put(jnp.asarray(leaf, dtype), NamedSharding(mesh, PartitionSpec()))
        return _put(np.asarray(leaf).astype(dtype), NamedSharding(mesh, shard_spec(leaf.shape, mesh)))

    return jax.tree.map(put, params)


def shard_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a leaf of a sharded backbone is split: its largest axis that the devices divide, over all of them.

    A leaf below `SMALLEST_SHARDED` numbers, or without such an axis, is on every device.
    """
    able = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if mesh.size == 1 or math.prod(shape) < SMALLEST_SHARDED or not able:
        return PartitionSpec()
    chosen = max(able, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(mesh.axis_names if axis == chosen else None for axis in range(chosen + 1)))
