import io
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt_jax.data import HALF, IMAGENET, Preprocess
from vpt_jax.data.preprocess import AUGMENTS, RESIZES, legacy_bilinear, normalise, to_rgb
from vpt_jax.errors import UsageError


@pytest.mark.parametrize('case', range(4))
def test_legacy_bilinear_equals_tensorflow_1(reference, case):
    arrays = reference('data_vtab_a')
    image, expected = arrays[f'vtab_image/{case}/in_uint8'], arrays[f'vtab_image/{case}/out_01']
    size = len(expected)
    resized = legacy_bilinear(image, size)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized / 255, expected, rtol=0, atol=2e-7)
    # Rounding to uint8 costs half a grey level and no more.
    decoded = Preprocess(size).decode(image)
    assert decoded.dtype == np.uint8 and decoded.shape == (size, size, 3)
    np.testing.assert_allclose(decoded / 255, expected, rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize('case', range(4))
def test_normalise_equals_the_reference(reference, case):
    arrays = reference('data_vtab_a')
    mean, std = tuple(arrays['mean'].tolist()), tuple(arrays['std'].tolist())
    np.testing.assert_allclose([mean, std], IMAGENET, atol=1e-7)
    out = jax.jit(normalise, static_argnums=(1, 2))(arrays[f'vtab_image/{case}/out_01'], mean, std)
    np.testing.assert_allclose(out, arrays[f'vtab_image/{case}/out_normalised'], rtol=0, atol=1e-6)


def test_fgvc_evaluation_equals_the_reference(reference):
    arrays = reference('data_fgvc_a')
    preprocess = Preprocess(224, resize='fgvc', augment='fgvc')
    decoded = preprocess.decode(arrays['0/in_uint8'])
    assert decoded.shape == (256, 392, 3)
    view = preprocess.eval_view(decoded)
    np.testing.assert_array_equal(view, arrays['0/out_uint8_before_normalise'])
    out = np.asarray(normalise(view, preprocess.mean, preprocess.std))
    np.testing.assert_allclose(out[:8, :8], arrays['0/out_normalised_corner8x8'], atol=1e-6)
    np.testing.assert_allclose([out.mean(), out.std()], arrays['0/out_mean_std'], atol=1e-5)


def test_resize_edges_are_the_published_ones():
    assert {s: Preprocess(s, 'fgvc').resize_edge for s in (224, 384, 448)} == {224: 256, 384: 438, 448: 512}


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 24), resize=st.sampled_from(RESIZES))
def test_views_are_square_whatever_the_image(height, width, size, resize):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    preprocess = Preprocess(size, resize, 'fgvc' if resize == 'fgvc' else 'flip')
    decoded = preprocess.decode(image)
    assert preprocess.eval_view(decoded).shape == (size, size, 3)
    assert preprocess.train_view(decoded, np.random.default_rng(1)).shape == (size, size, 3)
    if resize == 'vtab':
        assert decoded.min() >= image.min() and decoded.max() <= image.max()


def test_an_image_of_the_right_size_is_kept():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(Preprocess(16, 'vtab').decode(image), image)
    np.testing.assert_array_equal(Preprocess(16, 'bicubic').decode(image), image)
    np.testing.assert_array_equal(legacy_bilinear(image, 16), image)


def test_bicubic_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(Preprocess(16, 'bicubic').decode(stripes).astype(int)) < 40
    assert Preprocess(16, 'vtab').decode(stripes).min() == 255  # legacy bilinear reads every fourth column


def test_fgvc_training_crops_and_flips(picture):
    preprocess = Preprocess(14, 'fgvc', 'fgvc')
    decoded = preprocess.decode(picture(20, 50))
    windows = np.lib.stride_tricks.sliding_window_view(decoded, (14, 14, 3)).reshape(-1, 14, 14, 3)
    flips = 0
    for seed in range(20):
        view = preprocess.train_view(decoded, np.random.default_rng(seed))
        plain, mirrored = ((windows == v).all((1, 2, 3)).any() for v in (view, view[:, ::-1]))
        assert plain or mirrored
        flips += mirrored
    assert 3 < flips < 17


def test_any_picture_becomes_rgb(picture):
    rgb = picture(6, 5)
    grey = rgb[..., 0]
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(to_rgb(image), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(to_rgb(Image.fromarray(rgb).convert('RGBA')), rgb)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    buffer = io.BytesIO()
    deep.save(buffer, 'PNG')
    np.testing.assert_array_equal(to_rgb(Image.open(buffer))[..., 1], grey)


@pytest.mark.parametrize(
    'image', [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), 'cat.jpg']
)
def test_other_arrays_are_refused(image):
    with pytest.raises(UsageError, match='an image must'):
        Preprocess(8).decode(image)


@pytest.mark.parametrize('resize', RESIZES)
@pytest.mark.parametrize('augment', AUGMENTS)
def test_json_round_trip(resize, augment):
    if augment == 'fgvc' and resize != 'fgvc':
        with pytest.raises(UsageError, match="use resize 'fgvc'"):
            Preprocess(32, resize, augment)
        return
    preprocess = Preprocess(32, resize, augment, *HALF)
    again = Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict())))
    assert again == preprocess and hash(again) == hash(preprocess)


@pytest.mark.parametrize(
    ('given_', 'message'),
    [
        ({'size': 0}, '>= 1, got 0'),
        ({'size': 32.5}, 'got 32.5'),
        ({'size': True}, 'got True'),
        ({'size': 32, 'resize': 'vtb'}, "did you mean 'vtab'"),
        ({'size': 32, 'augment': 'flop'}, "did you mean 'flip'"),
        ({'size': 32, 'std': [0.5, 0.5, 0.0]}, 'std'),
        ({'size': 32, 'mean': [0.5, 0.5]}, 'mean must be three numbers'),
        ({'size': 32, 'mean': None}, 'mean must be three numbers'),
        ({'size': 32, 'crop': 3}, "unknown preprocess setting 'crop'"),
        ({'resize': 'vtab'}, "lack 'size'"),
        ([], 'must be a dict'),
    ],
)
def test_mistakes_are_named(given_, message):
    with pytest.raises(UsageError, match=message):
        Preprocess.from_dict(given_)


def test_half_maps_to_minus_one_and_one():
    out = normalise(np.array([[0, 128, 255]], np.uint8), *HALF)
    np.testing.assert_allclose(out, [[-1, 1 / 255, 1]], atol=1e-6)
