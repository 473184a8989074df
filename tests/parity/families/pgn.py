"""PGN and its baseline IIP on CLIP, torchvision's and DINO's ViTs, the CNN's norms in both modes, prompt inversion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.parity import adapted, ported
from tests.parity.case import Case, Report
from tests.parity.prompted import Prompted
from tests.parity.torch_names import conv, linear, same
from vpt_jax.errors import UsageError
from vpt_jax.methods import IIP, PGN, CLIPHead, Context, DINOHead, Linear, Method, forward
from vpt_jax.methods.inversion import inverse_of
from vpt_jax.methods.pgn import MIXTURES, resized
from vpt_jax.models import canvas
from vpt_jax.models.pixels import CLIP

_NORMS = {'scale': 'weight', 'bias': 'bias'}
_STATISTICS = {'mean': 'running_mean', 'var': 'running_var'}


class _Noted:
    """Hands out what the published hooks saw; mixed into both methods."""

    def tokens(self, prompts, x, ctx: Context):
        """The sequence, in the reference's order."""
        x = super().tokens(prompts, x, ctx)
        ctx.updates |= {'prompts': ctx.own(x), 'entered': _theirs(x, ctx)}
        return x

    def layer(self, prompts, block, x, i, ctx: Context):
        """The block, its input noted."""
        if i == 0:
            ctx.updates['block0'] = _theirs(x, ctx)
        return block(x)

    def readout(self, prompts, x, pool, ctx: Context):
        """The pooling, which CLIP's projection comes after."""
        ctx.updates['pooled'] = pool(x)
        return ctx.updates['pooled']


def _theirs(x: jax.Array, ctx: Context) -> jax.Array:
    """The reference appends prompts; where they are makes no difference."""
    return jnp.concatenate([x[:, : ctx.prefix], ctx.patches(x), ctx.own(x)], axis=1)


class _SeenPGN(_Noted, PGN):
    def scores(self, prompts, images, ctx: Context):
        ctx.updates['pgn_logits'] = super().scores(prompts, images, ctx)
        return ctx.updates['pgn_logits']


class _SeenIIP(_Noted, IIP):
    pass


def claims(case: Case) -> bool:
    """Cases that say so."""
    return str(case.meta.get('what', '')).startswith(('PGN on', 'prompt inversion'))


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    model, params = ported.build(case, heads=case.config['heads'])
    prompted, names = _prompted(case, model, params)
    prompted = dataclasses.replace(prompted, train=case.config.get('train_bn', False))
    # CLIP's features are not what its head gets.
    plain = dataclasses.replace(case, arrays={k: a for k, a in case.arrays.items() if k != 'out/features'})
    done = adapted.compare(plain, report, prompted, names, rate=case.meta.get('sgd_lr'))
    if 'n_trainable' in case.meta:
        adapted.check_count(report, prompted, case.meta['n_trainable'])
    ours, theirs = {name for found, _ in names.values() for name in found}, case.meta.get('trainables')
    if theirs is not None and ours != set(theirs):
        report.fail(f'trained by one side only: {", ".join(sorted(ours ^ set(theirs)))}')
    outputs = _outputs(case, prompted)
    if any('/patches_' in name for name in case.arrays):
        outputs |= _inverted(case, report, prompted, outputs['prompts'])
    for name, ours in outputs.items():
        if f'out/{name}' in case.arrays:
            done.add(f'out/{name}')
            ported.close(report, f'out/{name}', ours, case.arrays[f'out/{name}'], name.split('/')[0])
    adapted.check_complete(case, report, done)


def _method(case: Case) -> Method:
    config = case.config
    if config.get('prompt_mode') == 'iip':
        return _SeenIIP(num_tokens=config['K'])
    return _SeenPGN(
        num_tokens=config['K'], library=config['N'], mixture=config['act'], resolution=config['pgn_res'],
        channels=config['ch'], groups=config['groups'], blocks=config['bpg'], max_pool=config['maxpool'],
    )  # fmt: skip


