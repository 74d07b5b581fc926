"""`convert --quantization-data`: what each weight was rounded for, what it gains on other text, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import BY_NAME, Bundles, Case, load
from click.testing import Result
from command_line import error, invoke

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.conversion import rounding_data
from freeexport.conversion.convert_options import ConvertOptions, engine_options
from freeexport.conversion.rounding_data import RoundedWeights, round_for_text
from freeexport.verification.divergence import predictions_on, quality_of
from graphs.engine_options import EngineOptions
from graphs.families import describe
from graphs.quantization.inputs import round_4_bits_for
from graphs.quantization.rounding import IntegerScheme, Rounded, dequantize
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Kernels

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-relu-tied"]
EXIT_LAYER = 2
each = pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
Checkpoint = Callable[[Case], Path]


def lines(path: Path, first: int, count: int) -> Path:
    texts = [
        {"input": f"What is {n}?", "target": f"{n} is a number, and so is {n * n}."}
        for n in range(first, first + count)
    ]
    path.write_text("\n".join(map(json.dumps, texts)))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lines(tmp_path_factory.mktemp("text") / "rounding.jsonl", 0, 40)


def engines(case: Case, model: Path, **options: Any) -> EngineOptions:
    checkpoint = open_checkpoint(str(model))
    wanted = ConvertOptions(EXIT_LAYER, capacity=128, **{"kernels": "onnxruntime", **options})
    return engine_options(describe(checkpoint.config, checkpoint), wanted, EXIT_LAYER)


def rounded_for(case: Case, model: Path, text: Path, **options: Any) -> RoundedWeights:
    checkpoint = open_checkpoint(str(model))
    chosen = engines(case, model, **{"precision": "int4", **options})
    return round_for_text(checkpoint, describe(checkpoint.config, checkpoint), chosen, text)


@pytest.mark.parametrize(("case", "kernels"), [(LLAMA, "freeexport"), (T5, "onnxruntime")])
def test_rounding_for_data_loses_less_quality_on_other_text(
    case: Case, kernels: Kernels, text: Path, bundle: Bundles, source_model: Callable[[Case], Any], tmp_path: Path
) -> None:
    other = lines(tmp_path / "other.jsonl", 100, 10)
    plain, ours = (
        quality_of(predictions_on(Bundle.open(path), source_model(case), other), "int4")
        for path in (
            bundle(case, EXIT_LAYER, precision="int4", kernels=kernels),
            bundle(case, EXIT_LAYER, precision="int4", kernels=kernels, rounding_data=text),
        )
    )
    assert ours.passed
    assert 1e-3 < ours.divergence < 0.9 * plain.divergence
    assert ours.agreement > plain.agreement


@each
def test_each_layer_is_fitted_to_the_outputs_of_the_rounded_layers_before_it(
    case: Case, text: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights of a layer, from the moments of whole passes of transformers' model with all before it rounded."""
    read: list[tuple[np.ndarray, np.ndarray]] = []

    def noted(weight: np.ndarray, moments: np.ndarray, *rest: Any) -> Rounded:
        read.append((weight.copy(), moments.copy()))
        return round_4_bits_for(weight, moments, *rest)

    monkeypatch.setattr(rounding_data, "round_4_bits_for", noted)
    texts: list[Any] = []
    forward = rounding_data._forward
    monkeypatch.setattr(
        rounding_data, "_forward", lambda model, example: (texts.append(example), forward(model, example))
    )
    found = rounded_for(case, checkpoint(case), text).weights

    model, given = load(checkpoint(case)), dict(zip(found, read, strict=True))
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    for _, names in groupby(found, key=layer_of):
        members = {name: modules[name] for name in names}
        sums = moments_of(model, members, texts)
        for name, module in members.items():
            weight, moments = given[name]
            np.testing.assert_array_equal(weight, module.weight.detach().numpy())
            np.testing.assert_allclose(moments, sums[name], atol=2e-4 * np.diag(sums[name]).max())
        with torch.no_grad():
            for name, module in members.items():
                module.weight.copy_(torch.from_numpy(dequantize(found[name])[:, : module.in_features]))


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[:3])


def moments_of(model: Any, modules: dict[str, Any], texts: list[Any]) -> dict[str, np.ndarray]:
    """By whole passes of transformers' model, each linear layer's inputs apart."""
    sums = {name: np.zeros((module.in_features, module.in_features)) for name, module in modules.items()}

    def add(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, inputs: Any) -> None:
            rows = inputs[0][0].numpy().astype(np.float64)
            sums[name] += rows.T @ rows

        return hook

    hooks = [module.register_forward_pre_hook(add(name)) for name, module in modules.items()]
    with torch.no_grad():
        for example in texts:
            prompt, target = (torch.tensor(ids.tolist())[None] for ids in (example.prompt, example.target))
            if model.config.is_encoder_decoder:
                model(input_ids=prompt, labels=target)
            else:
                model(torch.cat([prompt, target], 1))
    for hook in hooks:
        hook.remove()
    return sums


@each
def test_only_4_bit_decoder_weights_are_fitted(case: Case, text: Path, checkpoint: Checkpoint) -> None:
    model = load(checkpoint(case))
    inside = "decoder.block." if case is T5 else "model.layers."
    linear = {
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and inside in name
    }
    higher = {name for name in linear if name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))}
    shallow = {name for name in linear - higher if int(name.split(".")[2]) < EXIT_LAYER}
    head = "shared.weight" if case is T5 else "model.embed_tokens.weight"
    for options, wanted in (
        ({"precision": "int4"}, linear - higher),
        ({"precision": "mixed"}, shallow),
        ({"precision": "int8", "head": "int4"}, {head}),
    ):
        assert set(rounded_for(case, checkpoint(case), text, **options).weights) == wanted


