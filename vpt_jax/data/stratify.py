"""Splitting labelled examples so that every part has the classes in the same proportions."""

import numpy as np

#: Share of train where a reader has to split by itself; val and test take half of the rest each.
TRAIN_SHARE = 0.8


def stratified(
    labels: np.ndarray, num_train: int, num_val: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train, val and test indices of exact sizes, every class spread over them in proportion.

    Examples are ranked at random within their class, and all of them are sorted by rank / class size; the parts are
    cut from that order. The first of each class comes before every second one, so train has every class as soon as
    it is as large as the number of classes.

    Args:
      labels: int [N].
      num_train: size of the first part.
      num_val: size of the second part; the third takes what is left.
      seed: >= 0.

    Returns:
      Three ascending int64 arrays, disjoint, together 0..N-1.
    """
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind='stable')]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, counts)
    share = np.empty(len(labels))
    share[by_class] = rank / np.repeat(counts, counts)
    # Sorting the shuffled order, not the file's, breaks ties between classes at random.
    order = shuffled[np.argsort(share[shuffled], kind='stable')]
    train, val, test = np.split(order, [num_train, num_train + num_val])
    return np.sort(train), np.sort(val), np.sort(test)


def eight_one_one(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`stratified` into 80 % train, 10 % val, 10 % test; train keeps at least one example of each class.

    What train leaves is halved, an odd example going to test, so that a tiny set has a test split before a val split.

    Args:
      labels: int [N].
      seed: >= 0.

    Returns:
      Three ascending int64 arrays, disjoint, together 0..N-1.
    """
    count = len(labels)
    num_train = max(round(TRAIN_SHARE * count), len(np.unique(labels)))
    return stratified(labels, num_train, (count - num_train) // 2, seed)
