"""Normalisation tuning: norms and head are trained; BatchNorms on stored statistics or on those of the batch."""

import jax.numpy as jnp

from tests.parity import adapted, ported
from tests.parity.case import Case, Report
from tests.parity.torch_names import linear, same
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.methods import Linear, NormTune
from vpt_jax.models import batch_statistics


def claims(case: Case) -> bool:
    """Cases of normalisation tuning."""
    return str(case.meta.get('what', '')).startswith('normalisation tuning')


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    config = case.config
    settings = {'heads': config['heads']} if 'heads' in config else {'image_size': config['res']}
    model, params = ported.build(case, **settings)
    method = NormTune(statistics='batch' if config.get('train_bn') else 'stored')
    method.check(model)
    trained = method.init(None, model, params, 2)
    _, plan = scheme.port(ArraySource(case.group('backbone'), case.name), hints=settings)
    theirs = {ours: weight.names[0] for ours, weight in plan.weights.items()}
    names = {f'norm/{path}': ([f'backbone/{theirs[path]}'], same) for path in adapted.flatten_dict(trained, sep='/')}
    names |= {'linear/last_layer/kernel': (['head/weight'], linear), 'linear/last_layer/bias': (['head/bias'], same)}
    head = {'last_layer': {'kernel': case.arrays['head/weight'].T, 'bias': case.arrays['head/bias']}}
    state = {'norm': method.init_state(model)} if config.get('train_bn') else {}
    prompts = {'norm': trained, 'linear': head}
    prompted = adapted.adapt(model, (method, Linear()), params, prompts, state, train=bool(state))
    done = adapted.compare(case, report, prompted, names, rate=case.meta['sgd_lr'])
    adapted.check_count(report, prompted, case.meta['n_norm'] + sum(leaf.size for leaf in head['last_layer'].values()))
    if state:
        done |= _compare_statistics(case, report, prompted, theirs)
    adapted.check_complete(case, report, done)


def _compare_statistics(case: Case, report: Report, prompted, theirs: dict[str, str]) -> set[str]:
    """The running statistics after one forward pass."""
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])
    carried = prompted.value_and_grad()(prompted.trained, images, labels)[0][1][1]['norm']
    params, added = (adapted.flatten_dict(tree, sep='/') for tree in (prompted.params, carried['added']))
    done = set()
    for norm in batch_statistics.names(prompted.model):
        for kind in ('mean', 'var'):
            path = f'{norm}/{kind}'
            name = f'out/stats_after_1/{theirs[path]}'
            ported.close(report, name, carried['kept'] * params[path] + added[path], case.arrays[name], 'statistics')
            done.add(name)
    return done
