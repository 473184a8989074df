"""PGN: a small CNN looks at the image and writes its prompts (arXiv 2210.06466).

Published: SGD at a rate of 0.1 for batches of 128 (base rate 0.2), no decay, half of 100 epochs to warm up; released
files were trained for 500 to 1000 epochs. There the head was CLIP's (--config.head.name=clip_head) or linear. The
published augmentation (color jitter, grey, solarize) is not reproduced.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    digits = {'base_lr': 1.0, 'batch_size': 16}
    config = c.default(
        arg, base_lr=0.2, weight_decay=0.0, batch_size=128, warmup_epochs=50, schedule='pgn', start='uniform',
        digits=digits,
    )  # fmt: skip
    config.method = c.method('pgn', num_tokens=16, library=256)
    return config
