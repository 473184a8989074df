"""VPT-shallow: learned prompts before the first block only (arXiv 2203.12119).

Published grid: 1 to 200 prompts, base rates 0.05 to 50, weight decay 0 to 0.01, no dropout.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=2.5, weight_decay=1e-3, digits={'base_lr': 0.5})
    config.method = c.method('vpt', num_tokens=50)
    return config
