"""Our own operators where they cannot be had: the line that a session ends with; and who chooses instructions."""

import ctypes
import logging
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from checkpoints import BY_NAME
from kernel_cases import INSTRUCTIONS, here

import runtime.engines.kernels
from runtime import Session
from runtime.bundle.bundle import sha256_of
from runtime.bundle.manifest import MANIFEST, File, Manifest
from runtime.engines.kernels import LIBRARY, VERSION, instructions, missing, register
from runtime.errors import EngineError, FreeExportError

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

CASE = BY_NAME["llama-tied"]


@pytest.fixture
def copied(bundle, tmp_path):
    """A bundle that may be changed; its folder."""
    return shutil.copytree(bundle(CASE, precision="int8", kernels="freeexport"), tmp_path / "bundle")


def list_as_right(path, name=None, **changes):
    """In the manifest, a file as it is now, or another value."""
    manifest = Manifest.from_json((path / MANIFEST).read_text())
    if name is not None:
        file = path / name
        changes["files"] = {**manifest.files, name: File(file.stat().st_size, sha256_of(file))}
    (path / MANIFEST).write_text(replace(manifest, **changes).to_json())


def refusal(path):
    """The one line that opening a session ends with."""
    with pytest.raises(FreeExportError) as raised:
        Session(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_truncated_weights_are_refused_even_if_the_manifest_lists_their_size(copied):
    weights = copied / "weights.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    assert "weights.data" in refusal(copied)
    for left in (len(content) - 4096, 100, 0):
        weights.write_bytes(content[:left])
        list_as_right(copied, "weights.data")
        assert "cannot be loaded" in refusal(copied)


def test_operator_missing_from_the_library_is_refused(copied):
    for graph in copied.glob("*.onnx"):
        model = onnx.load(graph, load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "PackedLinear":
                node.op_type = "PackedQuadratic"
        onnx.save(model, graph)
        list_as_right(copied, graph.name)
    assert "PackedQuadratic" in (message := refusal(copied))
    assert message.endswith("; upgrade freeexport")


def test_later_operator_version_and_missing_library_are_refused(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.engines.kernels, "LIBRARY", tmp_path / "missing.so")
    assert "are not built here" in refusal(copied)
    monkeypatch.undo()
    list_as_right(copied, kernels=99)
    assert "version 99 of freeexport's kernels is needed" in refusal(copied)


def test_earlier_operator_version_opens_only_bundles_without_16_bit_activations(bundle, copied, monkeypatch):
    monkeypatch.setattr(runtime.engines.kernels, "VERSION", 9)
    Session(copied).close()
    wide = bundle(CASE, precision="int8", kernels="freeexport", activations="int16")
    assert "version 10 of freeexport's kernels is needed, 9 is here; upgrade freeexport" in refusal(wide)


def test_library_of_another_architecture_or_version_is_named(tmp_path, monkeypatch):
    other = bytearray(LIBRARY.read_bytes())
    other[18:20] = (0xF3 if platform.machine() != "riscv64" else 0x3E).to_bytes(2, "little")  # the ELF header's machine
    (tmp_path / "other.so").write_bytes(other)
    monkeypatch.setattr(runtime.engines.kernels, "LIBRARY", tmp_path / "other.so")
    assert "cannot be loaded" in missing()
    assert (Path(runtime.engines.kernels.__file__).parent / "source" / "version.h").read_text().split()[-1] == str(
        VERSION
    )
    if shutil.which("g++"):
        text = 'extern "C" int freeexport_kernels_version() { return 99; } extern "C" void freeexport_instructions() {}'
        path = tmp_path / "later.so"
        subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=text, text=True, check=True)
        monkeypatch.setattr(runtime.engines.kernels, "LIBRARY", path)
        assert f"has version 99 of the kernels, not {VERSION}" in missing()
        path = tmp_path / "older.so"  # of this version, before it said how prompts are read
        source = text.replace("99", str(VERSION))
        subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source, text=True, check=True)
        monkeypatch.setattr(runtime.engines.kernels, "LIBRARY", path)
        assert "was built from older sources; install freeexport again" in missing()


@pytest.mark.parametrize("name", ["scalar", *INSTRUCTIONS, "mmx"])
def test_environment_variable_selects_the_instruction_set(name, monkeypatch):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    if name != "mmx" and here(name):
        assert instructions() == name
    else:
        with pytest.raises(EngineError, match="choose scalar, avx2" if name == "mmx" else "this processor lacks"):
            instructions()


def test_missing_vector_instructions_are_warned_about(copied, monkeypatch, caplog):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", "scalar")
    runtime.engines.kernels._warned.clear()
    with caplog.at_level(logging.WARNING, "runtime.engines.kernels"), Session(copied) as session:
        assert session.generate("Hello", max_new_tokens=3).token_ids
    (record,) = (record for record in caplog.records if record.name == "runtime.engines.kernels")
    assert record.message.startswith("FREEEXPORT_INSTRUCTIONS is scalar: freeexport's kernels run without vector")


class OldRuntime:
    """ONNX Runtime's C API, as a runtime of version 1.17 offers it: nothing of version 18."""

    def __init__(self):
        created = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        self.message = None
        self.create_status = created(self.created)
        self.api = (ctypes.c_void_p * 1)(ctypes.cast(self.create_status, ctypes.c_void_p))
        self.get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(self.api_of)
        self.get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(self.version))
        self.version = ctypes.create_string_buffer(b"1.17.3")
        functions = (ctypes.cast(function, ctypes.c_void_p) for function in (self.get_api, self.get_version))
        self.base = (ctypes.c_void_p * 2)(*functions)

    def created(self, code, message):
        self.message = message.decode()
        return 1

    def api_of(self, version):
        return ctypes.addressof(self.api) if version < 18 else None


def test_too_old_onnxruntime_is_refused():
    old = OldRuntime()
    register_operators = ctypes.CDLL(str(runtime.engines.kernels.LIBRARY)).RegisterCustomOps
    register_operators.restype = ctypes.c_void_p
    assert register_operators(None, ctypes.byref(old.base)) == 1
    assert old.message == "freeexport: ONNX Runtime 1.17.3 is too old for these kernels; install 1.18 or later"


def test_library_errors_to_onnxruntime_are_one_line(monkeypatch):
    class Options:
        def register_custom_ops_library(self, path):
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : freeexport: it is too old\nand so on")

    with pytest.raises(EngineError, match=r"^it is too old$"):
        register(Options())
    register(ort.SessionOptions())
