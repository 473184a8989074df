"""Several processes as one run: how they find each other, and what they must agree on.

Every process runs the same program on its own devices; XLA connects them. What only one of them notices (a folder that
holds another run, an image that cannot be read, a signal to stop) has to be told to the others, which would wait for it
forever otherwise.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vpt_jax.errors import UsageError, unknown

T = TypeVar('T')

MODES = ('auto', 'off')
#: A process that ends alone waits so long for the others. They do the same work, so they are never far behind.
_SHUTDOWN_SECONDS = 60
_LONGEST_MESSAGE = 2000


def start(mode: str = 'auto', coordinator: str | None = None, num_processes: int | None = None,
          process_id: int | None = None) -> None:  # fmt: skip
    """Joins the other processes of this run, if there are any; to be called before anything touches a device.

    Args:
      mode: 'auto': join where SLURM, Open MPI, a TPU pod or an indexed Kubernetes job started several processes;
        'off': be a run of one process.
      coordinator: HOST:PORT of process 0, for processes that were started by hand; needs the other two, and they it.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UsageError: arguments that do not fit together, or processes that do not find each other.
    """
    if mode not in MODES:
        raise unknown('value of --distributed', mode, MODES)
    by_hand = (coordinator, num_processes, process_id)
    options: dict[str, Any] = {'shutdown_timeout_seconds': _SHUTDOWN_SECONDS}
    count = started_processes()
    if by_hand != (None, None, None):
        if None in by_hand:
            raise UsageError(
                '--coordinator=HOST:PORT, --num_processes and --process_id are given together or not at all'
            )
        if ':' not in coordinator or not 0 <= process_id < num_processes:
            raise UsageError(
                f'--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: the '
                'coordinator is written HOST:PORT, and processes are numbered from 0'
            )
        count = num_processes
        options |= {'coordinator_address': coordinator, 'num_processes': num_processes, 'process_id': process_id,
                    'cluster_detection_method': 'deactivate'}  # fmt: skip
    elif mode == 'off' or count == 1 or (count is None and not _may_be_a_pod()):
        return
    elif gpus := local_gpus(os.environ):
        options['local_device_ids'] = gpus
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        if count is None and isinstance(error, ValueError):  # libtpu is installed on a machine without TPUs
            return
        reason = ' '.join(str(error).split())[:300]
        raise UsageError(
            f'the processes of this run did not find each other ({reason}): start all of them, or give '
            '--distributed=off for a run of one process'
        ) from error


def started_processes() -> int | None:
    """How many processes a launcher started as this run; None if none says."""
    if {'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID'} <= os.environ.keys():
        return int(os.environ['SLURM_NTASKS'])
    if 'OMPI_COMM_WORLD_SIZE' in os.environ:
        return int(os.environ['OMPI_COMM_WORLD_SIZE'])
    return None


def _may_be_a_pod() -> bool:
    return bool({'JOB_COMPLETION_INDEX', 'JAX_COORDINATOR_ADDRESS'} & os.environ.keys()
                or importlib.util.find_spec('libtpu'))  # fmt: skip


def local_gpus(environment: Any) -> list[int] | None:
    """A SLURM task's share of the GPUs that it sees, in equal parts among the tasks of its node.

    JAX alone would take one GPU a task: too few where a node has one task, and another task's where each sees its own.

    Args:
      environment: variables by name.

    Returns:
      Indices into CUDA_VISIBLE_DEVICES; None where this is no SLURM task, GPUs are not assigned, or
      JAX_LOCAL_DEVICE_IDS says it.
    """
    visible = [name for name in environment.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    counts = environment.get('SLURM_STEP_TASKS_PER_NODE', '')
    if not visible or not counts or 'JAX_LOCAL_DEVICE_IDS' in environment:
        return None
    tasks: list[int] = []  # '2(x3),1' is 2, 2, 2, 1
    for part in counts.split(','):
        number, _, times = part.rstrip(')').partition('(x')
        tasks += [int(number)] * int(times or 1)
    here, local = tasks[int(environment.get('SLURM_NODEID', 0))], int(environment['SLURM_LOCALID'])
    if len(visible) < here:  # each sees its own
        return list(range(len(visible)))
    share = len(visible) // here
    return list(range(local * share, (local + 1) * share))


def several() -> bool:
    """Whether other processes belong to this run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    # A process by itself need not wake its devices to know.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def together(do: Callable[[], T]) -> T:
    """What `do` gives; a UsageError in any process is raised in all of them."""
    if not several():
        return do()
    problem, result = '', None
    try:
        result = do()
    except UsageError as error:
        problem = str(error)
    text = np.zeros(_LONGEST_MESSAGE, np.int32)
    encoded = np.frombuffer(problem.encode()[:_LONGEST_MESSAGE], np.uint8)
    text[: len(encoded)] = encoded
    for row in multihost_utils.process_allgather(text):
        if row.any():
            raise UsageError(row[row > 0].astype(np.uint8).tobytes().decode(errors='ignore'))
    return result


def main_first(do: Callable[[], T]) -> T:
    """`together`, in process 0 before the others: what it downloads, they find."""
    if not several():
        return do()
    before = together(do) if is_main() else together(lambda: None)
    return together(lambda: before) if is_main() else together(do)


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if several() else number


def from_main(tree: Any) -> Any:
    """Process 0's arrays, in every process."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree
