"""VP: a frame of learned pixels on top of every image (arXiv 2203.17274).

Published for 224 pixels: a frame 30 wide, SGD at a rate of 40 for batches of 256 (128 for image classifiers), no decay,
1000 epochs, of which 1000 steps warm up, about 5 epochs of CIFAR-100. Published heads have no weights: CLIP's with
texts of the classes (`vp.py:head=clip_head --config.head.texts=FILE.npz`, see `vpt_jax.texts`), or the first classes of
an image classifier (`vp.py:head=label_mapping --config.head.mapping=first`, backbones that come with one).
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, epochs=1000, warmup_epochs=5, batch_size=256, base_lr=40.0, weight_decay=0.0, schedule='vp',
        digits={'base_lr': 4.0, 'batch_size': 16},
    )  # fmt: skip
    config.method = c.method('vp', kind='pad', size=8 if config.dataset == 'digits' else 30)
    return config
