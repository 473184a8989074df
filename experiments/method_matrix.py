"""Which method trains on which family of networks: every method, on a tiny network of every family.

`method_tables` writes what is found here into docs/methods.md, and the tests look at the same.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpt_jax.errors import MissingPlace
from vpt_jax.methods import VP, Method, Stack, build, forward, with_head
from vpt_jax.methods.clip_head import save_texts
from vpt_jax.models.beit import BEiT
from vpt_jax.models.bit import BiT
from vpt_jax.models.clip_resnet import CLIPResNet
from vpt_jax.models.convnext import ConvNeXt
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT

SIDE, CLASSES, SOURCES = 16, 3, 7
_VIT = {'width': 16, 'depth': 2, 'mlp_dim': 32, 'heads': 2, 'patch_size': 4, 'image_size': SIDE}
_STAGES = {'depths': (1, 1), 'image_size': SIDE}

#: A tiny network of every family, with what its pretrained networks have.
NETWORKS = {
    'ViT': ViT(**_VIT),
    'CLIP ViT': ViT(**_VIT, pre_norm=True, patch_bias=False, projection=8, activation='quick_gelu'),
    'hybrid ViT': ViT(**_VIT, stem_depths=(1,), stem_width=32),
    'BEiT': BEiT(**_VIT, posemb='none', mask_token=True, vocab=11),
    'ResNet': ResNet(**_STAGES, inner=(4, 8), outer=(8, 16), bottleneck=False, stem_width=8),
    'BiT': BiT(**_STAGES, width=32),
    'CLIP ResNet': CLIPResNet(**_STAGES, inner=(4, 8), outer=(16, 32), stem_width=8, heads=2, embed_width=8),
    'Swin': Swin(**_STAGES, embed_dim=8, heads=(2, 2), windows=(2, 2)),
    'ConvNeXt': ConvNeXt(**_STAGES, dims=(8, 16)),
}

#: Settings that fit these networks, where the defaults do not, or that have a method do all that it can.
SETTINGS: dict[str, dict[str, Any]] = {
    'vpt': {'num_tokens': 2, 'deep': True},
    'vpt_add': {'deep': True},
    'vpt_pixels': {'num_tokens': 2},
    'vpt_pad': {'num_pixels': SIDE // 2},
    'vapt': {'num_tokens': 2},
    'spt': {'num_tokens': 2, 'strategy': 'mean_pooling'},
    'cvpt': {'num_tokens': 2},
    'condensed': {'num_tokens': 2, 'deep': True, 'kept': (2, 1)},
    'vptm': {'num_tokens': 2, 'deep': True},
    'pgn': {'num_tokens': 2, 'library': 4, 'channels': 4, 'groups': 2},
    'vp': {'size': 4},
    'lora': {'rank': 2, 'targets': 'all'},
}

#: Heads that train nothing: pixels are trained before them.
_FROZEN = ('label_mapping', 'clip_head', 'dino_head')


def case(name: str, network: str, folder: Path) -> tuple[Method, Any]:
    """A method with a head, and the network that it is tried on.

    Args:
      name: a key of `METHODS`.
      network: a key of `NETWORKS`.
      folder: for files that a head reads.
    """
    model, settings = NETWORKS[network], dict(SETTINGS.get(name, {}))
    rng, width = np.random.default_rng(0), model.feature_width
    if name == 'label_mapping':
        model = model.clone(classes=SOURCES)
    if name == 'clip_head':
        settings['texts'] = str(folder / f'texts_{width}.npz')
        save_texts(settings['texts'], rng.normal(size=(CLASSES, width)), 1.0)
    if name == 'dino_head':
        settings['projector'] = str(folder / f'projector_{width}.npz')
        shapes = {'mlp.0': (8, width), 'mlp.2': (8, 8), 'mlp.4': (5, 8), 'last_layer': (SOURCES, 5)}
        arrays = {f'{layer}.weight': rng.normal(size=shape) for layer, shape in shapes.items()}
        np.savez(
            settings['projector'], **arrays, **{f'mlp.{i}.bias': np.zeros(shapes[f'mlp.{i}'][0]) for i in (0, 2, 4)}
        )
    method = build(name, **settings)
    return (Stack(VP(**SETTINGS['vp']), method) if name in _FROZEN else with_head(method)), model


def missing(method: Method, model: Any) -> str:
    """The place for want of which the network is refused; '' if it is not."""
    try:
        method.check(model)
    except MissingPlace as error:
        return error.place
    return ''


def descend(method: Method, model: Any, params: Any, images: np.ndarray, *, prompts: Any = None,
            promised: float = 0.005, steps: int = 4,
            options: dict | None = None) -> tuple[np.ndarray, Any, Any]:  # fmt: skip
    """Gradient descent on one batch, with steps as long as the gradient promises a part of the loss.

    Args:
      method, model: with a head, and the network.
      params: the network's weights, as it stores them.
      images: [B, H, W, 3], normalised; their labels are 0, 1, ... in turn.
      prompts: where to start; None for what the method draws, from the images if it looks at them.
      promised: that part.
      steps: how many.
      options: further arguments of `jax.jit`, how to compile say.

    Returns:
      (losses [steps], prompts at first, prompts in the end).
    """
    labels, key = jnp.arange(len(images)) % CLASSES, jax.random.key(0, impl='unsafe_rbg')
    if prompts is None and method.looks_at_images:
        drawn = method.init(key, model, model.canonical(params), CLASSES)
        prompts = method.init_from(key, model, model.canonical(params), drawn, images)

    def run(params: Any, images: jax.Array, prompts: Any) -> tuple:
        prompts = method.init(key, model, model.canonical(params), CLASSES) if prompts is None else prompts

        def loss(prompts, state):
            scores, state = forward(model, method, params, prompts, images, state=state, train=True, key=key,
                                    pixels=((0.5,) * 3, (0.25,) * 3))  # fmt: skip
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), state

        def update(carried, _):
            prompts, state = carried
            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(prompts, state)
            rate = promised * value / optax.tree.norm(grads, squared=True)  # small where a network is steep
            return (jax.tree.map(lambda p, g: p - rate * g, prompts, grads), state), value

        state = method.init_state(model, CLASSES, key)
        (found, _), losses = jax.lax.scan(update, (prompts, state), length=steps)
        return losses, prompts, found

    losses, before, after = jax.jit(run, **(options or {}))(params, images, prompts)
    return np.asarray(losses), before, after
