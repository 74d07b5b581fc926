"""A manifest and a calibration for tests."""

from __future__ import annotations

from runtime.bundle.beta import Beta, BetaMixture
from runtime.bundle.calibration import CALIBRATION_VERSION, Calibration, TableRow
from runtime.bundle.costs import Costs, Host, Outside
from runtime.bundle.manifest import SCHEMA_VERSION, DeclaredCopy, File, Manifest

MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    family="llama",
    dialect="ort",
    precision="fp32",
    layers=5,
    exit_layer=2,
    hidden_size=64,
    vocab_size=288,
    heads=4,
    kv_heads=2,
    head_dim=16,
    capacity=100,
    max_pending=8,
    encoder_capacity=0,
    confidence="softmax",
    threshold=0.75,
    eos_token_ids=(2, 7),
    bos_token_id=1,
    pad_token_id=None,
    decoder_start_token_id=None,
    verified=True,
    source="checkpoint",
    source_sha256="ab" * 32,
    weight_bytes=1234,
    files={"shallow.onnx": File(10, "cd" * 32), "deep.onnx": File(20, "ef" * 32)},
    versions={"onnx": "1.20"},
    copies=(DeclaredCopy("lm_head.weight", 99, "packed"),),
    costs=Costs(
        0.002, 0.001, {1: 0.008, 2: 0.009, 16: 0.02}, Outside(1e-4, 2e-4, 3e-4), host=Host("a CPU", 4, 2, "1.32")
    ),
)
CALIBRATED = Calibration(
    schema_version=CALIBRATION_VERSION,
    source_sha256="ab" * 32,
    vocab_size=288,
    exit_layer=2,
    confidence="softmax",
    method="bmm",
    threshold=0.83,
    sequences=300,
    positions=9000,
    agreement=0.91,
    target=0.99,
    rollback_threshold=3.0,
    mixture=BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.9),
    table=(TableRow(0.5, 0.8, 0.95, 0.99, 1.8, 1.7), TableRow(1.0, 0.0)),
    costs=Costs(0.002, 0.001, {1: 0.01, 8: 0.02}),
    created_with={"freeexport": "0.1.0"},
)
