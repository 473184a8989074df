"""CLIP's tokens (arXiv 2103.00020): lower-case byte-pair encoding, from a vocabulary file of the user's.

The file is not in the package: OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or the `tokenizer.json` of a CLIP on the
Hugging Face hub. Text is taken as it is written: mojibake is not repaired, as OpenAI's code does by way of ftfy.
"""

import gzip
import html
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from vpt_jax.errors import UsageError

#: Tokens of a text, with the two around it.
CONTEXT = 77
_START, _END = '<|startoftext|>', '<|endoftext|>'
_MERGES = 49152 - 256 - 2  # of the file's lines, what CLIP uses
_SHORT = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_letters() -> dict[int, str]:
    """A printable character for every byte, in the order of the vocabulary: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def words(text: str) -> list[str]:
    """Runs of letters, single digits, runs of other signs, and short forms ('s, 're) by themselves; no spaces."""
    kinds = ['s' if c.isspace() else unicodedata.category(c)[0] for c in text]
    kinds = [kind if kind in 'sLN' else 'o' for kind in kinds]
    found, i = [], 0
    while i < len(text):
        end = i + 1
        if short := next((s for s in _SHORT if text.startswith(s, i)), None):
            end = i + len(short)
        elif kinds[i] in 'Lo':
            while end < len(text) and kinds[end] == kinds[i]:
                end += 1
        if kinds[i] != 's':
            found.append(text[i:end])
        i = end
    return found


class Tokenizer:
    """Texts to numbers.

    Args:
      path: the vocabulary, of either form.

    Raises:
      UsageError: no such file, or not a vocabulary.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path).expanduser()
        try:
            if path.suffix == '.json':
                model = json.loads(path.read_text())['model']
                pairs = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
                self.numbers: dict[str, int] = dict(model['vocab'])
            else:
                with gzip.open(path, 'rt', encoding='utf-8') as file:
                    lines = file.read().split('\n')[1 : _MERGES + 1]
                pairs = [tuple(line.split()) for line in lines if line.strip()]
                letters = list(byte_letters().values())
                names = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in pairs), _START, _END]
                self.numbers = {name: i for i, name in enumerate(names)}
            self.ranks = {(first, second): rank for rank, (first, second) in enumerate(pairs)}
            self.start, self.end = self.numbers[_START], self.numbers[_END]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} is no vocabulary of CLIP's (bpe_simple_vocab_16e6.txt.gz or tokenizer.json): "
                f'{type(error).__name__} {error}'
            ) from error
        self._letters, self._known = byte_letters(), dict[str, list[int]]()

    def encode(self, text: str) -> list[int]:
        """The numbers of a text, without those around it."""
        clean = unicodedata.normalize('NFC', html.unescape(html.unescape(text)))
        clean = re.sub(r'\s+', ' ', clean).strip().lower()
        return [number for word in words(clean) for number in self._of_word(word)]

    def __call__(self, texts: Sequence[str], context: int = CONTEXT) -> np.ndarray:
        """Numbers int32 [N, context]: start, text, end, zeros.

        Raises:
          UsageError: a text that is too long.
        """
        found = np.zeros((len(texts), context), np.int32)
        for row, text in zip(found, texts, strict=True):
            numbers = [self.start, *self.encode(text), self.end]
            if len(numbers) > context:
                raise UsageError(f'{text[:60]!r} has {len(numbers)} tokens, and CLIP takes {context}: shorten it')
            row[: len(numbers)] = numbers
        return found

    def _of_word(self, word: str) -> list[int]:
        if word not in self._known:
            letters = [self._letters[byte] for byte in word.encode()]
            parts = [*letters[:-1], letters[-1] + '</w>']
            while len(parts) > 1:
                ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
                best = min(ranks)
                if best == len(self.ranks):
                    break
                parts = _merged(parts, ranks, best)
            self._known[word] = [self.numbers[part] for part in parts]
        return self._known[word]


def _merged(parts: list[str], ranks: list[int], rank: int) -> list[str]:
    """All pairs of this rank joined, from the left."""
    joined, i = [], 0
    while i < len(parts):
        pair = i < len(ranks) and ranks[i] == rank
        joined.append(parts[i] + parts[i + 1] if pair else parts[i])
        i += 2 if pair else 1
    return joined
