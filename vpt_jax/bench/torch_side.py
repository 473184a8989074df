"""The same work in plain PyTorch, to compare with: a frozen ViT with SDPA, prompts and head trained by SGD.

Written from the papers' definitions the way a PyTorch user would write it. The weights and prompts are ours, so that
both sides can be checked to compute the same logits before they are timed.

Shapes: B images, T tokens, N patches, P prompts, D width, H heads, L blocks.
"""

import contextlib

import jax
import numpy as np

from vpt_jax.errors import UsageError

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError as error:
    raise UsageError("--against=torch needs PyTorch: pip install 'vpt_jax[torch]'") from error

from vpt_jax.models.vit import ViT
from vpt_jax.models.zoo import Backbone


def _tensor(array, *shape: int) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array, np.float32))
    return tensor.reshape(shape) if shape else tensor


def _linear(kernel, bias, inputs: int) -> nn.Linear:
    kernel = _tensor(kernel, inputs, -1)
    layer = nn.Linear(*kernel.shape)
    layer.weight.data, layer.bias.data = kernel.T.contiguous(), _tensor(bias, -1)
    return layer


def _norm(params: dict, eps: float) -> nn.LayerNorm:
    layer = nn.LayerNorm(params['scale'].shape[0], eps)
    layer.weight.data, layer.bias.data = _tensor(params['scale']), _tensor(params['bias'])
    return layer


class Block(nn.Module):
    """A pre-norm transformer block with one fused query-key-value layer."""

    def __init__(self, model: ViT, params: dict):
        super().__init__()
        attention, mlp, width = params['MultiHeadDotProductAttention_0'], params['MlpBlock_0'], model.width
        self.heads, self.tanh = model.heads, model.activation == 'gelu_tanh'
        self.norm1, self.norm2 = (_norm(params[f'LayerNorm_{i}'], model.ln_eps) for i in (0, 1))
        parts = [attention[name] for name in ('query', 'key', 'value')]
        self.qkv = _linear(
            np.concatenate([np.reshape(p['kernel'], (width, width)) for p in parts], axis=1),
            np.concatenate([np.reshape(p['bias'], -1) for p in parts]),
            width,
        )
        self.out = _linear(attention['out']['kernel'], attention['out']['bias'], width)
        self.fc1 = _linear(mlp['Dense_0']['kernel'], mlp['Dense_0']['bias'], width)
        self.fc2 = _linear(mlp['Dense_1']['kernel'], mlp['Dense_1']['bias'], model.mlp_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        batch, count, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(batch, count, width))
        y = functional.gelu(self.fc1(self.norm2(x)), approximate='tanh' if self.tanh else 'none')
        return x + self.fc2(y)


