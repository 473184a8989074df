"""Every resampling rule against another way to say it."""

import chex
import jax
import numpy as np
import pytest
from absl.testing import parameterized

from vpt_jax.errors import UsageError
from vpt_jax.models import posemb

SIZES = [(4, 6), (7, 5), (3, 1)]


@pytest.mark.parametrize('rule', posemb.RULES)
@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_rows_sum_to_one(rule, old, new):
    matrix = posemb.resize_matrix(old, new, rule)
    assert matrix.shape == (new, old) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize('rule', posemb.RULES)
def test_same_size_is_the_identity(rule):
    np.testing.assert_array_equal(posemb.resize_matrix(5, 5, rule), np.eye(5))
    pos = np.random.default_rng(0).normal(size=(1, 1 + 25, 3)).astype(np.float32)
    assert posemb.resample(pos, (5, 5), 1, rule) is pos


@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_corner_interpolates_between_corners(old, new):
    values = np.random.default_rng(0).normal(size=old)
    at = [i * (old - 1) / (new - 1) if new > 1 else 0.0 for i in range(new)]
    expected = np.interp(at, np.arange(old), values)
    np.testing.assert_allclose(posemb.resize_matrix(old, new, 'corner') @ values, expected, atol=1e-6)


@pytest.mark.parametrize(
    ('rule', 'method', 'antialias'),
    [('linear', 'linear', False), ('linear_antialias', 'linear', True), ('cubic_antialias', 'cubic', True)],
)
@pytest.mark.parametrize(('old', 'new'), [(4, 6), (7, 5)])
def test_image_resize_rules(rule, method, antialias, old, new):
    pos = np.random.default_rng(0).normal(size=(1, 2 + old * old, 3)).astype(np.float32)
    grid = pos[0, 2:].reshape(old, old, 3)
    expected = jax.image.resize(grid, (new, new, 3), method, antialias=antialias, precision='highest')
    ours = posemb.resample(pos, (new, new), 2, rule)
    np.testing.assert_array_equal(ours[:, :2], pos[:, :2])
    np.testing.assert_allclose(ours[0, 2:].reshape(new, new, 3), expected, atol=1e-5)


@pytest.mark.parametrize(('rule', 'offset'), [('cubic', 0.0), ('cubic_offset', 0.1)])
def test_cubic_rules_tap_by_tap(rule, offset):
    old, new, a = 5, 8, -0.75
    near = lambda t: ((a + 2) * t - (a + 3)) * t * t + 1  # noqa: E731
    far = lambda t: a * (((t - 5) * t + 8) * t - 4)  # noqa: E731
    expected = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / (new + offset) - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(centre - tap)
            expected[i, min(max(tap, 0), old - 1)] += near(t) if t <= 1 else far(t)
    np.testing.assert_allclose(posemb.resize_matrix(old, new, rule), expected, atol=1e-6)


class ResampleTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters('corner', 'linear', 'cubic_antialias', 'cubic_offset')
    def test_to_a_grid_that_is_not_square(self, rule):
        pos = np.random.default_rng(0).normal(size=(1, 1 + 16, 2)).astype(np.float32)
        out = self.variant(lambda p: posemb.resample(p, (6, 3), 1, rule))(pos)
        rows, columns = posemb.resize_matrix(4, 6, rule), posemb.resize_matrix(4, 3, rule)
        expected = np.einsum('ra,abd,cb->rcd', rows, pos[0, 1:].reshape(4, 4, 2), columns)
        np.testing.assert_allclose(out[0, 1:].reshape(6, 3, 2), expected, atol=1e-5)


def test_sincos2d():
    table = posemb.sincos2d((2, 3), 8)
    assert table.shape == (1, 6, 8) and table.dtype == np.float32
    omega = np.array([1.0, 1e-4])
    for token, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        expected = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
        np.testing.assert_allclose(table[0, token], expected, atol=1e-6)


def test_bad_requests():
    with pytest.raises(UsageError, match="unknown position-embedding resampling rule 'bilinear'"):
        posemb.resize_matrix(4, 6, 'bilinear')
    with pytest.raises(UsageError, match='of 15 patches: it is not a square grid'):
        posemb.resample(np.zeros((1, 16, 2), np.float32), (3, 3), 1, 'corner')
    for width in (6, 4):
        with pytest.raises(UsageError, match=f'at least 8, got {width}'):
            posemb.sincos2d((2, 2), width)