def test_shared_value_projections_in_8_bits_are_not_fitted(text: Path, checkpoint: Checkpoint) -> None:
    model = checkpoint(case := BY_NAME["mistral-window"])
    theirs, ours = (set(rounded_for(case, model, text, kernels=each).weights) for each in ("onnxruntime", "freeexport"))
    layers = range(open_checkpoint(str(model)).config["num_hidden_layers"])
    assert theirs - ours == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in layers}
    assert ours < theirs


def test_bundle_contains_the_fitted_weights(text: Path, bundle: Bundles, checkpoint: Checkpoint) -> None:
    """Also where query, key and value are one product."""
    path = bundle(LLAMA, EXIT_LAYER, precision="int4", rounding_data=text, kernels="onnxruntime")
    found = rounded_for(LLAMA, checkpoint(LLAMA), text).weights
    read: set[str] = set()
    for engine in ("shallow", "deep"):
        model = ir.load(path / f"{engine}.onnx")
        for name, value in model.graph.initializers.items():
            parts, _, kind = name.partition(".int4.data")
            if kind:
                assert value.const_value is not None
                expected = np.concatenate([found[part].data for part in parts.split("+")])
                np.testing.assert_array_equal(value.const_value.numpy(), expected)
                read.update(parts.split("+"))
    assert read == found.keys()


def test_manifest_and_inspect_show_the_rounding_data(text: Path, bundle: Bundles) -> None:
    opened = Bundle.open(path := bundle(LLAMA, EXIT_LAYER, precision="int4", rounding_data=text))
    assert opened.manifest.quantization is not None
    data = opened.manifest.quantization.rounding_data
    assert data is not None
    assert (data.texts, data.sha256) == (40, hashlib.sha256(text.read_bytes()).hexdigest())
    assert f"{data.tokens} tokens of 40 texts" in invoke("inspect", path).stdout
    plain = bundle(LLAMA, EXIT_LAYER, precision="int4")
    as_plain = Bundle.open(plain).manifest.quantization
    assert as_plain is not None
    assert replace(opened.manifest.quantization, rounding_data=None) == as_plain
    assert "fitted to" not in invoke("inspect", plain).stdout


def test_long_texts_are_truncated_and_later_lines_ignored(
    text: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding_data, "MAX_TOKENS", 600)
    monkeypatch.setattr(rounding_data, "LONGEST", 38)
    data = rounded_for(LLAMA, checkpoint(LLAMA), text).data
    assert 600 <= data.tokens < 638
    assert data.texts < 40


def test_hooks_are_removed_if_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(4, 4)
    hooks: list[int] = []

    def fail(*given: Any) -> None:
        hooks.append(len(layer._forward_pre_hooks))
        raise MemoryError

    monkeypatch.setattr(rounding_data, "_forward", fail)
    texts: list[Any] = [None]
    for reads in (
        lambda: rounding_data._moments([layer], fail),
        lambda: rounding_data._calls(None, [layer], texts),
    ):
        with pytest.raises(MemoryError):
            reads()
        assert not layer._forward_pre_hooks
    assert hooks == [1, 1]


def convert(model: Path, out: Path, *arguments: str) -> Result:
    fast = ("--exit-layer", "1", "--verify", "none", "--capacity", "64")
    return invoke("convert", model, out, *fast, *arguments)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no examples; give one JSON object with 'input' and 'target' a line"),
        ('{"input": "x"}\n', "line 1: 'target' is missing; give every line an input, or audio, and a target"),
        ("not JSON\n", "line 1: "),
        ('{"input": "x", "target": "y"}\n', "tokens for the decoder; rounding needs at least 512, give more lines"),
    ],
)
def test_invalid_data_gives_a_one_line_error(content: str, said: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    out = tmp_path / "out"
    line = error(convert(checkpoint(LLAMA), out, "--precision", "int4", "--quantization-data", str(path)))
    assert said in line
    assert str(path) in line
    assert not out.exists()


@pytest.mark.parametrize("options", [("--precision", "int8"), ("--precision", "int4", "--target", "cuda"), ()])
def test_rounding_data_is_refused_without_4_bit_weights(
    options: tuple[str, ...], text: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    line = error(convert(checkpoint(LLAMA), tmp_path / "out", *options, "--quantization-data", str(text)))
    assert "--quantization-data is for weights in 4 bits on a CPU (--precision int4 or mixed, or --head int4)" in line


def test_nothing_is_fitted_if_the_file_already_has_4_bits(
    text: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IntegerScheme, "keeps", lambda scheme, weight, scales: True)
    line = error(convert(checkpoint(LLAMA), tmp_path / "out", "--precision", "int4", "--quantization-data", str(text)))
    assert "--quantization-data has nothing to fit: llama-tied has its weights in 4 bits already" in line


def test_insufficient_memory_is_reported_before_loading_the_model(
    text: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding_data, "available_memory", lambda: 1000)
    monkeypatch.setattr(rounding_data, "reference_model", None)
    line = error(convert(checkpoint(LLAMA), tmp_path / "out", "--precision", "int4", "--quantization-data", str(text)))
    assert "--quantization-data needs 0.0 GB of memory for llama-tied in float32, but 0.0 GB is available" in line
