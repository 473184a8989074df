"""VPTM (arXiv 2303.04998) in this project's reading: prompts that make a masked-pretraining network name a class.

Needs a BEiT as pretrained, with its mask token and its head over visual tokens. experiments/vptm.md makes a small one.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=1.0, weight_decay=1e-4, digits={'base_lr': 1.0})
    config.method = c.method('vptm')
    return config
