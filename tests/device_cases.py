"""Cases of sessions on a device.

Two checkpoints, their exits with own layers and vocabularies, exits that read features, and options of every decoding
mode.
"""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import BY_NAME, _t5
from exit_layer_case import with_feature
from exit_vocabulary_case import with_exit_vocabulary

T5 = BY_NAME["t5-relu-tied"]
LLAMA = BY_NAME["llama-grouped-llama3-rope"]
EXITS = tuple(with_exit_vocabulary(case.name, layers=True) for case in (T5, LLAMA))
FEATURES = (with_feature("llama-tied", 1, "fused"), with_feature("t5-relu-tied", 0))
both = pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
every = pytest.mark.parametrize("case", [T5, LLAMA, *EXITS], ids=lambda case: case.name)
MODES: dict[str, dict[str, Any]] = {
    "free": {"mode": "free", "threshold": 0.5},
    "rollback": {"mode": "rollback", "threshold": 0.4, "rollback_threshold": 2.0},
    "lossless": {"mode": "lossless", "threshold": 0.4},
    "full": {"mode": "full"},
    "shallow": {"mode": "shallow"},
    "sampled": {"mode": "free", "threshold": 0.4, "temperature": 0.8, "seed": 7},
    "constrained": {"mode": "free", "threshold": 0.3, "regex": "([a-k]{3} = (yes|never)[.]){9}"},
    "constrained lossless": {"mode": "lossless", "threshold": 0.1, "regex": "([a-k]{3} = (yes|never)[.]){9}"},
    "biased": {"mode": "full", "sequence_bias": {42: 3.0}, "output_logprobs": True},
}

# An encoder exported from the model's code, and heads that kernels of all targets support.
LONGT5 = _t5("longt5-wide", (1, 2), model="LongT5", num_layers=1, local_radius=7, d_kv=16)
