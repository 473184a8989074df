"""Short training runs of VPT's optimizers and schedule, on fixed batches in order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import Prompted, prepare, quick_compile, references
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training import schedule

LOSSES_RTOL, LR_RTOL, FINAL_ATOL, FINAL_RTOL = 1e-3, 1e-6, 2e-5, 1e-4
# The reference's 'adamw' has quirks that no other AdamW has.
_OPTIMIZERS = {'sgd': 'sgd', 'adamw': 'adamw_vpt'}


def claims(case: Case) -> bool:
    """Cases that name an optimizer."""
    return 'optimizer' in case.config and 'options' in case.config and 'total_epochs' in case.config


def run(case: Case, report: Report) -> None:
    """Trains as the case did and compares losses, rates and the trained weights."""
    config = case.config
    if config['optimizer'] not in _OPTIMIZERS:
        raise Unsupported(f'optimizer {config["optimizer"]!r}')
    unknown = [name for name in case.group('out') if name not in ('losses', 'lr') and not name.startswith('final/')]
    if unknown:
        raise Unsupported(f'array out/{unknown[0]}')
    prompted = prepare(case)
    losses, rates, trained = _train(case, prompted)
    report.compare('losses', 'out/losses', losses, case.arrays['out/losses'], rtol=LOSSES_RTOL)
    report.compare('lr', 'out/lr', rates, case.arrays['out/lr'], rtol=LR_RTOL)
    _compare_final(case, prompted, trained, report)


def _train(case: Case, prompted: Prompted) -> tuple[np.ndarray, np.ndarray, dict]:
    """The loss before every step, the rate of every step, and what was trained."""
    config, value_and_grad = case.config, prompted.value_and_grad()
    optimizer = optimizers.build(
        _OPTIMIZERS[config['optimizer']],
        config['base_lr'],
        config['weight_decay'],
        momentum=config.get('momentum', 0.9),
        bias_multiplier=config.get('bias_multiplier', 1.0),
    )
    trained = prompted.trained
    state = optimizer.init(trained)

    def update(grads, state, trained):
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    update = jax.jit(update, compiler_options=quick_compile())
    losses, rates, size = [], [], config['batch']
    for epoch in range(config['total_epochs']):
        factor = schedule.warmup_cosine(epoch, config['warmup_epochs'], config['total_epochs'])
        rate = jnp.float32(config['base_lr'] * factor)
        state = optimizers.with_learning_rate(state, rate)
        for batch in range(config['batches_per_epoch']):
            images, labels = (case.arrays[f'in/{k}'][batch * size :][:size] for k in ('images', 'labels'))
            (loss, _), grads = value_and_grad(trained, images, labels)
            trained, state = update(grads, state, trained)
            losses.append(loss)
            rates.append(rate)
    return np.stack(losses), np.stack(rates), trained


def _compare_final(case: Case, prompted: Prompted, trained: dict, report: Report) -> None:
    final, flat = case.group('out/final'), flatten_dict(trained)
    left = {name for name, a in final.items() if a.size} - set(prompted.unused)
    for path, (layout, names, stacked, _) in references(prompted, set(final)).items():
        ours = np.asarray(flat[path])
        for part, name in zip(ours if stacked else [ours], names, strict=True):
            if name not in final:
                report.fail(f'our {"/".join(path)} is trained, but the case has no {name}')
                continue
            report.compare('final', f'out/final/{name}', part, layout(final[name], part.shape), FINAL_ATOL, FINAL_RTOL)
            left.discard(name)
    for name in sorted(left):
        report.fail(f'out/final/{name} has no counterpart among our trained weights')
    for name, theirs in prompted.unused.items():
        if name not in final:
            report.fail(f'{name} is a weight of the case that our method has no place for')
        else:  # what nothing reads must come out as it went in
            report.compare('final', f'out/final/{name}', theirs, final[name], FINAL_ATOL, FINAL_RTOL)