def _cnn(config: dict) -> dict[str, tuple]:
    """Our path in the CNN to the reference's name and the layout; the norms' leaves are still to come."""
    table = {'conv1/kernel': ('input_net.0.weight', conv), 'bn1': ('input_net.1', same)}
    for i in range(config['groups'] * config['bpg']):
        ours, theirs = f'block_{i}', f'blocks.{i}'
        for k, place in ((1, 0), (2, 3)):
            table[f'{ours}/conv{k}/kernel'] = (f'{theirs}.net.{place}.weight', conv)
            table[f'{ours}/bn{k}'] = (f'{theirs}.net.{place + 1}', same)
        if i and i % config['bpg'] == 0:
            table |= {f'{ours}/shortcut/kernel': (f'{theirs}.downsample.weight', conv),
                      f'{ours}/bias': (f'{theirs}.downsample.bias', same)}  # fmt: skip
    return table


def _rows(case: Case, leaves: dict[str, str]) -> dict[str, tuple]:
    """The table with the norms' leaves."""
    found = {}
    for path, (name, layout) in _cnn(case.config).items():
        norm = path.split('/')[-1].startswith('bn')
        rows = {f'{path}/{ours}': f'{name}.{theirs}' for ours, theirs in leaves.items()} if norm else {path: name}
        found |= {ours: (f'method/model.{theirs}', layout) for ours, theirs in rows.items()}
    return found


def _prompted(case: Case, model, params) -> tuple[Prompted, dict]:
    """What the case runs, and where its gradients are."""
    method, arrays, state = _method(case), case.arrays, {}
    if isinstance(method, IIP):
        rows = {'prompts': ('method/pgn_vectors', same)}
    else:
        rows = {f'cnn/{path}': row for path, row in _rows(case, _NORMS).items()}
        rows |= {'library': ('method/tl_vectors', same), 'mix/kernel': ('method/model.output_net.2.weight', linear),
                 'mix/bias': ('method/model.output_net.2.bias', same)}  # fmt: skip
        kept = {path: row for path, row in _rows(case, _STATISTICS).items() if path.split('/')[-1] in _STATISTICS}
        added = unflatten_dict({path: arrays[name] for path, (name, _) in kept.items()}, sep='/')
        state['pgn'] = {'kept': 0.0, 'added': added}
    head, prompts, classes = _head(case)
    shapes = flatten_dict(jax.eval_shape(lambda: method.init(jax.random.key(0), model, params, classes)), sep='/')
    own = {path: layout(arrays[name], shapes[path].shape) for path, (name, layout) in rows.items()}
    names = {f'{method.name}/{path}': ([name], layout) for path, (name, layout) in rows.items()}
    if prompts:
        names['linear/last_layer/kernel'] = (['head/weight'], linear)
        names['linear/last_layer/bias'] = (['head/bias'], same)
    state |= {} if prompts else {head.name: _head_state(case)}
    prompts = {method.name: unflatten_dict(own, sep='/'), head.name: prompts}
    return adapted.adapt(model, (method, head), params, prompts, state), names


def _head(case: Case) -> tuple[Method, dict, int]:
    """The head, what is trained of it, and the number of classes."""
    held = case.group('head')
    if 'text_features' in held:
        return CLIPHead(), {}, len(held['text_features'])
    if 'mlp.0.weight' in held:
        return DINOHead(), {}, len(held['last_layer.weight'])
    return Linear(), {'last_layer': {'kernel': held['weight'].T, 'bias': held['bias']}}, len(held['bias'])


def _head_state(case: Case) -> dict:
    """What the heads hold that are not trained; classes are texts, or rows, in order."""
    held = case.group('head')
    if 'text_features' in held:
        texts = held['text_features'] / np.linalg.norm(held['text_features'], axis=-1, keepdims=True)
        return {'texts': texts, 'scale': held['logit_scale'], 'mapping': np.arange(len(texts))[:, None]}
    rows = held['last_layer.weight']
    layers = {
        f'layer_{i}': {'kernel': held[f'mlp.{2 * i}.weight'].T, 'bias': held[f'mlp.{2 * i}.bias']} for i in range(3)
    }
    return {**layers, 'prototypes': rows, 'mapping': np.arange(len(rows))[:, None]}


