"""Requests whose keys and values are in 8 bits: alone, beside others, and after one that was cancelled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles

from runtime import Session
from runtime.engines.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

PROMPTS = [[3 + (29 * step + 7 * number) % 250 for step in range(20 + 9 * number)] for number in range(3)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "output_logprobs": True}


def test_outputs_do_not_depend_on_concurrent_or_earlier_requests(bundle: Bundles) -> None:
    path = bundle(BY_NAME["llama-tied"], 1, precision="int8", capacity=128, kv_cache="int8")
    with Session(path, threads=1, slots=1) as session:
        assert session.manifest.cache_type == "int8"
        alone = [session.generate(prompt, mode="full", **OPTIONS) for prompt in PROMPTS]
    with Session(path, threads=1, slots=4, prefix_cache_mb=8) as session:
        cancel = threading.Event()
        stream = session.stream(PROMPTS[0], mode="full", cancel=cancel, max_new_tokens=90, ignore_eos=True)
        next(iter(stream))
        cancel.set()
        for mode in ("full", "lossless", "lossless"):  # the last reuses prefixes of the others
            decode = partial(session.generate, mode=mode, **OPTIONS)
            with ThreadPoolExecutor(3) as pool:
                found = list(pool.map(decode, PROMPTS))
            assert [(one.token_ids, one.logprobs) for one in found] == [(one.token_ids, one.logprobs) for one in alone]
        assert found[-1].stats.cached_tokens > 0
    assert stream.result.finish_reason == "cancelled"
