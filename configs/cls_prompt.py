"""VPT's cls+prompt: deep prompts and the CLS token (arXiv 2203.12119)."""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=2.5, weight_decay=1e-3, digits={'base_lr': 0.5})
    config.method = c.method('vpt+cls', vpt={'num_tokens': 10, 'deep': True, 'dropout': 0.1})
    return config
