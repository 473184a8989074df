"""AP: a prompt added to what enters one block (arXiv 2604.06440), at the third of a ViT, the third to last of a ResNet.

The paper's settings could not be read: the protocol is VPT's. Blocks before the prompt cost no gradient, so a late
place (--config.method.at="(11,)", or "('layer4.0',)" in networks of stages) is cheap.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=2.5)
    config.method = c.method('ap')
    return config
