"""VAPT, the flagship: input-adaptive deep prompts (arXiv 2501.18936), README example of its authors.

On the embedded default (`digits`, `tiny_vit64`) this trains in under three minutes on two CPU cores.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=2.5, weight_decay=1e-3, digits={'base_lr': 0.5})
    config.sweep.ties = 'larger'  # its search keeps the first of equals, walking down
    config.method = c.method('vapt', num_tokens=5, dropout=0.1)
    return config
