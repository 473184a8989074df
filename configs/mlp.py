"""An MLP-3 head on frozen features; base-linear protocol of VPT (arXiv 2203.12119)."""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=0.5, weight_decay=1e-3, batch_size=1024, digits={'batch_size': 64, 'epochs': 100})
    config.method, config.sweep.grid = c.method('mlp', layers=3), 'linear'
    return config
