"""A case of a prompted network, made ready to run: our model and method with the case's weights in them."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.parity import torch_names
from tests.parity.case import Case, Unsupported
from tests.parity.options import members, transfer_type
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.methods import VAPT, Context, Stack, forward
from vpt_jax.models import loading, posemb
from vpt_jax.models.vit import ViT


class SeenVAPT(VAPT):
    """VAPT that hands its adaptive prompts out with the state."""

    def adaptive_prompts(self, prompts, x, j, ctx: Context) -> jax.Array:
        """The prompts of adaptive block j."""
        out = super().adaptive_prompts(prompts, x, j, ctx)
        ctx.updates[f'adaptive_{j}'] = out
        return out


class SeenStack(Stack):
    """A stack that hands out the network's input and its features with the state."""

    def pixels(self, prompts, images, ctx: Context) -> jax.Array:
        """Each member's pixels."""
        ctx.updates['input'] = super().pixels(prompts, images, ctx)
        return ctx.updates['input']

    def logits(self, prompts, features, ctx: Context) -> jax.Array:
        """The head."""
        ctx.updates['features'] = features
        return super().logits(prompts, features, ctx)


def quick_compile() -> dict:
    """Compiler options for programs that run once: on a CPU, most of a case's time is LLVM's optimisation."""
    if jax.default_backend() != 'cpu':
        return {}
    return {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


@dataclasses.dataclass(frozen=True)
class Prompted:
    """What a case runs.

    Attributes:
      model, method, params, state: as `methods.forward` takes them.
      prompts: all of them, with the case's weights.
      frozen: members of the stack that are not trained.
      google: canonical name of a backbone weight to its name in the file.
      unused: the case's weights that have no place in our prompts.
      train: whether the network runs as in training, where nothing is random.
      pixels: (mean, std) of the images, as `methods.forward` takes them.
    """

    model: nn.Module
    method: Stack
    params: dict
    prompts: dict
    state: dict
    frozen: frozenset[str]
    google: dict[str, str]
    unused: dict[str, np.ndarray]
    train: bool = False
    pixels: tuple | None = None

    @property
    def trained(self) -> dict:
        """The prompts that are trained."""
        return {name: tree for name, tree in self.prompts.items() if name not in self.frozen}

    def value_and_grad(self) -> Callable:
        """A compiled function (trained, images, labels) -> ((loss, (logits, seen)), gradient)."""
        fixed = {name: self.prompts[name] for name in self.frozen}

        def loss(trained, params, images, labels):
            prompts = {**fixed, **trained}
            logits, seen = forward(self.model, self.method, params, prompts, images, state=self.state,
                                   train=self.train, pixels=self.pixels)  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, seen)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick_compile())
        return lambda trained, images, labels: step(trained, self.params, images, labels)


def prepare(case: Case) -> Prompted:
    """Builds what a case runs.

    Raises:
      Unsupported: an option, or a combination, that our methods do not have.
    """
    try:
        method = SeenStack(*members(case, SeenVAPT))
        size = case.arrays['in/images'].shape[1]
        model, params, google = _backbone(case, size, framed='vpt_pad' in {m.name for m in method.methods})
        method.check(model.clone(image_size=size))
    except UsageError as error:
        raise Unsupported(str(error)) from error
    weights = {**case.group('method'), **case.group('head')}
    params, overridden = _override(params, weights)
    classes = weights['head.last_layer.bias'].shape[0]
    prompts, state, used = {}, method.init_state(model), set(overridden)
    sized = model.clone(image_size=size)
    for m in method.methods:
        if m.name in torch_names.BACKBONE_MEMBERS:
            prompts[m.name] = dataclasses.replace(m, **({'redraw': False} if m.name == 'cls' else {})).init(
                jax.random.key(0), sized, params, classes
            )
            continue
        shapes = jax.eval_shape(lambda p, m=m: m.init(jax.random.key(0), sized, p, classes), params)
        tree, names = torch_names.collect({m.name: shapes}, weights)
        prompts |= tree
        used |= names
    if 'mlp' in state:  # the only state that cases hold
        tree, names = torch_names.collect({'mlp': state['mlp']}, weights)
        state |= tree
        used |= names
    frozen = set()
    if transfer_type(case) == 'prompt-noupdate':
        frozen = {m.name for m in method.methods if not m.changes('logits')}
    unused = {name: a for name, a in weights.items() if name not in used and a.size}
    on_device = jax.tree.map(jnp.asarray, (params, prompts, state))
    return Prompted(model, method, *on_device, frozenset(frozen), google, unused)


def in_vits_names(case: Case) -> Case:
    """A case on MAE or MoCo v3, whose network is called `enc`, with `enc.transformer` as all others have it."""
    if not any(name.startswith('backbone/enc.') for name in case.arrays):
        return case
    own = re.compile(r'^((?:method|grad)/|)enc\.')
    arrays = {own.sub(r'\1enc.transformer.', name.replace('backbone/enc.', 'backbone/')): array
              for name, array in case.arrays.items()}  # fmt: skip
    lists = {key: [own.sub('enc.transformer.', name) for name in case.meta.get(key, ())]
             for key in ('trainable', 'unused_trainable') if key in case.meta}  # fmt: skip
    return dataclasses.replace(case, arrays=arrays, meta={**case.meta, **lists})


def _backbone(case: Case, size: int, framed: bool) -> tuple[nn.Module, dict, dict[str, str]]:
    """The network for images of `size` pixels, its parameters, and canonical names to the file's."""
    source = ArraySource(case.group('backbone'), case.name)
    part, ported = scheme.port(source, hints={'heads': case.config.get('heads')})
    if ported.family != 'vit':
        return *loading.build(part, ported, image_size=size), {}
    tree = scheme.load(source, ported)
    google = {name: weight.names[0] for name, weight in ported.weights.items()}
    model = ViT(**{**ported.settings, 'activation': 'gelu'})  # VPT's code runs Google's weights with exact GELU
    if model.image_size != size and not framed:
        # As the references do on loading. A framed image is of neither size: the network resamples as it runs.
        model = model.clone(image_size=size)
        pos = jnp.asarray(tree['pos_embedding'])
        tree['pos_embedding'] = posemb.resample(pos, model.grid(size), model.posemb_prefix, model.posemb_rule)
    return model, tree, google


def _override(params: dict, weights: dict[str, np.ndarray]) -> tuple[dict, set[str]]:
    """Backbone weights that the case stores with the method (a redrawn CLS token); those of other shapes stay out."""
    flat, used = flatten_dict(params), set()
    for path, old in flat.items():
        layout, name = torch_names.backbone_row(path) or (None, None)
        if name in weights and weights[name].size == old.size:
            flat[path] = layout(weights[name], old.shape)
            used.add(name)
    return unflatten_dict(flat), used


def references(prompted: Prompted, held: set[str]) -> dict[tuple[str, ...], tuple[Any, list[str], bool, str | None]]:
    """For every trained array of ours: layout, the reference's names, stacked or not, and its Google name if any."""
    found = {}
    for path, leaf in flatten_dict(prompted.trained).items():
        google = None
        if path[0] in torch_names.BACKBONE_MEMBERS:
            google = prompted.google['/'.join(path[1:])]
        found[path] = (*torch_names.names_of(path, leaf.shape, held), google)
    return found
