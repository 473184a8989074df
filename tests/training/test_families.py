"""From a file in a family's own naming and container to a train step that lowers the loss."""

import numpy as np
import pytest
import safetensors.numpy

from experiments.method_matrix import descend
from tests.networks import QUICK
from tests.parity.case import Case
from tests.parity.test_parity import CASES
from vpt_jax.errors import UsageError
from vpt_jax.methods import VAPT, VPT, Linear, Stack, VPTPad
from vpt_jax.models.zoo import load_backbone

PROMISED = 0.005  # of the loss, by the gradient of each step

TOKENS = {
    'augreg_hybrid_a': {},
    'vpt_deep_a': {'activation': 'gelu'},
    'bv_vit_map_c': {},
    'timm_deit_dist_c': {'heads': 4},
    'mae_vit_a': {'heads': 4},
    'dinov2_official_reg_b': {'heads': 4},
    'hf_siglip_a': {'heads': 4},
    'openai_clip_vit_a': {'heads': 4},
    'torchvision_vit_a': {'heads': 4},
    'beitv2_shared_b': {'heads': 4},
}
MAPS = {
    'linear_resnet_a': {'image_size': 64},
    'timm_resnext_b': {'image_size': 64},
    'bv_bit_a': {'image_size': 64},
    'openai_clip_rn_a': {'heads': 4},
    'ms_swin_a': {},
    'timm_convnext_a': {'image_size': 64},
}


@pytest.fixture
def load(tmp_path):
    def loaded(name, settings):
        arrays = Case.load(CASES / f'{name}.npz').group('backbone')
        arrays = {n.removeprefix('enc.'): np.ascontiguousarray(a) for n, a in arrays.items()}
        if any('/' in n for n in arrays):
            path = tmp_path / f'{name}.npz'
            np.savez(path, **arrays)
        else:
            path = tmp_path / f'{name}.safetensors'
            safetensors.numpy.save_file(arrays, path)
        return load_backbone(path, **settings)

    return loaded


def losses_of(backbone, method):
    """Losses of plain gradient descent on one batch."""
    method.check(backbone.model)
    size = backbone.model.image_size
    images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    return descend(method, backbone.model, backbone.params, images, promised=PROMISED, options=QUICK)[0]


@pytest.mark.parametrize('name', TOKENS)
def test_prompts_train_on_networks_of_tokens(load, name):
    backbone = load(name, TOKENS[name])
    for method in (Linear(), Stack(VPT(num_tokens=2, deep=True), Linear()), Stack(VAPT(num_tokens=2), Linear())):
        losses = losses_of(backbone, method)
        np.testing.assert_allclose(-np.diff(losses), PROMISED * losses[:-1], rtol=0.5, err_msg=str(method))


@pytest.mark.parametrize('name', MAPS)
def test_frames_train_on_networks_of_maps(load, name):
    backbone = load(name, MAPS[name])
    frame = VPTPad(num_pixels=backbone.model.image_size // 2)  # a Swin wants whole windows
    for method in (Linear(), Stack(frame, Linear())):
        losses = losses_of(backbone, method)
        np.testing.assert_allclose(-np.diff(losses), PROMISED * losses[:-1], rtol=0.5, err_msg=str(method))
    for method in (VPT(), VAPT()):
        with pytest.raises(
            UsageError, match=f"changes the 'tokens' of a network, which {type(backbone.model).__name__}"
        ):
            method.check(backbone.model)
