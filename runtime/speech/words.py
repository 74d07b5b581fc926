"""Words of a transcript and their times, from the weights of cross-attention.

The weights of Whisper's alignment heads are normalized, filtered and averaged. Dynamic time warping
then finds the path through tokens and positions with the largest sum, as in OpenAI's code.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from runtime.result import Word
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer

FILTER = 7  # width of the median filter, in positions
# Languages that are written without spaces between words. What a token adds is a word of theirs.
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
SENTENCE_ENDS = (".", "。", "!", "！", "?", "？")
# A word beside a pause is at most twice as long as the median word, of which at most this many
# seconds count.
LONGEST_MEDIAN = 0.7


class Span(NamedTuple):
    """Tokens of a word.

    Attributes:
        text: The text, with a leading space and punctuation.
        first: The first token that is not punctuation.
        end: The token after the last one that is not punctuation.
    """

    text: str
    first: int
    end: int


def token_starts(weights: np.ndarray) -> np.ndarray:
    """Return the position at which each token begins, int64 [n].

    Args:
        weights: Weights of cross-attention, float [heads, n, positions], after their softmax.
    """
    spread = weights.std(axis=1, keepdims=True)
    normed = (weights - weights.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-20)
    reach = FILTER // 2
    matrix = np.zeros(weights.shape[1:])
    for head in normed:
        if head.shape[1] > reach:
            padded = np.pad(head, ((0, 0), (reach, reach)), mode="reflect")
            windows = np.lib.stride_tricks.sliding_window_view(padded, FILTER, axis=1)
            head = np.partition(windows, reach, axis=-1)[..., reach]
        matrix += head
    return first_columns(-matrix / len(weights))


def first_columns(costs: np.ndarray) -> np.ndarray:
    """Return the first column of each row on the cheapest path through `costs` float [n, m].

    The path leads from the first to the last entry, and each step to the next row, the next column
    or both (dynamic time warping). Sums are computed along anti-diagonals. Returns int64 [n].
    """
    rows, columns = costs.shape
    steps = np.zeros((rows + columns + 1, rows + 1), np.int8)  # 0: both, 1: row, 2: column
    # Cheapest sums of the last two anti-diagonals by row. Row 0 and column 0 surround the entries.
    older = np.full(rows + 1, np.inf)
    last = np.full(rows + 1, np.inf)
    older[0] = 0.0
    for diagonal in range(2, rows + columns + 1):
        low = max(1, diagonal - columns)
        high = min(rows, diagonal - 1) + 1
        row = np.arange(low, high)
        both = older[low - 1 : high - 1]
        above = last[low - 1 : high - 1]
        left = last[low:high]
        step = np.where(above < both, 1, 0)
        step[left <= np.minimum(both, above)] = 2
        sums = np.full(rows + 1, np.inf)
        sums[low:high] = costs[row - 1, diagonal - row - 1] + np.choose(step, (both, above, left))
        steps[diagonal, low:high] = step
        older = last
        last = sums
    first = np.zeros(rows, np.int64)
    row = rows
    column = columns
    while row > 0 and column > 0:
        first[row - 1] = column - 1
        step = steps[row + column, row]
        row -= step != 2
        column -= step != 1
    return first


def spans_of(tokens: Sequence[int], tokenizer: Tokenizer, language: str) -> list[Span]:
    """Split the tokens of a text into words.

    Words begin at spaces, or with each character in languages without spaces. Punctuation belongs
    to a word, but not to its time, which a pause would prolong.
    """
    spaced = language not in WITHOUT_SPACES
    spans = list[Span]()
    speaks = False  # the last word has more than punctuation
    for text, first, end in _pieces(tokens, tokenizer):
        marks = all(unicodedata.category(letter)[0] == "P" or letter.isspace() for letter in text)
        if not spans or (speaks and (text.startswith(" ") if spaced else not marks)):
            spans.append(Span(text, first, end))
            speaks = not marks
            continue
        span = spans[-1]
        spans[-1] = Span(
            span.text + text,
            span.first if speaks or marks else first,
            span.end if speaks and marks else end,
        )
        speaks = speaks or not marks
    return spans


def _pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, int, int]]:
    """Return text, first token and end of every group of tokens that has whole characters."""
    pieces = list[tuple[str, int, int]]()
    detokenizer = Detokenizer(tokenizer)
    first = 0
    for end, token in enumerate(tokens, 1):
        if text := detokenizer.push(token):
            pieces.append((text, first, end))
            first = end
    if rest := detokenizer.finish():
        pieces.append((rest, first, len(tokens)))
    return pieces


def timed(spans: Sequence[Span], seconds: np.ndarray, probabilities: np.ndarray) -> list[Word]:
    """Return the words of a window with their times.

    Args:
        spans: Tokens of the words, in order.
        seconds: Begin of each token, and the end of the last, float [n + 1].
        probabilities: Probability of each token, float [n].
    """
    words = [
        Word(
            span.text,
            float(seconds[span.first]),
            float(seconds[span.end]),
            float(probabilities[span.first : span.end].mean()),
        )
        for span in spans
    ]
    lengths = [word.end - word.start for word in words if word.end > word.start]
    longest = 2 * min(LONGEST_MEDIAN, float(np.median(lengths))) if lengths else 0.0
    paused = True  # a pause may precede the word
    for place, word in enumerate(words):
        ends = word.text.rstrip().endswith(SENTENCE_ENDS)
        if word.end - word.start > longest:
            if ends:
                word = replace(word, end=word.start + longest)
            elif paused:
                word = replace(word, start=word.end - longest)
        words[place] = replace(word, start=round(word.start, 2), end=round(word.end, 2))
        paused = ends
    return words
