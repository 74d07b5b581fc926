"""Shared fixtures. Random checkpoints are written, converted and loaded once per session."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, LONG, TEXTS, Bundles, Case, Open, load
from hypothesis import settings
from profiles import REPEATED

from freeexport.system.child import ChildError
from runtime.errors import FreeExportError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny, so waiting for a second thread takes longer than one thread alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.load_profile(REPEATED)


def pytest_collection_finish() -> None:
    """Exempt imported modules and tests from garbage collection, which transformers runs at every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sampling without a seed deterministic."""
    monkeypatch.setattr("secrets.randbits", random.Random(0).getrandbits)


@pytest.fixture(scope="session", autouse=True)
def conversion_in_this_process() -> Iterator[None]:
    """Verify and time new bundles in the test process, and time them only briefly instead of for 12 seconds.

    Each child process would import torch and transformers again. Children are tested in test_convert.py and
    costs/test_measured.py.
    """
    from freeexport.calibrate import calibrate
    from freeexport.commands import verify
    from freeexport.costs import measured
    from freeexport.verification import verification

    def run_here(module: str, *arguments: str, variables: Any = None) -> str:
        output = io.StringIO()
        try:
            with redirect_stdout(output):
                if module == measured.__name__:
                    measured.main(list(arguments))
                else:
                    assert (module, arguments[0]) == ("freeexport", "verify")
                    verify.command.main(list(arguments[1:]), standalone_mode=False)
        except FreeExportError as error:
            raise ChildError(str(error)) from None
        return output.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        for module in (measured, verification):
            patch.setattr(module, "run_child", run_here)
        for module in (measured, calibrate):
            patch.setattr(module, "measured_costs", partial(measured.measured_costs, rounds=1, seconds=0.3))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Write the checkpoint of a case once, and return its directory. Tests must not write into it."""
    written: dict[str, Path] = {}

    def build(case: Case) -> Path:
        if case.name not in written:
            directory = tmp_path_factory.mktemp("checkpoint") / case.name
            case.build(directory)
            written[case.name] = directory
        return written[case.name]

    return build


@pytest.fixture(scope="session")
def source_model(checkpoint: Callable[[Case], Path]) -> Callable[[Case], Any]:
    """Load the Hugging Face model of a case once, float32, in evaluation mode. Tests must not change it."""
    loaded: dict[str, Any] = {}

    def model(case: Case) -> Any:
        if case.name not in loaded:
            loaded[case.name] = (case.model or load)(checkpoint(case))
        return loaded[case.name]

    return model


@pytest.fixture(scope="session")
def bundle(checkpoint: Callable[[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Convert a case once per exit layer and options, without verification and measurement."""
    from freeexport.conversion.convert import convert
    from freeexport.conversion.convert_options import ConvertOptions

    converted: dict[Any, Path] = {}

    def build(case: Case, exit_layer: int = 1, **options: Any) -> Path:
        key = (case.name, exit_layer, *sorted(options.items()))
        if key not in converted:
            out = tmp_path_factory.mktemp("bundle") / case.name
            defaults = {"capacity": 128, "encoder_capacity": 128, "verify": "none", "measure": False}
            convert(str(checkpoint(case)), out, ConvertOptions(exit_layer, **{**defaults, **options}))
            converted[key] = out
        return converted[key]

    return build


@pytest.fixture
def copied(bundle: Bundles, tmp_path: Path) -> Bundles:
    """Copy the bundle of a case, or of a case's name, for a test that changes it."""

    def copy(case: Case | str = "llama-tied", exit_layer: int = 1, **options: Any) -> Path:
        case = BY_NAME[case] if isinstance(case, str) else case
        place = tmp_path / "copies" / str(len(list(tmp_path.glob("copies/*"))))
        return Path(shutil.copytree(bundle(case, exit_layer, **options), place / case.name))

    return copy


@pytest.fixture(scope="session")
def chat(bundle: Bundles) -> Path:
    """Return the bundle of a decoder with a chat template and capacity for long answers."""
    return bundle(LONG, 1, capacity=4096)


@pytest.fixture(scope="session")
def t5(bundle: Bundles) -> Path:
    """Return the bundle of an encoder-decoder."""
    return bundle(BY_NAME["t5-relu-tied"], 1)


@pytest.fixture
def open_session(bundle: Bundles) -> Iterator[Open]:
    """Open sessions of a case with one thread and one slot. They are closed after the test."""
    from runtime import Session

    with ExitStack() as opened:

        def open_(
            name: str | Case = "llama-tied", exit_layer: int = 1, convert: dict[str, Any] | None = None, **options: Any
        ) -> Session:
            case = BY_NAME[name] if isinstance(name, str) else name
            path = bundle(case, exit_layer, **(convert or {}))
            return opened.enter_context(Session(path, **{"threads": 1, "slots": 1, **options}))

        yield open_


@pytest.fixture(scope="module")
def sessions(bundle: Bundles) -> Iterator[Callable[[str], Any]]:
    """Open one session per case and test file, with the exit after layer 2."""
    from runtime import Session

    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(Session(bundle(BY_NAME[name], 2), threads=1, slots=4)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write TEXTS as JSON lines."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"input": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Any]:
    """Open an empty weight file of a bundle."""
    from graphs.weights import WeightFile

    with WeightFile(tmp_path / "weights.data") as file:
        yield file


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Limit torch to one thread. The models are too small to gain from more, above all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Return the 20 prompts for SmolLM2. They were fixed before any result and never change."""
    return (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
