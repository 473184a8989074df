"""IIP, PGN's baseline: the same prompts for all images (arXiv 2210.06466), trained as PGN is."""

from vpt_jax.training import config as c


def get_config(arg=None):
    digits = {'base_lr': 1.0, 'batch_size': 16}
    config = c.default(
        arg, base_lr=0.2, weight_decay=0.0, batch_size=128, warmup_epochs=50, schedule='pgn', start='uniform',
        digits=digits,
    )  # fmt: skip
    config.method = c.method('iip', num_tokens=16)
    return config
