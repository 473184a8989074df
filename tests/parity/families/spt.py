"""SPT on timm and MAE ViTs: tokens, every way to make prompts of them, and training from there."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import adapted, ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import quick_compile
from tests.parity.torch_names import linear, same
from vpt_jax.methods import SPT, Linear
from vpt_jax.methods.kmeans import lloyd
from vpt_jax.methods.spt import pool_windows, tokens_of

_REDUCE = {'mean_pooling': jnp.mean, 'max_pooling': jnp.max}


def claims(case: Case) -> bool:
    """Cases of the method SPT, shallow or deep."""
    return case.meta.get('method') in ('SPT shallow', 'SPT deep')


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    config, deep = case.config, case.meta['method'] == 'SPT deep'
    # MAE's prompts are averaged in, and then comes the norm that was trained for tokens.
    pooled = {'fc_norm': 'norm'} if config['global_pool'] else {}
    model, params = ported.build(case, heads=config['heads'], **pooled)
    tokens = case.arrays['method/prompt_token']
    prompts = {'prompts': tokens[0]} | ({'deep': tokens[1:]} if deep else {})
    head = {'last_layer': {'kernel': case.arrays['head/head.weight'].T, 'bias': case.arrays['head/head.bias']}}
    names = {
        'spt/prompts': (['prompt_token'], lambda a, shape: a[0]),
        'linear/last_layer/kernel': (['head.weight'], linear),
        'linear/last_layer/bias': (['head.bias'], same),
    }
    if deep:
        names['spt/deep'] = (['prompt_token'], lambda a, shape: a[1:])
    method = SPT(num_tokens=config['num_prompts'], deep=deep)
    prompted = adapted.adapt(model, (method, Linear()), params, {'spt': prompts, 'linear': head})
    done = adapted.compare(case, report, prompted, names, rate=config['lr_sgd'])
    adapted.check_count(report, prompted, case.meta['trainable_parameters'])
    done |= _compare_cls_variant(case, report, method, prompted)
    done |= _compare_init(case, report, method, model, params)
    adapted.check_complete(case, report, done)


def _compare_cls_variant(case: Case, report: Report, method: SPT, prompted) -> set[str]:
    """The same prompts where the network reads its CLS token."""
    if 'out/features_cls_variant' not in case.arrays:
        return set()
    model, params = ported.build(case, heads=case.config['heads'])
    other = adapted.adapt(model, (method, Linear()), params, prompted.prompts)
    loss, (logits, seen) = other.value_and_grad()(other.trained, case.arrays['in/images'], case.arrays['in/labels'])[0]
    done = set()
    for name, ours in (('features', seen['features']), ('logits', logits), ('loss', loss)):
        full = f'out/{name}_cls_variant'
        if full in case.arrays:
            ported.close(report, full, ours, case.arrays[full])
            done.add(full)
    return done


def _compare_init(case: Case, report: Report, method: SPT, model, params) -> set[str]:
    """Tokens, and for every strategy what it makes of them with the reference's random numbers."""
    drawn, images = case.arrays['init/sample_idx'], case.arrays['init/images']
    blocks = len(case.arrays['init/tokens'])
    run_network = jax.jit(lambda p, x: tokens_of(model, p, x, blocks), compiler_options=quick_compile())
    tokens = np.asarray(run_network(params, jnp.asarray(images[drawn])))
    ported.close(report, 'init/tokens', tokens, case.arrays['init/tokens'])
    done = {'init/tokens', 'init/images', 'init/sample_idx'}
    for strategy in case.config['strategies']:
        held = case.group(f'init/{strategy}')
        spt = SPT(num_tokens=method.num_tokens, deep=method.deep, strategy=strategy)
        if strategy == 'kmeans':
            ours = _clustered(tokens, spt, model, params, images, drawn, held)
        else:
            ids = np.argsort(held['noise'], kind='stable')[:, : method.num_tokens]
            rows = spt.gather(model, params, images, drawn, ids)
            ours = {'noise': held['noise'], 'ids_keep': ids, 'prompts': rows}
            if strategy in _REDUCE:
                pooled = pool_windows(tokens, method.num_tokens, _REDUCE[strategy])
                ours['pooled'] = np.swapaxes(pooled, 1, 2)  # the reference's order is window, image
        if ours.keys() != held.keys():
            raise Unsupported(f'init/{strategy} holds {", ".join(sorted(ours.keys() ^ held.keys()))}')
        for name, value in ours.items():
            ported.close(report, f'init/{strategy}/{name}', value, held[name], strategy)
            done.add(f'init/{strategy}/{name}')
    return done


def _clustered(
    tokens: np.ndarray, spt: SPT, model, params, images: np.ndarray, drawn: np.ndarray, held: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """k-means from the reference's first centers."""
    first = spt.gather(model, params, images, drawn, held['init_idx'])
    found: dict[str, list] = {'centers': [], 'centers_after_1_step': [], 'n_iter': [], 'inertia': []}
    for points, start in zip(tokens.reshape(len(tokens), -1, tokens.shape[-1]), first, strict=True):
        centers, labels, steps = lloyd(points, start)
        for name, value in (('centers', centers), ('centers_after_1_step', lloyd(points, start, 1)[0]),
                            ('n_iter', steps), ('inertia', np.square(points - centers[labels]).sum())):  # fmt: skip
            found[name].append(value)
    ours = {name: np.stack(values) for name, values in found.items()}
    return {**ours, 'init_idx': held['init_idx'], 'init_centroids': first, 'prompts': ours['centers']}
