"""`digits`: the embedded dataset, 1,797 handwritten digits of 8 x 8 pixels, 10 classes.

The test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, doi 10.24432/C50P49, CC BY 4.0), as scikit-learn distributes it. `digits.npz` beside this file holds
`images` uint8 [1797, 8, 8] in 0..16, `labels` uint8 [1797] and `split` uint8 [1797] (0 train, 1 val, 2 test), made by

    d = sklearn.datasets.load_digits()
    split = np.full(1797, 2, 'u1')
    for part, index in enumerate(stratified(d.target, 800, 200, seed=0)): split[index] = part
    np.savez_compressed('digits.npz', images=d.images.astype('u1'), labels=d.target.astype('u1'), split=split)

The split is stored, so that it depends neither on a run's seed nor on NumPy's generators: 800 train, 200 val (the
sizes of VTAB-1k) and 797 test.
"""

import pathlib

import numpy as np

from vpt_jax.data.dataset import Dataset, Reading, Split
from vpt_jax.data.decode import decode_all
from vpt_jax.data.preprocess import Preprocess

_FILE = pathlib.Path(__file__).with_name('digits.npz')


def read(argument: str, preprocess: Preprocess, how: Reading) -> Dataset:
    """The embedded digits, grey levels scaled from 0..16 to 0..255; only `preprocess` makes a difference.

    Returns:
      A `Dataset` with 800 train, 200 val and 797 test examples, classes `'0'` to `'9'`.
    """
    with np.load(_FILE, allow_pickle=False) as file:
        images, labels, part = file['images'], file['labels'].astype(np.int32), file['split']
    images = ((images.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    splits = []
    for number in range(3):
        index = np.flatnonzero(part == number)
        names = tuple(f'digits[{i}]' for i in index)
        decoded, _, _ = decode_all(images[index].__getitem__, names, preprocess, how.on_bad_image)
        splits.append(Split(decoded, labels[index], names))
    return Dataset('digits', tuple('0123456789'), *splits)
