"""The folder of a run: what it was asked to do, what it measured, where it stands. One writer, no half-written file."""

import errno
import json
import os
import shutil
import sys
import time
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError
from vpt_jax.training import distributed

PyTree = Any


def _write(path: Path, text: str) -> None:
    with atomic.replacing(path) as file:
        file.write(text.encode())


def write_result(folder: Path, result: dict) -> None:
    """Writes a run's `result.json`."""
    _write(Path(folder) / 'result.json', json.dumps(result, indent=2) + '\n')


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Nested dicts and lists as one dict with dotted names."""
    if isinstance(tree, list | tuple):
        tree = {str(i): v for i, v in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, sub in tree.items():
        flat |= flatten(sub, f'{prefix}.{name}' if prefix else name)
    return flat


def crc32(state: PyTree) -> int:
    """Checksum of all leaves of a pytree."""
    total = 0
    for leaf in jax.tree.leaves(jax.device_get(state)):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total


def check_same(path: Path, config: dict) -> None:
    """Writes a configuration to a file, or compares it with the one that is there.

    Raises:
      UsageError: the file holds another configuration (the fields that differ are named), or no JSON.
    """
    config = json.loads(json.dumps(config))
    if not path.exists():
        _write(path, json.dumps(config, indent=2) + '\n')
        return
    try:
        before = flatten(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UsageError(f'{path} is not valid JSON; remove it, or choose another --workdir') from error
    now = flatten(config)
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        shown = '; '.join(f'{k}: {before.get(k)!r} there, {now.get(k)!r} now' for k in changed[:6])
        more = f' and {len(changed) - 6} more' if len(changed) > 6 else ''
        raise UsageError(
            f'{path.parent} holds a run with another configuration ({shown}{more}); '
            'choose another --workdir, or give the same configuration to resume it'
        )


class RunFolder:
    """Opens, or reopens, the folder of a run.

    Orbax and tensorboardX, slow to import, are imported when there is something for them to do: after the first step.

    Args:
      path: everything the run writes is under it; made if absent.
      config: the run's resolved configuration, plain data that JSON can hold.
      state_bytes: size of one checkpoint, for the check of the disk.
      keep: number of checkpoints kept.

    Raises:
      UsageError: the folder cannot be written, the disk is too full, or it holds a run with another configuration
        (the fields that differ are named).
    """

    def __init__(self, path: str | Path, config: dict, state_bytes: int = 0, keep: int = 2):
        self.path = Path(path).expanduser().resolve()
        self.main = distributed.is_main()
        distributed.together(lambda: self._open(config, state_bytes * (keep + 2) + 2**20) if self.main else None)
        distributed.together(self._check_shared)
        self._keep = keep
        self._writer = None

    @cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        # Written synchronously: a checkpoint is either complete and renamed into place, or invisible.
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, enable_async_checkpointing=False)
        # Without a handler, orbax guesses what it holds from the newest checkpoint, which may be a damaged one.
        return ocp.CheckpointManager(
            self.path / 'checkpoints', options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def _open(self, config: dict, needed: int) -> None:
        self._check_writable(needed)
        check_same(self.path / 'config.json', config)

    def _check_shared(self) -> None:
        if not (self.path / 'config.json').exists():
            raise UsageError(
                f'process {jax.process_index()} does not see what process 0 wrote to --workdir {self.path}: choose a '
                'folder on a file system that all machines of the run share'
            )

    def _check_writable(self, needed: int) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f'.probe.{os.getpid()}'
            probe.write_bytes(b'0')
            probe.unlink()
        except OSError as error:
            why = 'the disk is full' if error.errno == errno.ENOSPC else error.strerror
            raise UsageError(f'cannot write to --workdir {self.path}: {why}; choose another folder') from error
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UsageError(
                f'--workdir {self.path} has {free / 2**20:.0f} MiB free, and this run needs about '
                f'{needed / 2**20:.0f} MiB; free some space or choose another folder'
            )

    def restore(self, state: PyTree) -> PyTree:
        """The newest undamaged checkpoint, in the shapes and types of `state`; `state` itself if there is none.

        Damaged ones (cut short, files missing, other bytes than were saved) are named in a warning, and removed once
        an older one has been restored.

        Raises:
          UsageError: there are checkpoints, and none of them can be read.
        """
        if not (self.path / 'checkpoints').is_dir():
            return state
        import orbax.checkpoint as ocp

        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=ocp.args.StandardRestore(state))
                self._check_sum(step, restored)
            except Exception as error:  # orbax lets out whatever its readers raise
                damaged[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                continue
            for bad, why in damaged.items():
                if self.main:
                    print(f'warning: the checkpoint of step {bad} in {self.path} is damaged ({why}); going on from '
                          f'step {step}', file=sys.stderr, flush=True)  # fmt: skip
                self._manager.delete(bad)
            return restored
        if damaged:
            step, why = next(iter(damaged.items()))
            raise UsageError(
                f'no checkpoint in {self.path / "checkpoints"} can be read (step {step}: {why}): remove that folder to '
                'start anew, or choose another --workdir'
            )
        return state

    def _check_sum(self, step: int, state: PyTree) -> None:
        """Orbax notices missing bytes but not all changed ones."""
        saved = (self._manager.metadata(step).custom_metadata or {}).get('crc32')
        if saved is not None and saved != crc32(state):
            raise ValueError('its checksum does not match')

    def save(self, step: int, state: PyTree) -> None:
        """Saves a checkpoint unless that step has one.

        Raises:
          UsageError: the disk is full; the checkpoints before are intact.
        """
        import orbax.checkpoint as ocp

        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step, args=ocp.args.StandardSave(state), force=True, custom_metadata={'crc32': crc32(state)}
            )
        except OSError as error:
            raise UsageError(
                f'could not save the checkpoint of step {step} in {self.path} ({error.strerror or error}); '
                f'the last complete one is step {self._manager.latest_step()}: free some space and run again to resume'
            ) from error

    def last_saved(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def open_metrics(self, step: int) -> None:
        """Starts writing metrics after `step`; what an earlier attempt wrote beyond it is dropped, not repeated."""
        if not self.main:
            return
        path = self.path / 'metrics.jsonl'
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut short
                if row.get('step', 0) <= step:
                    kept.append(line)
            _write(path, ''.join(line + '\n' for line in kept))

    def log(self, step: int, row: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl` and the same scalars to the TensorBoard events."""
        if not self.main:
            return
        with open(self.path / 'metrics.jsonl', 'a') as f:
            f.write(json.dumps({'step': step, **row}) + '\n')
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.path / 'tensorboard'), flush_secs=30)
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def previous_result(self) -> dict:
        """The result of an earlier, finished attempt; {} if there is none."""
        path = self.path / 'result.json'
        return json.loads(path.read_text()) if path.exists() else {}

    def close(self) -> None:
        """Flushes and closes what is open."""
        if '_manager' in vars(self):
            self._manager.close()
        if self._writer is not None:
            self._writer.close()


