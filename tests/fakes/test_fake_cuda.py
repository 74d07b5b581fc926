"""The fake of CUDA has the names, arguments and numbers of cuda-python."""

from __future__ import annotations

import inspect
from enum import EnumMeta

import pytest
from fake_cuda import FakeCuda

real = pytest.importorskip("cuda.bindings.runtime")


def test_fake_has_the_names_and_signatures_of_cuda_python() -> None:
    found = {name: value for name, value in vars(FakeCuda).items() if name.startswith("cuda")}
    assert len(found) > 30
    for name, value in found.items():
        theirs = getattr(real, name)
        if isinstance(value, EnumMeta):
            assert all(int(getattr(theirs, member.name)) == int(member) for member in value)  # type: ignore[call-overload]
        elif callable(value):
            assert list(inspect.signature(value).parameters)[1:] == list(inspect.signature(theirs).parameters), name
        else:
            assert int(theirs) == value
    assert {"major", "minor"} <= set(dir(real.cudaDeviceProp))
