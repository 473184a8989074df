"""VPT's prompt+bias: deep prompts and every bias of the backbone (arXiv 2203.12119)."""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(arg, base_lr=1.0, weight_decay=1e-3, digits={'base_lr': 0.25})
    config.method = c.method('vpt+bias', vpt={'num_tokens': 10, 'deep': True, 'dropout': 0.1})
    return config
