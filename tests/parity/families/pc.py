"""Prompt condensation on a Google ViT: scores, what is kept, the condensed forward pass and its training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import adapted, ported
from tests.parity.case import Case, Report
from tests.parity.prompted import quick_compile
from tests.parity.torch_names import linear, same
from vpt_jax.methods import VPT, Linear, Stack, forward
from vpt_jax.methods.condense import SCORES, condense, keep, rows_of

_ROW0, _DEEP = 'enc.transformer.prompt_embeddings', 'enc.transformer.deep_prompt_embeddings'
_RATIOS = (10, 20, 30, 40, 50, 60, 70)


def claims(case: Case) -> bool:
    """Cases that say so."""
    return str(case.meta.get('method', '')).startswith('prompt condensation')


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    config = case.config
    model, params = ported.build(case, activation='gelu')
    vpt = VPT(num_tokens=config['num_tokens'], deep=config['deep'])
    prompts = {'prompts': case.arrays[f'method/{_ROW0}'][0]}
    names = {
        'vpt/prompts': ([_ROW0], same),
        'linear/last_layer/kernel': (['head.last_layer.weight'], linear),
        'linear/last_layer/bias': (['head.last_layer.bias'], same),
    }
    if config['deep']:
        prompts['deep'] = case.arrays[f'method/{_DEEP}']
        names['vpt/deep'] = ([_DEEP], same)
    head = {'kernel': case.arrays['head/head.last_layer.weight'].T, 'bias': case.arrays['head/head.last_layer.bias']}
    whole = adapted.adapt(model, (vpt, Linear()), params, {'vpt': prompts, 'linear': {'last_layer': head}})
    done = adapted.compare(case, report, whole, names, rate=case.meta['sgd_lr'])
    adapted.check_count(report, whole, case.meta['n_trainable'])
    done |= _compare_scores(case, report, whole)
    done |= _compare_changes(case, report, whole)
    scores = case.arrays['pc/score_taylor_token']
    order = np.argsort(-scores.reshape(-1), kind='stable')
    report.compare('order', 'pc/order_global', order, case.arrays['pc/order_global'])
    done.add('pc/order_global')
    for ratio in _RATIOS:
        done |= _compare_condensed(case, report, whole, scores, ratio)
    adapted.check_complete(case, report, done)


def _gradients(case: Case, whole, size: int) -> list[list[jax.Array]]:
    """The prompts' gradient [n_l, D] of every block, of each run of `size` examples."""
    step = whole.value_and_grad()
    images, labels = case.arrays['in/images'], case.arrays['in/labels']
    found = []
    for i in range(0, len(labels), size):
        _, grads = step(whole.trained, images[i : i + size], labels[i : i + size])
        found.append(rows_of(grads['vpt'], case.config['rows']))
    return found


def _compare_scores(case: Case, report: Report, whole) -> set[str]:
    """Every score: of the whole batch, and the means over parts of it."""
    rows = rows_of(whole.prompts['vpt'], case.config['rows'])
    sizes = {'': len(case.arrays['in/labels']), '_batchmean': case.config['score_batch'], '_samplemean': 1}
    gradients = {suffix: _gradients(case, whole, size) for suffix, size in sizes.items()}
    done = set()
    for name in case.group('pc'):
        if not name.startswith('score_') or name.startswith('score_loss_change'):
            continue
        kind = name.removeprefix('score_')
        suffix = next((s for s in sizes if s and kind.endswith(s)), '')
        score = SCORES[kind.removesuffix(suffix)]
        each = [np.stack([score(g, p) for g, p in zip(parts, rows, strict=True)]) for parts in gradients[suffix]]
        ported.close(report, f'pc/{name}', np.mean(each, axis=0), case.arrays[f'pc/{name}'], 'scores')
        done.add(f'pc/{name}')
    return done