class Prompted(nn.Module):
    """A frozen ViT with VPT's, VAPT's or no prompts and a linear head."""

    def __init__(self, model: ViT, params: dict, method: str, prompts: dict):
        super().__init__()
        self.method, self.grid = method, model.grid(model.image_size)
        self.patches = nn.Conv2d(3, model.width, model.patch_size, model.patch_size)
        self.patches.weight.data = _tensor(params['embedding']['kernel']).permute(3, 2, 0, 1).contiguous()
        self.patches.bias.data = _tensor(params['embedding']['bias'])
        self.cls = nn.Parameter(_tensor(params['cls']))
        self.positions = nn.Parameter(_tensor(params['pos_embedding']))
        encoder = params['Transformer']
        self.blocks = nn.ModuleList(Block(model, encoder[f'encoderblock_{i}']) for i in range(model.depth))
        self.norm = _norm(encoder['encoder_norm'], model.ln_eps)
        self.requires_grad_(method == 'full')
        head = prompts.get('linear', prompts)['last_layer']
        self.head = _linear(head['kernel'], head['bias'], model.width)
        held = prompts.get('vpt', prompts.get('vapt'))
        if held is not None:
            self.prompts = nn.Parameter(_tensor(held['prompts'])[None])
        if method == 'vpt_deep':
            self.deep = nn.Parameter(_tensor(held['deep']))
        if method == 'vapt':
            self._adaptive_parts(model, held)

    def _adaptive_parts(self, model: ViT, held: dict) -> None:
        count = model.depth - 1
        self.norms = nn.ModuleList(
            _norm({k: held['norm'][k][j] for k in ('scale', 'bias')}, 1e-5) for j in range(count)
        )
        self.kernels = nn.ParameterList(nn.Parameter(_tensor(held['conv']['kernel'][j])) for j in range(count))
        mixes = held['mix']
        self.mixes = nn.ModuleList(
            _linear(mixes['kernel'][j], mixes['bias'][j], mixes['kernel'].shape[1]) for j in range(count)
        )
        self.down = nn.Linear(*held['proj']['down'].shape, bias=False)
        self.up = nn.Linear(*held['proj']['up'].shape, bias=False)
        self.down.weight.data = _tensor(held['proj']['down']).T.contiguous()
        self.up.weight.data = _tensor(held['proj']['up']).T.contiguous()

    def _adaptive(self, x: torch.Tensor, j: int) -> torch.Tensor:
        """VAPT's prompts [B, P, D] from patch tokens [B, N, D]."""
        batch, _, width = x.shape
        y = self.norms[j](x).transpose(1, 2).reshape(batch * width, 1, *self.grid)
        y = functional.conv2d(y, self.kernels[j][None, None]).reshape(batch, width, -1)
        y = functional.dropout2d(y[..., None], 0.1, self.training)[..., 0]
        q = self.mixes[j](y).transpose(1, 2)
        h = functional.dropout(functional.relu(self.down(q)), 0.1, self.training)
        return self.up(h) + q

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, S, S] to logits [B, C]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        batch = x.shape[0]
        x = torch.cat([self.cls.expand(batch, -1, -1), x], dim=1) + self.positions
        count = 0
        if hasattr(self, 'prompts'):
            count = self.prompts.shape[1]
            x = torch.cat([x[:, :1], self.prompts.expand(batch, -1, -1), x[:, 1:]], dim=1)
        for i, block in enumerate(self.blocks):
            if i and self.method == 'vpt_deep':
                fresh = self.deep[i - 1].expand(batch, -1, -1)
                x = torch.cat([x[:, :1], fresh, x[:, 1 + count :]], dim=1)
            if i and self.method == 'vapt':
                x = torch.cat([x[:, :1], self._adaptive(x[:, 1 + count :], i - 1), x[:, 1 + count :]], dim=1)
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Measured:
    """The same method, backbone, batch and precision as a `measure.Measured`, in PyTorch.

    Raises:
      UsageError: a method or a backbone that is not written here, or logits that differ from ours.
    """

    METHODS = ('linear', 'vpt_shallow', 'vpt_deep', 'vapt', 'full')

    def __init__(self, backbone: Backbone, ours, method: str, precision: str, compiled: bool):
        plain = {'pool': 'tok', 'pre_norm': False, 'layer_scale': False, 'registers': 0, 'dist_token': False}
        if method not in self.METHODS or any(getattr(backbone.model, k, None) != v for k, v in plain.items()):
            raise UsageError(
                f'--against=torch has {", ".join(self.METHODS)} on a plain ViT with a CLS token, not {method!r} on '
                f'{backbone.name}'
            )
        prompts = jax.device_get(ours.state.prompts)
        params = prompts['full'] if method == 'full' else jax.device_get(backbone.model.canonical(backbone.params))
        self.device = 'cuda' if torch.cuda.is_available() and jax.default_backend() == 'gpu' else 'cpu'
        self.half = precision == 'bfloat16'
        model = Prompted(backbone.model, params, method, prompts).to(self.device)
        pixels = backbone.pixels
        mean, std = (_tensor(v, 1, 3, 1, 1).to(self.device) for v in (pixels.mean, pixels.std))
        self.images = torch.from_numpy(ours.batch['image']).to(self.device).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(ours.batch['label']).long().to(self.device)
        self._normalise = lambda images: (images.float() / 255 - mean) / std
        self._agree(model, ours)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, 0.9)
        self.model = torch.compile(model) if compiled else model

    def _agree(self, model: nn.Module, ours) -> None:
        """Refuses to time something else than what we run."""
        model.eval()
        with torch.inference_mode(), self._autocast():
            theirs = model(self._normalise(self.images)).float().cpu().numpy()
        logits = np.asarray(ours.evaluate(), np.float32)
        error, scale = np.abs(theirs - logits).max(), np.abs(logits).max()
        if not error <= (5e-2 if self.half else 1e-3) * max(scale, 1.0):
            raise UsageError(f'the PyTorch side computes other logits than ours (difference {error:.1e})')

    def _autocast(self):
        return torch.autocast(self.device, torch.bfloat16) if self.half else contextlib.nullcontext()

    def _wait(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def train(self) -> None:
        """One train step, waited for."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model(self._normalise(self.images))
        functional.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self._wait()

    def evaluate(self) -> None:
        """One evaluation step, waited for."""
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            self.model(self._normalise(self.images))
        self._wait()
