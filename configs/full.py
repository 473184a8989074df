"""Full fine-tuning; base-finetune protocol of VPT (arXiv 2203.12119): AdamW with its published quirks."""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, optimizer='adamw_vpt', base_lr=0.001, weight_decay=0.01, warmup_epochs=5, batch_size=384,
        digits={'batch_size': 16},
    )  # fmt: skip
    config.method = c.method('full')
    return config
