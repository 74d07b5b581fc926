"""Script that runs every kernel with AddressSanitizer and UndefinedBehaviorSanitizer.

The argument is a folder for the build. The checks run in a second process, because the sanitizer's library must be
loaded first. Kernels for AVX-VNNI are compiled to the AVX-512 encoding of their instructions, so that they also run on
processors without AVX-VNNI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kernel_builds import objects, run

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]


def build(folder: Path) -> Path:
    """Build the library with the flags of setup.py and the sanitizers."""
    as_avx512 = "-mavx2 -mfma -mf16c -mavx512vl -mavx512vnni"
    files = objects(folder, ["g++"], "x86_64", *SANITIZE, avx2_vnni=as_avx512)
    library = folder / "sanitized.so"
    run("g++", "-shared", *SANITIZE, *files, "-o", str(library))
    return library


def check(library: Path) -> None:
    import numpy as np
    from attention_cases import attend, random_call, random_layer
    from kernel_cases import ACTIVATIONS, INSTRUCTIONS, here, multiply, random_case

    rng = np.random.default_rng(0)
    count = 0
    names = [name for name in INSTRUCTIONS if here(name, library)]
    tiled = [name for name in ("amx", "scalar-bf16") if here(name, library)]
    others = {4: 8, 5: 6, 6: 4, 8: 5}
    for outputs, inputs in ((1, 1), (15, 31), (16, 32), (17, 33), (33, 95), (40, 256), (8, 129)):
        for bits in (4, 5, 6, 8):
            for block in (32, 128):
                case = random_case(rng, outputs, inputs, bits, block, bias=bool(outputs % 2))
                for rows in (1, 2, 3, 4, 5, 7, 8, 9, 17, 33):
                    x = rng.standard_normal((rows, inputs)).astype(np.float32)
                    x[0, 0] = np.nan if rows == 3 else 1e30
                    up = random_case(rng, outputs, inputs, others[bits], 64)
                    norm = rng.standard_normal(inputs).astype(np.float32)
                    fused = {"skip": x[::-1].copy(), "norm": norm, "activation": ACTIVATIONS[rows % 4], "up": up}
                    beside = {"up": random_case(rng, outputs + 2, inputs, others[bits], 32), "beside": True}
                    exact = {"activation_bits": 32}
                    for extra in ({}, fused, beside, exact, fused | exact):
                        expected = multiply("scalar", x, case, library, **extra)
                        for name in names:
                            np.testing.assert_array_equal(multiply(name, x, case, library, **extra), expected, name)
                            count += 1
                        for name in tiled:
                            multiply(name, x, case, library, **extra, prompt=True)
    for heads, kv_heads, size, window, kinds in ((3, 1, 24, 0, "r"), (5, 1, 40, 3, "b"), (4, 4, 64, 0, "rn")):
        layer = random_layer(rng, heads, kv_heads, size, window, kinds)
        for packed in (False, True):
            call = random_call(rng, layer, [0, 124, 7], [5, 16, 0], capacity=140)
            expected = attend("scalar", layer, call.fresh(), packed, library)
            for name in names:
                np.testing.assert_array_equal(attend(name, layer, call.fresh(), packed, library), expected, name)
            for name in tiled:
                attend(name, layer, call.fresh(), packed, library, prompt=True)
    run_in_onnx_runtime(library)
    print(f"{count} products checked: scalar, {', '.join(names)}")


def run_in_onnx_runtime(library: Path) -> None:
    """Run the operators that use the kernels, with several threads."""
    import kernel_cases
    import numpy as np
    from attention_cases import attention_session, feeds, random_call, random_layer

    kernel_cases.LIBRARY = library
    from kernel_cases import best_two, predictions

    rng = np.random.default_rng(1)
    for count in (2, 63, 64, 65, 4096, 4097, 9000):
        logits = rng.standard_normal((3, count)).astype(np.float32)
        best_two(3)(logits)
        predictions(logits, [0, 1, count - 1])
    case = kernel_cases.random_case(rng, 90, 70, 4, bias=True)
    product = kernel_cases.session(case, 3)
    for rows in (0, 1, 9, 70):
        product.run(None, {"x": rng.standard_normal((rows, 70)).astype(np.float32)})
    second = kernel_cases.random_case(rng, 20, 70, 8)
    up = {"up_data": second.packed.data, "up_scales": second.packed.scales}
    beside = kernel_cases.session(case, 3, up_N=20, up_bits=8, up_block_size=32, bias=np.ones(110, np.float32), **up)
    beside.run(None, {"x": rng.standard_normal((9, 70)).astype(np.float32)})
    kernel_cases.packed_rows(second).run(None, {"indices": np.arange(20)})
    layer = random_layer(rng, 6, 2, 32, 7, "rn")
    for packed in (False, True):
        call = random_call(rng, layer, [0, 124, 7], [5, 16, 0], capacity=140)
        attention_session(layer, packed, 3).run(None, feeds(layer, call, packed))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        check(Path(sys.argv[2]))
    else:
        library = build(Path(sys.argv[1]))
        runtime_library = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
        # Python never frees some of its allocations.
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime_library,
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "runtime"))),
        }
        child = [sys.executable, __file__, "check", str(library)]
        sys.exit(subprocess.run(child, env=environment).returncode)
