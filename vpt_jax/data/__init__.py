"""The data room: tasks, readers, preprocessing, augmentation and batches. It knows nothing of models or training.

preprocess = Preprocess(224)
dataset = load('folder:~/birds', preprocess)
for batch in Batches(dataset.test, preprocess, batch_size=64, train=False).epoch(): ...
"""

from vpt_jax.data.batches import Batches
from vpt_jax.data.dataset import Dataset, Split, load, protocol_of
from vpt_jax.data.prefetch import Prefetch, WaitMeter
from vpt_jax.data.preprocess import CLIP, HALF, IMAGENET, STATISTICS, Preprocess

__all__ = [
    'CLIP',
    'HALF',
    'IMAGENET',
    'STATISTICS',
    'Batches',
    'Dataset',
    'Prefetch',
    'Preprocess',
    'Split',
    'WaitMeter',
    'load',
    'protocol_of',
]
