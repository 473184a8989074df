"""CVPT: the image's tokens attend to prompts, through copies of the frozen attention (arXiv 2408.14961).

Published: 1 to 200 prompts, rates 2e-4 to 1e-2 (base rates 1.6e-3 to 0.08 here), decay 1e-5 or 0.05, batches of 16 to
64; the decay is on everything, biases too.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, optimizer='adamw', base_lr=8e-3, weight_decay=0.05, batch_size=32, schedule='cvpt',
        decay_biases=True, start='uniform',
        digits={'base_lr': 1.0, 'batch_size': 8, 'schedule': 'cosine'},
    )  # fmt: skip
    config.method = c.method('cvpt', num_tokens=10, position=3, sharing='frozen')
    return config