def _loss(case: Case, whole, method, prompts) -> jax.Array:
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])
    logits, _ = forward(whole.model, method, whole.params, prompts, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def _compare_changes(case: Case, report: Report, whole) -> set[str]:
    """The exact change of the loss when a single prompt is set to zero, and when it is taken out."""
    blocks, count = case.arrays['pc/score_taylor_token'].shape
    tree, before = whole.prompts, case.arrays['out/loss']

    def zeroed(block, n):
        rows = jnp.stack(rows_of(tree['vpt'], blocks)).at[block, n].set(0.0)
        vpt = {'prompts': rows[0]} | ({'deep': rows[1:]} if blocks > 1 else {})
        return _loss(case, whole, Stack(*whole.method.methods), {**tree, 'vpt': vpt})[0]

    def without(n, block):
        # Which prompt is taken out of a block is data, so that one program serves the whole block.
        kept = [jnp.arange(count - (b == block)) for b in range(blocks)]
        kept[block] = kept[block] + (kept[block] >= n)
        return _loss(case, whole, *condense(Stack(*whole.method.methods), tree, kept))[0]

    step = jax.jit(zeroed, compiler_options=quick_compile())
    zero = [[step(b, n) - before for n in range(count)] for b in range(blocks)]
    removed = []
    for b in range(blocks):
        step = jax.jit(partial(without, block=b), compiler_options=quick_compile())
        removed.append([step(n) - before for n in range(count)])
    for name, ours in (('zeroed', zero), ('removed', removed)):
        ported.close(
            report, f'pc/score_loss_change_{name}', np.array(ours), case.arrays[f'pc/score_loss_change_{name}']
        )
    return {'pc/score_loss_change_zeroed', 'pc/score_loss_change_removed'}


def _compare_condensed(case: Case, report: Report, whole, scores: np.ndarray, ratio: int) -> set[str]:
    """What is kept at a ratio by both rankings, and what the network makes of it."""
    blocks, count = scores.shape
    ranked = {'global': keep(list(scores), ratio / 100), 'perlayer': keep(list(scores), ratio / 100, per_layer=True)}
    flat = np.concatenate([count * i + kept for i, kept in enumerate(ranked['global'])])
    lengths = [len(kept) for kept in ranked['global']]
    ours = {f'pc/keep_global_{ratio}': flat, f'pc/keep_perlayer_{ratio}': np.stack(ranked['perlayer']),
            f'pc/count_per_layer_{ratio}': lengths}  # fmt: skip
    for name, value in ours.items():
        report.compare('kept', name, value, case.arrays[name])
    done = set(ours)
    for which, kept in ranked.items():
        method, prompts = condense(Stack(*whole.method.methods), whole.prompts, kept)
        loss, logits = jax.jit(lambda p, m=method: _loss(case, whole, m, p), compiler_options=quick_compile())(prompts)
        for name, value in (('logits', logits), ('loss', loss)):
            full = f'out/{name}_{which}_{ratio}'
            if full in case.arrays:
                ported.close(report, full, value, case.arrays[full], f'condensed_{name}')
                done.add(full)
        trajectory = f'out/losses_sgd_condensed_{which}_{ratio}'
        if trajectory in case.arrays:
            part = adapted.adapt(whole.model, method.methods, whole.params, prompts)
            adapted.descend(case, report, part, trajectory, case.meta['sgd_lr_condensed'])
            done.add(trajectory)
        zeroed = f'out/logits_{which}_zeroed_{ratio}'
        if zeroed in case.arrays:
            rows = np.zeros((blocks, count, whole.model.width), np.float32)
            for i, (row, index) in enumerate(zip(rows_of(whole.prompts['vpt'], blocks), kept, strict=True)):
                rows[i, index] = row[index]
            vpt = {'prompts': rows[0]} | ({'deep': rows[1:]} if blocks > 1 else {})
            _, logits = _loss(case, whole, Stack(*whole.method.methods), {**whole.prompts, 'vpt': vpt})
            ported.close(report, zeroed, logits, case.arrays[zeroed])
            done.add(zeroed)
    return done
