"""The vocabulary of the shapes world as a real `CLIPTokenizer`.

Each word of the grammar is one token. Letters serve all other words.
"""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from .prompts import all_scenes

if TYPE_CHECKING:
    from typing import Any

from transformers import CLIPTokenizer

MAX_LENGTH = 16
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


def build_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer.

    Returns:
        `CLIPTokenizer`: about 150 entries, with `model_max_length` 16. A prompt of the
            grammar takes 12 or 13 tokens.
    """
    from transformers import CLIPTokenizer

    words = sorted({word for scene in all_scenes() for word in scene.prompt.split()})
    letters = [*string.ascii_lowercase, *string.digits, ",", ".", "-"]
    merges = _byte_pair_merges(words)
    entries = letters + [letter + _END_OF_WORD for letter in letters]
    entries += [left + right for left, right in merges]
    entries = [*dict.fromkeys(entries), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(entries)}
    # The constructor reads pairs, though its annotation says text.
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_LENGTH)
