"""VPTM (arXiv 2303.04998) in this project's reading: prompts that make a masked-pretraining network name a class.

Needs a BEiT as pretrained, with its mask token and its head over visual tokens. experiments/vptm.md makes a small one.
`--config.model.extra_bias=cls` treats prompts and mask token like CLS instead of leaving them without relative bias.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    arg = arg if 'backbone=' in (arg or '') else f'backbone=beitv2_b16,{arg or ""}'
    config = c.default(arg, base_lr=1.0, weight_decay=1e-4, digits={'base_lr': 1.0})
    config.model = {'extra_bias': 'zero'}
    config.method = c.method('vptm')
    return config
