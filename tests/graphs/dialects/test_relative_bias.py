from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from graphs.description import RelativeBias
from graphs.dialects.base import buckets, by_distance

# (buckets, max_distance): T5 and its kin, the test checkpoints, and ones whose logarithms fall on bucket edges.
SIZES = [(32, 128), (16, 40), (32, 64), (8, 16), (64, 256)]
REACH = 400


def bias_of(sizes: tuple[int, int], bidirectional: bool) -> RelativeBias:
    return RelativeBias("table", *sizes, bidirectional=bidirectional)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_buckets_are_those_of_transformers(sizes: tuple[int, int], bidirectional: bool) -> None:
    distance = np.arange(-REACH, REACH + 1)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distance), bidirectional, *sizes)
    np.testing.assert_array_equal(buckets(distance, bias_of(sizes, bidirectional)), theirs.numpy())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_buckets_do_not_change_beyond_the_longest_distance(sizes: tuple[int, int], bidirectional: bool) -> None:
    bias, longest = bias_of(sizes, bidirectional), sizes[1]
    beyond = np.arange(longest, REACH)
    assert len(set(buckets(-beyond, bias))) == 1
    assert len(set(buckets(beyond, bias))) == 1


def test_the_causal_table_has_a_row_for_each_distance_back() -> None:
    bias = bias_of((16, 40), False)
    table = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    expanded = by_distance(table, bias)
    assert expanded.shape == (41, 3)
    for distance in range(41):
        np.testing.assert_array_equal(expanded[distance], table[buckets(np.array(-distance), bias)])


def test_the_bidirectional_table_has_its_middle_at_distance_zero() -> None:
    bias = bias_of((16, 40), True)
    table = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    expanded = by_distance(table, bias)
    assert expanded.shape == (81, 3)
    for distance in range(-40, 41):
        np.testing.assert_array_equal(expanded[40 + distance], table[buckets(np.array(distance), bias)])
    assert not np.array_equal(expanded[39], expanded[41])
