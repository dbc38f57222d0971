"""The vocabulary of the shapes world as a real `CLIPTokenizer` and `T5Tokenizer`.

Each word of the grammar is one token. Letters serve all other words.
"""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from .models import MAX_LENGTH
from .prompts import all_scenes

if TYPE_CHECKING:
    from typing import Any

    from transformers import CLIPTokenizer, T5Tokenizer

_END_OF_WORD = "</w>"


def _byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Train byte-pair encoding until every word is a single token.

    Replaying the merges in order is then exact.
    """
    pieces = {word: [*word[:-1], word[-1] + _END_OF_WORD] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in pieces.values()):
        counts = Counter(pair for parts in pieces.values() for pair in pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            pieces[word] = merged
    return merges


_LETTERS = (*string.ascii_lowercase, *string.digits, ",", ".", "-")


def _words() -> list[str]:
    return sorted({word for scene in all_scenes() for word in scene.prompt.split()})


def build_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer.

    Returns:
        `CLIPTokenizer`: about 150 entries, with `model_max_length` 16. A prompt of the
            grammar takes 12 or 13 tokens.
    """
    from transformers import CLIPTokenizer

    merges = _byte_pair_merges(_words())
    entries = [*_LETTERS, *(letter + _END_OF_WORD for letter in _LETTERS)]
    entries += [left + right for left, right in merges]
    entries = [*dict.fromkeys(entries), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(entries)}
    # The constructor reads pairs, though its annotation says text.
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """Build the tokenizer of the T5 encoder.

    Returns:
        `T5Tokenizer`: about 65 pieces, with `model_max_length` 16. A prompt of the
            grammar takes 11 or 12 tokens.
    """
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # A piece is the likelier, the higher its score: whole words before letters.
    words = [("\u2581" + word, -1.0) for word in _words()]
    letters = [(letter, -10.0) for letter in ("\u2581", *_LETTERS)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=MAX_LENGTH)
