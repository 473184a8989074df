"""Batches of fixed shape, each a pure function of the seed and its number, so that any run can be resumed anywhere."""

import numbers
from collections.abc import Iterator, Sequence

import numpy as np

from vpt_jax.data.dataset import Split
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.errors import UsageError


class Batches:
    """A split cut into batches.

    Training batches are shuffled anew each epoch and augmented; evaluation batches come in order, unaugmented. The
    last batch of an epoch may be partial: it is padded with repeated examples of weight 0, so that shapes stay static
    and no example is dropped.

    Args:
      split: examples decoded by `preprocess`.
      preprocess: takes the views.
      batch_size: B, >= 1.
      seed: >= 0; shuffling and augmentation.
      train: whether to shuffle and augment.

    Raises:
      UsageError: for an empty split, a batch size below 1, a negative seed, or images that another `Preprocess`
        decoded.
    """

    def __init__(self, split: Split, preprocess: Preprocess, batch_size: int, seed: int = 0, train: bool = True):
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise UsageError(f'the batch size must be a whole number >= 1, got {batch_size!r}')
        if not isinstance(seed, numbers.Integral) or seed < 0:
            raise UsageError(f'the seed must be a whole number >= 0, got {seed!r}')
        if len(split) == 0:
            raise UsageError('the split is empty: there is nothing to make batches of; use another split')
        self._one_array = isinstance(split.images, np.ndarray)
        first = split.images[0].shape
        edge = preprocess.size if preprocess.fixed_size else preprocess.resize_edge
        if min(first[:2]) != edge or (preprocess.fixed_size and first != (edge, edge, 3)):
            raise UsageError(
                f'the images were not decoded with resize {preprocess.resize!r} at size {preprocess.size}: load the '
                'dataset with the same Preprocess'
            )
        self.split = split
        self.preprocess = preprocess
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.train = bool(train)
        self._order = (-1, np.zeros(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the split, the last partial one included."""
        return -(-len(self.split) // self.batch_size)

    def batch(self, t: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Batch number t; the same for the same (seed, t) however one came there, and safe to call from threads.

        Args:
          t: >= 0, counted over epochs.
          rows: int [n], which of the batch's B examples to make; by default all. They come out as in the whole batch.

        Returns:
          `image` uint8 [B, S, S, 3], `label` int32 [B], and `weight` float32 [B]: 1 for an example, 0 for padding. Of
          `rows`, n instead of B.
        """
        index, weight = self.examples(t)
        rows = np.arange(self.batch_size) if rows is None else rows
        index, weight = index[rows], weight[rows]
        # Positions count from 1: NumPy pads seeds with zeros, so (seed, t, 0) would be epoch t's shuffle.
        images = self._views(index, [(int(t), int(row) + 1) for row in rows])
        return {'image': images, 'label': self.split.labels[index].astype(np.int32), 'weight': weight}

    def examples(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Which examples batch t has: their indices int64 [B], and their weights float32 [B]."""
        epoch, step = divmod(int(t), self.steps_per_epoch)
        index = self._epoch_order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        weight = (np.arange(self.batch_size) < len(index)).astype(np.float32)
        return np.resize(index, self.batch_size), weight

    def views(self, index: np.ndarray) -> np.ndarray:
        """One view of each of these examples, [n] to uint8 [n, S, S, 3], augmented if batches are; always the same."""
        return self._views(index, [(int(i), 0, 1) for i in index])

    def epoch(self, number: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches of one epoch; without augmentation every epoch has the same examples."""
        for step in range(self.steps_per_epoch):
            yield self.batch(number * self.steps_per_epoch + step)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.train:
            return np.arange(len(self.split))
        # One tuple, read and replaced whole: threads that race here compute the same order twice, nothing worse.
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))
            self._order = (epoch, order)
        return order

    def _views(self, index: np.ndarray, draws: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Views of examples; with the seed, `draws` decide the augmentation of each."""
        preprocess, images = self.preprocess, self.split.images
        on_host = self.train and preprocess.augment in ('flip', 'fgvc')
        if self._one_array and not on_host:
            return images[index]
        size = preprocess.size
        out = np.empty((len(index), size, size, 3), np.uint8)
        for position, i in enumerate(index):
            if on_host:
                rng = np.random.default_rng((self.seed, *draws[position]))
                out[position] = preprocess.train_view(images[i], rng)
            else:
                out[position] = preprocess.eval_view(images[i])
        return out
