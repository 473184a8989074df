"""Normalisation tuning: scale and shift of every norm, a baseline of arXiv 2604.06440; base-finetune protocol of VPT.

On BatchNorms --config.method.statistics=batch uses the statistics of the batch in training, and running ones after it.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, optimizer='adamw_vpt', base_lr=0.005, weight_decay=0.01, warmup_epochs=5, batch_size=384,
        digits={'batch_size': 16, 'base_lr': 0.5},
    )  # fmt: skip
    config.method = c.method('norm')
    return config
