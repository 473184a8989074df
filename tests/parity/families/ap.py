"""Activation prompts on timm ViTs and torchvision ResNets: the way through the blocks, gradients, gradient descent."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import adapted, ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.torch_names import linear, same
from vpt_jax.methods import AP, Linear, Method


def claims(case: Case) -> bool:
    """Cases of activation prompts, which the json calls AP."""
    return str(case.meta.get('what', '')).startswith('AP ')


class _Watch(Method):
    """Notes what leaves the blocks, inside the prompts around them."""

    name = 'watch'

    def layer(self, prompts, block, x, i, ctx):
        ctx.updates[f'block{i}'] = x = block(x)
        return x


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    config = case.config
    settings = {'heads': config['heads']} if 'heads' in config else {'image_size': config['res']}
    model, params = ported.build(case, **settings)
    theirs = list(config['at'])
    at = tuple('end' if place in ('avgpool', model.depth) else place for place in theirs)
    method = AP(at=at, shape=config['shape'])
    method.check(model)
    prompts, names = _prompts(model, method, case, dict(zip(map(model.block_of, at), theirs, strict=True)))
    head = {'last_layer': {'kernel': case.arrays['head/weight'].T, 'bias': case.arrays['head/bias']}}
    names |= {'linear/last_layer/kernel': (['head/weight'], linear), 'linear/last_layer/bias': (['head/bias'], same)}
    prompts = {'ap': prompts, 'watch': {}, 'linear': head}
    prompted = adapted.adapt(model, (method, _Watch(), Linear()), params, prompts)
    done = adapted.compare(case, report, prompted, names, rate=case.meta['sgd_lr'])
    adapted.check_count(report, prompted, case.meta['n_prompt'] + sum(a.size for a in head['last_layer'].values()))
    done |= _compare_way(case, report, model, prompted)
    adapted.check_complete(case, report, done)


def _hwc(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[1, T, D] or [1, C, H, W] to [T, D] or [H, W, C]; of one number a channel, [D] or [C]."""
    array = array[0].transpose(1, 2, 0) if array.ndim == 4 else array[0]
    return array.reshape(shape)


def _prompts(model: Any, method: AP, case: Case, named: dict[int, Any]) -> tuple[dict, dict]:
    """The prompts, and where their gradients are; places of one shape are one array of ours."""
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), model, None, 2))['deltas']
    deltas, names = {}, {}
    for name, leaf in shapes.items():
        shape = leaf.shape[1:]
        places = [i for i in sorted(named) if 'x'.join(map(str, model.activation_shape(i)[-len(shape) :])) == name]
        held = [f'method/delta_{named[i]}' for i in places]
        deltas[name] = np.stack([_hwc(case.arrays[key], shape) for key in held])
        # The gradient of a single prompt is not stacked, though ours has a leading axis.
        names[f'ap/deltas/{name}'] = (held, _hwc if len(held) > 1 else lambda a, shape: _hwc(a, shape[1:])[None])
    return {'deltas': deltas}, names


def _compare_way(case: Case, report: Report, model: Any, prompted) -> set[str]:
    """What leaves blocks and stages, and the scores without a prompt."""
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])
    step = prompted.value_and_grad()
    seen = step(prompted.trained, images, labels)[0][1][1]['watch']
    plain = jax.tree.map(jnp.zeros_like, prompted.trained['ap'])
    logits = step({**prompted.trained, 'ap': plain}, images, labels)[0][1][0]
    depths, done = getattr(model, 'depths', ()), set()
    for name, theirs in case.group('out').items():
        if name == 'logits_no_prompt':
            ours = logits
        elif found := re.fullmatch(r'block_(\d+)', name):
            ours = seen[f'block{found[1]}']
        elif found := re.fullmatch(r'layer(\d+)', name):
            ours = seen[f'block{sum(depths[: int(found[1])]) - 1}']
        elif name in ('features', 'logits', 'loss', 'losses_sgd'):
            continue
        else:
            raise Unsupported(f'array out/{name}')
        ported.close(report, f'out/{name}', ours, theirs, 'blocks' if name != 'logits_no_prompt' else name)
        done.add(f'out/{name}')
    return done
