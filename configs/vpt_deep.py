"""VPT-deep: learned prompts before every block (arXiv 2203.12119).

Published grid: 1 to 200 prompts, base rates 0.05 to 50, weight decay 0 to 0.01, dropout 0.1.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    # On the small embedded network AdamW gets there in a fraction of the epochs that the published SGD takes.
    digits = {'optimizer': 'adamw', 'base_lr': 1.0, 'batch_size': 8, 'epochs': 30}
    config = c.default(arg, base_lr=2.5, weight_decay=1e-3, digits=digits)
    config.method = c.method('vpt', num_tokens=5, deep=True, dropout=0.1)
    return config
