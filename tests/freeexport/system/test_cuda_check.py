"""What doctor says of CUDA: which versions go together, and what of it is not here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from freeexport.system.installation.gpu import CudaVersions, check_cuda, cuda_rows

REQUIRES = ["numpy>=1.21.6", 'nvidia-cudnn-cu13~=9.0; extra == "cudnn"']
WHOLE = {"onnxruntime-gpu": "1.31.1", "cuda-bindings": "13.5.0", "nvidia-cudnn-cu13": "9.14"}


def versions(installed: dict[str, str], driver: int = 13000) -> CudaVersions:
    of: Callable[[str], str | None] = installed.get
    return check_cuda(of, "13.0", REQUIRES, lambda: driver)


def test_what_fits_has_no_problem() -> None:
    found = versions(WHOLE)
    assert found == CudaVersions("13.0", "9", "13.0", "13.5.0")
    assert ("onnxruntime-gpu", "built for CUDA 13.0, cuDNN 9") in cuda_rows(found)


def test_without_the_wheel_nothing_is_said() -> None:
    assert check_cuda({"cuda-bindings": "13.5.0"}.get) == CudaVersions(None)
    assert cuda_rows(CudaVersions(None)) == []


@pytest.mark.parametrize(
    ("missing", "driver", "problem"),
    [
        (None, 12040, "built for CUDA 13.0, and the driver runs up to 12.4; install a newer driver"),
        (None, 0, "no NVIDIA driver is loaded here"),
        ("cuda-bindings", 0, "needs cuda-python; pip install 'freeexport[gpu]'"),
        ("nvidia-cudnn-cu13", 13000, "cuDNN 9 is not among the packages"),
    ],
)
def test_what_does_not_fit_says_what_to_do(missing: str | None, driver: int, problem: str) -> None:
    found = versions({name: version for name, version in WHOLE.items() if name != missing}, driver)
    (said,) = found.problems
    assert problem in said
    assert ("does not fit", said) in cuda_rows(found)
