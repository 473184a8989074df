"""CVPT on a Google ViT: positions, ways of sharing weights, prompted layers."""

import jax.numpy as jnp
import numpy as np

from tests.parity import adapted, ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.torch_names import linear, same
from vpt_jax.methods import CVPT, Context, Linear

_SHARINGS = {'shared_frozen': 'frozen', 'shared_trainable': 'trained', 'random_trainable': 'random',
             'random_frozen': 'random_frozen'}  # fmt: skip
_PARTS = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'proj'}


def claims(case: Case) -> bool:
    """Cases of the method CVPT."""
    return case.meta.get('method') == 'CVPT'


def run(case: Case, report: Report) -> None:
    """Compares every array, for every position that the case holds."""
    config = case.config
    if config['cross_attention'] not in _SHARINGS:
        raise Unsupported(f'cross-attention {config["cross_attention"]!r}')
    sharing = _SHARINGS[config['cross_attention']]
    layers = () if config['layers'] == 'all' else tuple(config['layers'])
    model, params = ported.build(case, activation='gelu')
    done = set()
    for position in (config['insert'], *config['extra_inserts']):
        method = CVPT(num_tokens=config['num_prompts'], position=position, sharing=sharing, layers=layers)
        prompted, names = _prompted(case, model, params, method)
        where = '' if position == config['insert'] else f'insert{position}/'
        done |= adapted.compare(case, report, prompted, names, where, config['lr_sgd'])
        if where:
            continue
        # The reference allocates prompts for layers that never see them.
        unused = model.depth - len(layers or range(model.depth))
        never = unused * config['num_prompts'] * model.width
        adapted.check_count(report, prompted, case.meta['trainable_parameters'] - never)
        if 'out/block0_cross_attention' in case.arrays:
            done.add('out/block0_cross_attention')
            theirs = case.arrays['out/block0_cross_attention']
            ported.close(report, 'out/block0_cross_attention', _cross(case, prompted), theirs)
    adapted.check_complete(case, report, done)


def _prompted(case: Case, model, params, method: CVPT):
    """What the case runs, and where the gradients are."""
    width, held = model.width, case.group('method')
    blocks = method.layers or range(model.depth)
    tokens = held['Prompt_Tokens'][list(blocks)] if len(held['Prompt_Tokens']) > len(blocks) else held['Prompt_Tokens']
    prompts, state = {'prompts': {str(width): tokens}}, {}

    def chosen(gradient, shape):
        return gradient.reshape(-1, *shape[1:])[list(blocks)].reshape(shape)

    names = {
        f'cvpt/prompts/{width}': (['Prompt_Tokens'], chosen),
        'linear/last_layer/kernel': (['head.weight'], linear),
        'linear/last_layer/bias': (['head.bias'], same),
    }
    if method.sharing != 'frozen':
        inner = {}
        for part, theirs in _PARTS.items():
            shapes = params['Transformer']['encoderblock_0']['MultiHeadDotProductAttention_0'][part]
            for leaf, kind, layout in (('kernel', 'weight', linear), ('bias', 'bias', same)):
                found = [f'blocks.{i}.CrossAttn.{theirs}.{kind}' for i in blocks]
                shape = (len(found), *shapes[leaf].shape)
                if found[0] in held:
                    array = adapted.stacked(case, found, layout, shape, 'method')
                else:  # copied: the case stores no second copy
                    array = np.stack([_own(params, i)[part][leaf] for i in blocks])
                inner.setdefault(part, {})[leaf] = array
                names[f'cvpt/attention/{width}/{part}/{leaf}'] = (found, layout)
        (state if method.sharing == 'random_frozen' else prompts)['attention'] = {str(width): inner}
    weight, bias = case.arrays['head/head.weight'], case.arrays['head/head.bias']
    prompts = {'cvpt': prompts, 'linear': {'last_layer': {'kernel': weight.T, 'bias': bias}}}
    return adapted.adapt(model, (method, Linear()), params, prompts, {'cvpt': state} if state else {}), names


def _own(params: dict, i: int) -> dict:
    return params['Transformer'][f'encoderblock_{i}']['MultiHeadDotProductAttention_0']


def _cross(case: Case, prompted) -> np.ndarray:
    """The cross-attention of block 0, applied to what enters the block."""
    method = next(m for m in prompted.method.methods if m.name == 'cvpt')
    prompts, seen = prompted.prompts['cvpt'], {}

    class Watch(CVPT):
        def layer(self, _, block, x, i, ctx):
            if i == 0:
                seen['cross'] = method.cross(prompts, block, x, i, ctx)
            return block(x)

    images = jnp.asarray(case.arrays['in/images'])
    state = prompted.state.get('cvpt', {})
    prompted.model.apply({'params': prompted.params}, images, Watch(), None, Context(state=state))
    return seen['cross']
