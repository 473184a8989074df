"""The data room: tasks, readers, preprocessing, augmentation and batches. It knows nothing of models or training.

preprocess = Preprocess(224)
dataset = load('folder:~/birds', preprocess)
for batch in Batches(dataset.test, preprocess, batch_size=64, train=False).epoch(): ...
"""

from vpt_jax.data.batches import Batches
from vpt_jax.data.dataset import Dataset, Split, load
from vpt_jax.data.preprocess import HALF, IMAGENET, Preprocess

__all__ = ['HALF', 'IMAGENET', 'Batches', 'Dataset', 'Preprocess', 'Split', 'load']
