"""VPTM, as this project defines it, on the reference's BEiT v2: every step of the readout, gradients, descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import ported
from tests.parity.case import Case, Report
from tests.parity.families.beit import compare_outputs, network
from tests.parity.prompted import quick_compile
from vpt_jax.methods import VPTM, Context, forward

_NAMES = {'prompts': 'prompt_embeddings', 'deep': 'deep_prompt_embeddings', 'mask_token': 'mask_token',
          'projection': 'proto_proj.weight', 'prototypes': 'prototypes'}  # fmt: skip


class SeenVPTM(VPTM):
    """VPTM that hands out each step of its readout with the state."""

    def readout(self, prompts, x, pool, ctx: Context):
        """What is read at the mask token, noted."""
        hidden = ctx.own(x)[:, -1:]
        read = super().readout(prompts, x, pool, ctx)
        tokens = ctx.model.predict_tokens(hidden)[:, 0]
        bias = ctx.model.relative_bias(ctx.images)
        ctx.updates |= {'features': hidden[:, 0], 'token_logits': tokens, 'readout': read,
                        'proto_features': self.project(prompts, read)}  # fmt: skip
        if bias is not None:
            ctx.updates['rel_pos_bias'] = bias(x.shape[1])[0]
        return read


def claims(case: Case) -> bool:
    """Cases of VPTM."""
    return str(case.meta.get('kind', '')).startswith('VPTM')


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds."""
    config = case.config
    model, params, _ = network(case, 'backbone', extra_bias=config['extra_token_bias'])
    method = SeenVPTM(
        num_tokens=config['prompt_length'], deep=config['deep'], read=config['readout'],
        prototype_dim=config['prototype_dim'] or 0, similarity=config['similarity'],
        temperature=config['temperature'], train_mask=config['mask_token_trainable'],
    )  # fmt: skip
    method.check(model)
    held = {name: a for name, a in (case.group('method') | case.group('head')).items() if a.size}
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), model, params, config['num_classes']))
    prompts = {name: jnp.asarray(_ours(name, held.pop(_NAMES[name]), leaf.shape)) for name, leaf in shapes.items()}
    for name in held:
        report.fail(f'{name} is a weight of the case that our method has no place for')
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])

    def loss(prompts):
        logits, seen = forward(model, method, params, prompts, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {**seen, 'logits': logits}

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick_compile())
    (value, seen), grads = step(prompts)
    if 'rel_pos_bias' in seen:
        order = _layout(config['layout'], config['prompt_length'], model.grid(*images.shape[1:3]))
        seen['rel_pos_bias'] = seen['rel_pos_bias'][:, order][:, :, order]
    compare_outputs(case, report, {**seen, 'loss': value}, but=('losses_sgd',))
    theirs = {name: a for name, a in case.group('grad').items() if a.size}
    for name, gradient in grads.items():
        expected = _ours(name, theirs.pop(_NAMES[name]), gradient.shape)
        ported.close(report, f'grad/{name}', gradient, expected, 'grads')
    for name in theirs:
        report.fail(f'grad/{name} has no counterpart among our gradients')
    if sum(leaf.size for leaf in jax.tree.leaves(prompts)) != case.meta['trainable_params']:
        report.fail(f'the case trains {case.meta["trainable_params"]} parameters, not as many as we do')
    losses = []
    for _ in case.arrays['out/losses_sgd']:
        (value, _), grads = step(prompts)
        losses.append(value)
        prompts = jax.tree.map(lambda p, g: p - case.meta['sgd_lr'] * g, prompts, grads)
    report.compare('losses_sgd', 'out/losses_sgd', losses, case.arrays['out/losses_sgd'], rtol=ported.LOSSES_RTOL)


def _ours(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.T if name == 'projection' else array.reshape(shape)


def _layout(groups: list[str], count: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions in our order (CLS, prompts, mask, patches) of the tokens in the order of a case."""
    ends = np.cumsum([1, count, 1, grid[0] * grid[1]])
    ours = dict(zip(('cls', 'prompt', 'mask', 'patch'), np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    return np.concatenate([ours[group] for group in groups])
