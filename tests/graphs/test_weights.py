from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries

from graphs.errors import GraphError
from graphs.weights import BIG, CACHE_LINE, PAGE, WeightFile

FLOAT, HALF, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64


def never() -> np.ndarray:
    raise AssertionError("produced a second time")


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def giving(value: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: value


def read(weights: WeightFile, tensor: ir.ExternalTensor) -> np.ndarray:
    """The tensor as it stands in the file."""
    weights._file.flush()
    assert tensor.offset is not None
    assert tensor.length is not None
    data = weights.path.read_bytes()[tensor.offset : tensor.offset + tensor.length]
    return np.frombuffer(data, tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def test_weight_of_a_name_is_produced_once(weights: WeightFile) -> None:
    tensor = weights.add("a", FLOAT, giving(array(3, 5)))
    assert weights.add("a", FLOAT, never) is tensor


def test_equal_bytes_are_written_once_whatever_their_shape_and_type(weights: WeightFile) -> None:
    values = np.arange(1, 25, dtype=np.float32)
    tensors = [weights.add(f"z{shape}", FLOAT, giving(values.reshape(shape))) for shape in ((4, 6), (6, 4))]
    tensors.append(weights.add("integers", INT64, giving(values.view(np.int64))))
    assert len({tensor.offset for tensor in tensors}) == 1
    for tensor, shape in zip(tensors, ((4, 6), (6, 4), (12,)), strict=True):
        assert read(weights, tensor).shape == shape
        assert read(weights, tensor).tobytes() == values.tobytes()
    assert weights.bytes == values.nbytes
    other = weights.add("other", FLOAT, giving(array(30, 5)))
    np.testing.assert_array_equal(read(weights, other), array(30, 5))
    assert weights.bytes == values.nbytes + 600
    assert other.location == "weights.data"


@tries(20)
@given(sizes=st.lists(st.integers(1, 300) | st.just(BIG // 4), min_size=1, max_size=8))
def test_tensors_are_aligned_and_do_not_overlap(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    with WeightFile(tmp_path_factory.mktemp("weights") / "weights.data") as weights:
        end = 0
        for index, size in enumerate(sizes):
            tensor = weights.add(str(index), FLOAT, giving(array(size, seed=index)))
            assert tensor.offset is not None
            assert tensor.offset >= end
            assert tensor.offset % (PAGE if size * 4 >= BIG else CACHE_LINE) == 0
            end = tensor.offset + size * 4


@pytest.mark.parametrize("value", [7e4, -1e30, np.finfo(np.float32).max])
def test_weight_beyond_fp16_is_refused(value: float, weights: WeightFile) -> None:
    large = np.array([1.0, value], np.float32)
    with pytest.raises(GraphError, match=r"weight layer\.weight.* reaches .*--precision fp32"):
        weights.add("layer.weight", HALF, giving(large))
    weights.add("layer.weight", FLOAT, giving(large))
