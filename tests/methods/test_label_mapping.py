"""Heads without a trained weight: classes picked from a frozen classifier, and from texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import CLIPHead, Context, LabelMapping, Stack
from vpt_jax.methods.clip_head import save_texts
from vpt_jax.methods.label_mapping import frequency_mapping
from vpt_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class Model(Network):
    classes: int = 9
    depth: int = 1

    @property
    def feature_width(self):
        return self.classes or 6


def greedy(counts, per_class):
    """The specification word by word: the largest cell, ties by the lowest flat index; then its row and, once it has
    its sources, its column are gone."""
    counts, found = counts.astype(int).copy(), [[] for _ in range(counts.shape[1])]
    for _ in range(per_class * counts.shape[1]):
        source, target = divmod(int(counts.argmax()), counts.shape[1])
        found[target].append(source)
        counts[source] = -1
        if len(found[target]) == per_class:
            counts[:, target] = -1
    return np.array([sorted(row) for row in found])


@pytest.mark.parametrize('per_class', [1, 2, 3])
def test_the_mapping_is_the_greedy_one_ties_and_zeros_included(per_class):
    rng = np.random.default_rng(per_class)
    for high in (2, 3, 50):  # ties and zeros galore, then few
        for _ in range(20):
            counts = rng.integers(0, high, (rng.integers(12, 20), 4))
            counts[:, rng.integers(4)] *= rng.integers(2)  # a class that is never seen
            ours = frequency_mapping(counts.astype(np.float32), per_class)
            np.testing.assert_array_equal(ours, greedy(counts, per_class))
            assert ours.dtype == np.int32 and len(set(ours.reshape(-1).tolist())) == ours.size


def test_independent_maxima_would_collide():
    counts = np.array([[5, 4], [1, 0], [0, 3]])
    assert counts.argmax(0).tolist() == [0, 0]
    assert frequency_mapping(counts).tolist() == [[0], [2]]
    # Nothing is left for the second class: the lowest free source.
    assert frequency_mapping(np.array([[0, 0], [7, 7], [0, 0]])).tolist() == [[1], [0]]


def test_counts_leave_padding_out_and_know_classes_that_are_missing():
    head = LabelMapping()
    state = {'mapping': jnp.zeros((4, 1), jnp.int32)}
    scores = jnp.eye(9)[jnp.array([2, 2, 5, 8])]
    labels = jnp.array([0, 0, 3, 1])  # no image of class 2
    counts = head.observe({}, scores, labels, Context(state=state, weight=jnp.array([1.0, 1, 1, 0])))['counts']
    expected = np.zeros((9, 4))
    expected[2, 0], expected[5, 3] = 2, 1
    np.testing.assert_array_equal(counts, expected)
    concluded = head.conclude(0, state, {'counts': counts})
    assert concluded['mapping'].tolist() == [[2], [0], [1], [5]]
    stack = Stack(head)
    both = stack.conclude(0, {'label_mapping': state}, {'label_mapping': {'counts': counts}})
    np.testing.assert_array_equal(both['label_mapping']['mapping'], concluded['mapping'])


def test_scores_are_those_of_the_sources():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9)), jnp.bfloat16)
    one = LabelMapping().logits({}, scores, Context(state={'mapping': jnp.array([[4], [0]])}))
    np.testing.assert_array_equal(one, scores.astype(jnp.float32)[:, jnp.array([4, 0])])
    two = LabelMapping(per_class=2).logits({}, scores, Context(state={'mapping': jnp.array([[4, 1], [0, 8]])}))
    np.testing.assert_allclose(two[:, 1], scores.astype(jnp.float32)[:, jnp.array([0, 8])].mean(1), rtol=1e-6)


def test_who_looks_when():
    epochs = range(6)
    assert [LabelMapping().observes(e) for e in epochs] == [True] * 6
    assert [LabelMapping(every=2).observes(e) for e in epochs] == [True, False] * 3
    assert [LabelMapping(mapping='frequency').observes(e) for e in epochs] == [True] + [False] * 5
    assert not any(LabelMapping(mapping=m).observes(0) for m in ('first', 'random'))
    stack = Stack(LabelMapping(mapping='frequency'))
    assert stack.observes(0) and not stack.observes(1)
    state = {'label_mapping': {'mapping': jnp.ones((1, 1), jnp.int32)}}
    assert stack.conclude(1, state, {'label_mapping': {'counts': np.zeros((9, 1))}}) == state


def test_mappings_before_the_first_look():
    state = LabelMapping(mapping='first').init_state(Model(), 4)
    assert state['mapping'].tolist() == [[0], [1], [2], [3]] and set(state) == {'mapping'}
    one, other = (
        LabelMapping(mapping='random', per_class=2).init_state(Model(), 4, jax.random.key(k))['mapping'] for k in (0, 1)
    )
    assert one.shape == (4, 2) and len(set(one.reshape(-1).tolist())) == 8 and one.max() < 9
    assert (one != other).any()
    with pytest.raises(UsageError, match='5 classes with per_class=2 need 10 classes of the frozen classifier, which'):
        LabelMapping(per_class=2).init_state(Model(), 5)


def test_a_classifier_that_is_given(tmp_path):
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(6, 7)), rng.normal(size=7)
    path = str(tmp_path / 'head.npz')
    np.savez(path, kernel=kernel, bias=bias)
    head = LabelMapping(mapping='first', classifier=path)
    head.check(Model(classes=0))
    assert not head.needs_classifier and LabelMapping().needs_classifier and Stack(LabelMapping()).needs_classifier
    state = head.init_state(Model(classes=0), 3)
    features = rng.normal(size=(2, 6)).astype(np.float32)
    scores = head.logits({}, jnp.asarray(features), Context(state=state))
    np.testing.assert_allclose(scores, (features @ kernel + bias)[:, :3], rtol=1e-5)
    with pytest.raises(UsageError, match=r'a kernel \[9, S\] and a bias \[S\], not \[6, 7\] and \[7\]'):
        head.init_state(Model(), 3)
    with pytest.raises(UsageError, match=r'with the arrays kernel and bias, and .*nowhere\.npz is none'):
        LabelMapping(classifier=str(tmp_path / 'nowhere.npz')).init_state(Model(classes=0), 3)


def test_a_network_without_a_classifier_is_refused():
    with pytest.raises(UsageError, match='this Model has none: load a backbone with own_classifier=True'):
        LabelMapping().check(Model(classes=0))
    with pytest.raises(UsageError, match='classifier is for features'):
        LabelMapping(classifier='head.npz').check(Model())
    LabelMapping().check(Model())


@pytest.fixture
def texts(tmp_path):
    features = np.random.default_rng(3).normal(size=(6, 6))
    save_texts(tmp_path / 'texts.npz', features, 1.5)
    return features, str(tmp_path / 'texts.npz')


def test_clip_scores_are_scaled_cosines(texts):
    features, path = texts
    head, model = CLIPHead(texts=path), Model(classes=0)
    head.check(model)
    images = np.random.default_rng(4).normal(size=(2, 6))
    scores = head.logits({}, jnp.asarray(images, jnp.float32), Context(state=head.init_state(model, 3)))
    cosines = images @ features.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(scores, np.exp(1.5) * cosines[:, :3], rtol=1e-5)
    # Two templates of three classes: each class takes the text that its images are nearest to.
    picking = CLIPHead(texts=path, mapping='iterative')
    state = picking.init_state(model, 3)
    sums = picking.observe({}, jnp.asarray(features, jnp.float32)[3:], jnp.arange(3), Context(state=state))
    assert picking.conclude(0, state, sums)['mapping'].tolist() == [[3], [4], [5]]


def test_clip_without_texts(texts):
    with pytest.raises(UsageError, match='needs features of texts'):
        CLIPHead().check(Model(classes=0))
    with pytest.raises(UsageError, match=r'needs text_features \[S, 9\] and one logit_scale, not \[6, 6\] and \[\]'):
        CLIPHead(texts=texts[1]).init_state(Model(), 3)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'mapping': 'ilm'}, "unknown mapping of labels 'ilm'"),
    ({'every': 0}, 'every must be >= 1, got 0'),
    ({'per_class': 0}, 'per_class must be >= 1, got 0'),
])  # fmt: skip
def test_bad_settings(settings, message):
    for head in (LabelMapping, CLIPHead):
        with pytest.raises(UsageError, match=message):
            head(**settings)