class Progress:
    """Rate and time left: a bar on a terminal, a plain line every few seconds elsewhere.

    Args:
      total: steps of the whole run.
      start: steps done before.
      images_per_step: for the rate.
      every_seconds: distance of plain lines.
    """

    def __init__(self, total: int, start: int, images_per_step: int, every_seconds: float = 10.0):
        self.total, self.start, self.images = total, start, images_per_step
        self.every, self.began = every_seconds, time.perf_counter()
        self.printed = self.began
        shown = sys.stderr.isatty() and distributed.is_main()
        self.bar = tqdm(total=total, initial=start, unit='step', dynamic_ncols=True) if shown else None

    def update(self, step: int, row: dict[str, float] | None = None) -> None:
        """Tells that `step` steps are done; `row` holds the newest metrics if there are new ones."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if row:
                self.bar.set_postfix({k: f'{v:.4g}' for k, v in row.items()})
            return
        now = time.perf_counter()
        if row and (now - self.printed > self.every or step == self.total) and distributed.is_main():
            self.printed = now
            rate = (step - self.start) / max(now - self.began, 1e-9)
            left = tqdm.format_interval((self.total - step) / rate)
            values = ' '.join(f'{k} {v:.4g}' for k, v in row.items())
            print(f'step {step}/{self.total}  {values}  {rate * self.images:.0f} images/s  {left} left', flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()
