"""A whole CLIP: both towers from one file, and the scores between them."""

import jax.numpy as jnp
import optax

from tests.parity import adapted, ported
from tests.parity.case import Case, Report
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.methods import CLIPHead, Context
from vpt_jax.models import clip_text


def claims(case: Case) -> bool:
    """Cases with both towers and texts as tokens."""
    return {'in/images', 'in/tokens', 'out/text_features'} <= set(case.meta.get('arrays', case.arrays))


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    source, config = ArraySource(case.group('backbone'), case.name), case.config
    model, params = ported.build(case)
    tower, weights = clip_text.build(source, heads=config['theads'])
    texts = clip_text.text_features(tower, weights, case.arrays['in/tokens'])
    features, _ = ported.run(model, params, case.arrays['in/images'])
    mapping = jnp.arange(len(texts))[:, None]
    unit = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    state = {'texts': unit, 'scale': weights['logit_scale'], 'mapping': mapping}
    logits = CLIPHead().logits({}, features, Context(state=state))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, case.arrays['in/labels']).mean()
    found = {'image_features': features, 'text_features': texts, 'logits': logits, 'loss': loss}
    for name, ours in found.items():
        ported.close(report, f'out/{name}', ours, case.arrays[f'out/{name}'])
    adapted.check_complete(case, report, {f'out/{name}' for name in found})
