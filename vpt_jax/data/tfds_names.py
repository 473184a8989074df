"""`tfds:NAME[/CONFIG][:VERSION]`: any image classification set that tensorflow-datasets has prepared in `data_dir`.

It must have features `image` and a class label: the one that TFDS calls supervised, else `label`. Splits are `train`,
`validation` (or `val`) and `test`; a set without test is cut as `vpt_jax.data.folder` says.
"""

import numpy as np

from vpt_jax.data import tfds_files
from vpt_jax.data.dataset import Dataset, Reading
from vpt_jax.data.lists import listed
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.data.stratify import eight_one_one
from vpt_jax.errors import UsageError

_VAL = ('validation', 'val', 'valid')


def read(argument: str, preprocess: Preprocess, how: Reading) -> Dataset:
    """Reads a TFDS set; see the module's docstring and `dataset.load`.

    Raises:
      UsageError: for a set that is not prepared, has no images with class labels or no train split, or an unreadable
        image (unless skipped).
    """
    name, _, version = argument.partition(':')
    found = tfds_files.find(name, how.data_dir, version or None)
    if found is None or (version and found != version):
        raise UsageError(
            f'the TFDS set {argument} is not prepared in {how.data_dir}: get it with `python -m vpt_jax.fetch '
            f'tfds:{argument} --data_dir={how.data_dir}`, or set TFDS_DATA_DIR to where it is'
        )
    builder = tfds_files.open_builder(name, found, how.data_dir)
    feature = (builder.info.supervised_keys or ('image', 'label'))[1]
    classes = tfds_files.class_names(builder, feature) if isinstance(feature, str) else None
    if classes is None or 'image' not in builder.info.features:
        have = ', '.join(sorted(builder.info.features))
        raise UsageError(f'the TFDS set {argument} is no image classification set: its features are {have}')
    splits = {split: builder.info.splits[split].num_examples for split in builder.info.splits}
    if 'train' not in splits:
        raise UsageError(f'the TFDS set {argument} has no train split, only {", ".join(splits) or "none"}')

    def part(split: str):
        return tfds_files.examples(builder, split, 0, splits[split], lambda e: e[feature], task=feature)

    parts = {'train': part('train')}
    val = next((split for split in _VAL if split in splits), None)
    if 'test' in splits:
        parts |= {'test': part('test')} | ({'val': part(val)} if val else {})
    elif val:  # a set that chose the settings is no test set
        parts['test'] = part(val)
    else:
        whole = parts['train']
        labels = np.array([whole.label(i) for i in range(len(whole))])
        cut = zip(('train', 'val', 'test'), eight_one_one(labels, how.seed), strict=True)
        parts = {split: whole.take(index) for split, index in cut}
    source = f'TFDS {name}:{found}'
    return listed(f'tfds:{argument}', classes, parts, how.data_dir, preprocess, how, source)
