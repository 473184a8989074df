"""SPT: VPT-deep whose prompts start as tokens of the training images (arXiv 2402.02382).

Published: 20 deep or 100 shallow prompts, and these settings on a supervised ViT-B/16 (Stanford Dogs); on MAE a rate of
5e-2 (base rate 0.4) with a head decay of 0.5 (CUB); heads start with a deviation of 0.01 on MoCo v3.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    # What works for VPT-deep on the small embedded network works from tokens too.
    digits = {'base_lr': 1.0, 'batch_size': 8, 'epochs': 30, 'schedule': 'cosine', 'head_weight_decay': None}
    config = c.default(
        arg, optimizer='adamw', base_lr=8e-3, weight_decay=0.01, head_weight_decay=3.0, batch_size=32, schedule='spt',
        start='normal', digits=digits,
    )  # fmt: skip
    config.method = c.method('spt', num_tokens=20, deep=True, strategy='random')
    return config