def _outputs(case: Case, prompted: Prompted) -> dict:
    """What the case may have of a forward pass besides logits and loss, by its names."""
    images = jnp.asarray(case.arrays['in/images'])
    model, method, head = prompted.model, prompted.method, prompted.method.methods[-1]

    @jax.jit
    def everything(prompts, state):
        _, seen = forward(model, method, prompted.params, prompts, images, state=state, train=prompted.train)
        bare, _ = forward(model, head, prompted.params, prompts[head.name], images, state=state.get(head.name))
        return seen, bare

    seen, bare = everything(prompted.prompts, prompted.state)
    own = seen[method.methods[0].name]
    found = {'prompts': own['prompts'], 'tokens_before_ln_pre': own['entered'], 'tokens_after_ln_pre': own['block0'],
             'tokens_in': own['entered'], 'features': own['pooled'], 'embed': seen['features'],
             'logits_unprompted': bare}  # fmt: skip
    if 'pgn_logits' not in own:
        return found
    config = case.config
    weights = own['pgn_logits'].reshape(-1, config['K'], config['N'])
    running = flatten_dict(own['added'], sep='/')
    return {
        **found,
        'pgn_input': resized(images, config['pgn_res']),
        'pgn_logits': own['pgn_logits'],
        'mixture': MIXTURES[config['act']](weights),
        **{f'stats_after_1/{name.removeprefix("method/")}': running[path]
           for path, (name, _) in _rows(case, _STATISTICS).items() if path in running},
    }  # fmt: skip


def _inverted(case: Case, report: Report, prompted: Prompted, prompts: jax.Array) -> dict:
    """Patches and what plain networks make of them: with and without positions, on a canvas, in 8 bits."""
    images, index = case.arrays['in/images'], case.arrays['in/pos_index']
    embedding, head = prompted.params['embedding'], prompted.method.methods[-1]
    kernel, bias = embedding['kernel'], embedding.get('bias')
    inverse = inverse_of(kernel, bias, least_squares=True)
    stats = case.meta['stats']
    if inverse.rank != stats['rank'] or not np.isclose(inverse.condition, stats['cond'], rtol=1e-4):
        report.fail(f'rank {inverse.rank}, condition {inverse.condition}: expected {stats["rank"]}, {stats["cond"]}')
    try:
        inverse_of(kernel, bias)
        refused = False
    except UsageError:
        refused = True
    if refused == inverse.exact:
        report.fail('a network is refused that can be inverted, or the reverse')
    held = canvas.table(prompted.model, prompted.params)
    found = {}
    for where, pos in (('none', np.zeros_like(held[index])), ('index', held[index])):
        model, params = canvas.deployed(prompted.model, prompted.params, pos)

        def scores(patches, model=model, params=params):
            whole = jnp.asarray(canvas.canvas(images, patches))
            prompts, state = prompted.prompts[head.name], prompted.state.get(head.name)
            return jax.jit(lambda x: forward(model, head, params, prompts, x, state=state)[0])(whole)

        patches = inverse.patches(prompts, pos)
        found |= {f'patches_{where}': patches, f'residual_{where}': inverse.residual(patches, prompts, pos),
                  f'logits_pixel_{where}': scores(patches)}  # fmt: skip
    mean, std = np.asarray(CLIP.mean), np.asarray(CLIP.std)
    pixels = patches * std + mean
    rounded = (np.rint(np.clip(pixels, 0, 1) * 255) / 255 - mean) / std
    found |= {'pixels_index': pixels, 'canvas': canvas.canvas(images, patches)}
    found['logits_canvas'] = found['logits_pixel_index']
    if 'out/logits_pixel_index_8bit' in case.arrays:
        found['logits_pixel_index_8bit'] = scores(rounded)
    return found
