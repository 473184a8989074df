"""Where every array of the PyTorch references (KMnP/vpt, VAPT) goes in our prompts.

One table, read the same way for weights, gradients and trained weights: the reference's array is always brought into
our layout. `{}` in a name stands for the position on the leading axis of our array.

Shapes: D width, H heads, k = D / H, K kernel side, S image side.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]
Layout = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def same(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Same order; leading axes of 1 come and go, (D,) may be split into (H, k)."""
    return x.reshape(shape)


def linear(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(out, in) to [in, out], either side of which may be split into heads."""
    return x.T.reshape(shape)


def image(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(1, C, H, W) to [H, W, C]."""
    return x[0].transpose(1, 2, 0)


def conv(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(out, in, h, w) to [h, w, in, out]."""
    return x.transpose(2, 3, 1, 0)


def kernel(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(1, 1, K, K) to [K, K]; (D, 1, K, K) to [K, K, D]."""
    return x[:, 0].transpose(1, 2, 0) if len(shape) == 3 else x.reshape(shape)


_T = 'enc.transformer.'
_MLP = f'{_T}deep_prompt_embeddings_mlp.'
_DOWN = f'{_T}deep_prompt_downsample.'
_ADAPTER = f'{_T}encoder.layer.{{}}.adapter_'

# A ResNet's first layers, which the reference moves out of the network when it trains them.
_RESNET = {
    'conv1/kernel': (conv, 'prompt_layers.conv1.weight'),
    'bn1/scale': (same, 'prompt_layers.bn1.weight'),
    'bn1/bias': (same, 'prompt_layers.bn1.bias'),
    'bn1/mean': (same, 'prompt_layers.bn1.running_mean'),
    'bn1/var': (same, 'prompt_layers.bn1.running_var'),
}

# Our path, the layout, and the reference's names; the first name that the case holds counts.
_ROWS: dict[str, tuple] = {
    'vpt/prompts': (same, f'{_T}prompt_embeddings'),
    'vpt/deep': (same, f'{_T}deep_prompt_embeddings'),
    'vpt/proj/kernel': (linear, f'{_T}prompt_proj.weight'),
    'vpt/proj/bias': (same, f'{_T}prompt_proj.bias'),
    'vpt_add/prompts': (same, f'{_T}prompt_embeddings'),
    'vpt_add/deep': (same, f'{_T}deep_prompt_embeddings'),
    'vpt_pixels/pixels': (image, f'{_T}prompt_embeddings'),
    'vpt_pad/top_bottom': (image, f'{_T}prompt_embeddings_tb', 'prompt_embeddings_tb'),
    'vpt_pad/left_right': (image, f'{_T}prompt_embeddings_lr', 'prompt_embeddings_lr'),
    'vpt_below/channels': (image, f'{_T}prompt_embeddings', 'prompt_embeddings'),
    'vpt_below/embedding/kernel': (conv, f'{_T}embeddings.patch_embeddings.weight'),
    'vpt_below/embedding/bias': (same, f'{_T}embeddings.patch_embeddings.bias'),
    **{f'vpt_below/{ours}': row for ours, row in _RESNET.items() if ours[-4:] not in ('mean', '/var')},
    'vapt/prompts': (same, f'{_T}prompt_embeddings'),
    'vapt/deep': (same, f'{_T}deep_prompt_embeddings'),
    'vapt/norm/scale': (same, f'{_T}deep_prompt_norm.{{}}.weight'),
    'vapt/norm/bias': (same, f'{_T}deep_prompt_norm.{{}}.bias'),
    'vapt/conv/kernel': (kernel, f'{_DOWN}{{}}.conv.kernel'),
    'vapt/mix/kernel': (linear, f'{_DOWN}{{}}.linear.weight', f'{_DOWN}{{}}.weight'),
    'vapt/mix/bias': (same, f'{_DOWN}{{}}.linear.bias', f'{_DOWN}{{}}.bias'),
    'vapt/proj/down': (linear, f'{_MLP}block.0.weight', f'{_MLP}{{}}.block.0.weight'),
    'vapt/proj/up': (linear, f'{_MLP}block.2.weight', f'{_MLP}{{}}.block.2.weight'),
    'vapt/scale': (same, f'{_MLP}scale', f'{_MLP}{{}}.scale'),
    'adapter/down/kernel': (linear, f'{_ADAPTER}downsample.weight'),
    'adapter/down/bias': (same, f'{_ADAPTER}downsample.bias'),
    'adapter/up/kernel': (linear, f'{_ADAPTER}upsample.weight'),
    'adapter/up/bias': (same, f'{_ADAPTER}upsample.bias'),
    'linear/last_layer/kernel': (linear, 'head.last_layer.weight'),
    'linear/last_layer/bias': (same, 'head.last_layer.bias'),
    'mlp/last_layer/kernel': (linear, 'head.last_layer.weight'),
    'mlp/last_layer/bias': (same, 'head.last_layer.bias'),
}

# Our MLP head's parts: the place in the reference's Sequential(Linear, ReLU, BatchNorm, Dropout, ...), and the leaves.
_MLP_HEAD = {'hidden': 0, 'norm': 2}
_MLP_LEAVES = {'kernel': (linear, 'weight'), 'bias': (same, 'bias'), 'scale': (same, 'weight'),
               'mean': (same, 'running_mean'), 'var': (same, 'running_var')}  # fmt: skip

_BACKBONE = {
    'cls': 'embeddings.cls_token',
    'pos_embedding': 'embeddings.position_embeddings',
    'embedding': 'embeddings.patch_embeddings',
    'Transformer/encoder_norm': 'encoder.encoder_norm',
    'LayerNorm_0': 'attention_norm',
    'LayerNorm_1': 'ffn_norm',
    'MlpBlock_0/Dense_0': 'ffn.fc1',
    'MlpBlock_0/Dense_1': 'ffn.fc2',
    **{f'MultiHeadDotProductAttention_0/{part}': f'attn.{part}' for part in ('query', 'key', 'value', 'out')},
}
#: Members of a stack whose prompts are backbone weights.
BACKBONE_MEMBERS = ('full', 'partial', 'bias', 'cls')


def backbone_row(path: Path) -> tuple | None:
    """The row of a backbone parameter; None for the layers of ConvNets that the reference never trains."""
    name = '/'.join(path)
    if name in ('cls', 'pos_embedding'):
        return same, f'{_T}{_BACKBONE[name]}'
    module, leaf = '/'.join(path[:-1]), 'bias' if path[-1] == 'bias' else 'weight'
    layout = same if path[-1] != 'kernel' else conv if module == 'embedding' else linear
    if found := re.fullmatch(r'Transformer/encoderblock_(\d+)/(.+)', module):
        return layout, f'{_T}encoder.layer.{found[1]}.{_BACKBONE[found[2]]}.{leaf}'
    if module in _BACKBONE:
        return layout, f'{_T}{_BACKBONE[module]}.{leaf}'
    return _RESNET.get(name)


def _row(path: Path) -> tuple:
    name = '/'.join(path)
    if name in _ROWS:
        return _ROWS[name]
    if path[0] in BACKBONE_MEMBERS:
        return backbone_row(path[1:])
    if found := re.fullmatch(r'mlp/(hidden|norm)_(\d+)/(\w+)', name):
        layout, leaf = _MLP_LEAVES[found[3]]
        return layout, f'head.projection.{4 * int(found[2]) + _MLP_HEAD[found[1]]}.{leaf}'
    raise KeyError(f'the table of names has no row for our {name}')


def names_of(path: Path, shape: tuple[int, ...], held: Iterable[str]) -> tuple[Layout, list[str], bool]:
    """The layout and the reference's names of our array at `path`, and whether they are stacked.

    Args:
      path: in the prompts of a stack; its first part is the member's name.
      shape: of our array.
      held: the names that the case knows.
    """
    layout, *choices = _row(path)
    held = set(held)
    spelled = {c: [c.format(i) for i in range(shape[0])] if '{}' in c else [c] for c in choices}
    choice = next((c for c in choices if held.intersection(spelled[c])), choices[0])
    return layout, spelled[choice], '{}' in choice


def collect(shapes: Mapping, arrays: Mapping[str, np.ndarray]) -> tuple[dict, set[str]]:
    """Brings the reference's arrays into our tree.

    Args:
      shapes: our tree; leaves have a `shape`.
      arrays: the reference's, by name.

    Returns:
      (tree like `shapes`, the names that were used).

    Raises:
      KeyError: an array that we need is not there.
    """
    tree, used = {}, set()
    for path, leaf in flatten_dict(dict(shapes)).items():
        layout, names, stacked = names_of(path, leaf.shape, arrays)
        parts = [layout(arrays[name], leaf.shape[1:] if stacked else leaf.shape) for name in names]
        tree[path] = np.stack(parts) if stacked else parts[0]
        if tree[path].shape != leaf.shape:
            raise ValueError(f'{names[0]} becomes {list(tree[path].shape)}, but our {path} is {list(leaf.shape)}')
        used.update(names)
    return unflatten_dict(tree), used
