"""How a run trains: the published protocols as one frozen record."""

import dataclasses
import math

import jax

from vpt_jax.errors import UsageError, unknown
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training import schedule as schedules


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a run that are not the method's, the data's or the backbone's.

    The defaults are those of VPT's and VAPT's prompt runs (arXiv 2203.12119, 2501.18936): SGD with momentum 0.9, batch
    64, 100 epochs of which 10 warm up, a rate that changes once an epoch and is 0 in the first.

    Attributes:
      epochs, warmup_epochs: lengths; 0 <= warmup_epochs < epochs.
      batch_size: over all devices and processes.
      optimizer: a name of `optimizer.NAMES`.
      base_lr: for a batch of 256; the rate used is base_lr / 256 * batch_size.
      weight_decay, momentum, bias_multiplier, decay_biases, head_weight_decay: see `optimizer.build`.
      shard_backbone: split the frozen backbone over the devices instead of copying it to each, for one that is larger
        than a device's memory. Changes no result, and need not be the same when a run is resumed.
      schedule: how the rate changes, a name of `schedule.NAMES`.
      per_step: change the rate of `'cosine'` every step instead of every epoch.
      label_smoothing, mixup: regularisation of pretraining; 0 for none, as in every prompt protocol.
      precision: 'auto' (bfloat16 on accelerators, float32 on the CPU), 'float32' or 'bfloat16'.
      eval_batch_size: 0 for the training batch size.
      eval_every_epochs: validation during training; 0 for only at the end.
      log_every_steps: a line of metrics; the losses of all steps are checked at this distance.
      checkpoint_every_steps: 0 for once an epoch.
      cache_prefix: compute what the blocks before the first trained one make of every training image once, instead of
        in every epoch, where images are not augmented (`prefixed`).
      keep_checkpoints: how many are kept, >= 1.
      seed: draws prompts, shuffling, augmentation and dropout.

    Raises:
      UsageError: a value out of range, with its field in a config named.
    """

    epochs: int = 100
    warmup_epochs: int = 10
    batch_size: int = 64
    optimizer: str = 'sgd'
    base_lr: float = 1.0
    weight_decay: float = 1e-3
    momentum: float = 0.9
    bias_multiplier: float = 1.0
    decay_biases: bool = False
    head_weight_decay: float | None = None
    per_step: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    precision: str = 'auto'
    eval_batch_size: int = 0
    eval_every_epochs: int = 0
    log_every_steps: int = 10
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 2
    seed: int = 0
    schedule: str = 'cosine'
    cache_prefix: bool = True
    shard_backbone: bool = False

    def __post_init__(self):
        for field, value, low in (
            ('train.epochs', self.epochs, 1),
            ('train.warmup_epochs', self.warmup_epochs, 0),
            ('train.batch_size', self.batch_size, 1),
            ('train.log_every_steps', self.log_every_steps, 1),
            ('train.eval_every_epochs', self.eval_every_epochs, 0),
            ('train.mixup', self.mixup, 0),
            ('optim.lr', self.base_lr, 0),
            ('checkpoint.every_steps', self.checkpoint_every_steps, 0),
            ('checkpoint.keep', self.keep_checkpoints, 1),
            ('seed', self.seed, 0),
        ):
            if not low <= value < math.inf:
                raise UsageError(f'--config.{field} must be a finite number >= {low}, got {value}')
        if self.warmup_epochs >= self.epochs:
            raise UsageError(
                f'--config.train.warmup_epochs={self.warmup_epochs} leaves no epoch of --config.train.epochs='
                f'{self.epochs} to train in; use fewer warm-up epochs'
            )
        if self.schedule not in schedules.NAMES:
            raise unknown('schedule', self.schedule, schedules.NAMES)
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f'--config.train.label_smoothing must be in [0, 1), got {self.label_smoothing}')
        if self.precision not in ('auto', 'float32', 'bfloat16'):
            raise unknown('precision', self.precision, ('auto', 'float32', 'bfloat16'))
        optimizers.build(
            self.optimizer, self.base_lr, self.weight_decay, self.momentum, self.bias_multiplier, self.decay_biases,
            self.head_weight_decay,
        )  # fmt: skip

    @property
    def learning_rate(self) -> float:
        """The rate at schedule factor 1."""
        return self.base_lr / 256 * self.batch_size

    def resolved_precision(self) -> str:
        """'float32' or 'bfloat16' on this machine."""
        if self.precision != 'auto':
            return self.precision
        return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
