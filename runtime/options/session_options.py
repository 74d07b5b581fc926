"""Options of sessions. They are declared as those of requests are (generation_options.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from runtime.errors import OptionError, shown
from runtime.machine.device import Device
from runtime.options import checks


def _device(name: str, value: Any) -> Any:
    Device.parse(value)
    return value


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Options of a session.

    Raises:
        OptionError: If a value is not allowed, or options contradict each other.
    """

    threads: Annotated[int | None, checks.Whole(1, 1024)] = None
    """Number of CPU threads of an engine call. Default: one per physical core available to this
    process."""

    slots: Annotated[int, checks.Whole(1, 4096)] = 4
    """Maximum number of requests decoded concurrently, in shared engine calls. Further requests
    wait in the queue."""

    queue: Annotated[int, checks.Whole(0)] = 256
    """Maximum number of requests waiting for a slot. Further requests are refused with
    QueueFullError."""

    capacity: Annotated[int | None, checks.Whole(1)] = None
    """Number of positions in the KV cache of a slot. Default and maximum: the capacity the bundle
    was converted for."""

    overlap: bool | None = None
    """GPU only: run deep passes concurrently with shallow steps, in a separate stream. The
    generated tokens are the same. Default: True on a GPU. True is refused on a CPU, where both
    share cores and memory bandwidth, and for an exit that reads features, which waits for deep
    passes."""

    threshold: Annotated[
        float | Literal["adaptive"] | None,
        checks.Real(0, 1, "from 0 (exit always) to 1 (never), or 'adaptive'", also="adaptive"),
    ] = None
    """Threshold for requests that set none. "adaptive" applies to mode "free": the threshold starts
    at the calibrated value, or high if the bundle is not calibrated, and is refitted from the
    agreement observed in sync passes (docs/calibration.md). Other modes then use the bundle's
    threshold. Default: the bundle's threshold."""

    adaptive_memory: Annotated[int, checks.Whole(100)] = 4000
    """Number of tokens after which the weight of an observation has decayed to 1/e."""

    adaptive_target: Annotated[float | None, checks.Real(1e-6, 1 - 1e-6, "between 0 and 1")] = None
    """Probability of agreement required of an exit at the adaptive threshold. Default: the
    probability the bundle was calibrated for, or 0.95."""

    adaptive_state: Annotated[Mapping[str, Any] | None, checks.adaptive_state] = None
    """State of an earlier session to continue from, as returned by `Session.adaptive_state()`."""

    verify: Literal["sizes", "full"] = "sizes"
    """Integrity check of the bundle's files on opening. "sizes" compares their sizes, "full" also
    their SHA-256."""

    device: Annotated[str, _device] = "cpu"
    """Device to run on: "cpu", or for instance "cuda:0" for a bundle converted for CUDA or
    TensorRT. There is no fallback to another device."""

    cuda_graphs: bool = True
    """GPU only: capture repeated shallow steps and sync passes as CUDA graphs, so that one call
    launches all of their kernels."""

    trust_templates: bool = True
    """Load the bundle's tokenizer and chat template. If False, prompts must be token ids and the
    text of results is empty (docs/serving.md explains which bundles to trust)."""

    prefix_cache_mb: Annotated[int | None, checks.Whole(0)] = None
    """Memory limit for the prefix cache, in MB (1e6 bytes), in addition to the slots. The cache
    keeps keys and values of earlier requests for requests that begin with the same tokens
    (docs/serving.md). 0 disables it. CPU only. Default: 64 for a decoder-only bundle whose results
    do not depend on the cache, otherwise 0."""

    draft_memory_mb: Annotated[int, checks.Whole(0, 1_000_000)] = 32
    """Memory limit for the draft memory, in MB (1e6 bytes). It counts what followed each n-gram in
    the outputs of recent requests, and "lossless" drafts the likeliest continuation
    (docs/decoding.md). Drafts never change tokens, only their speed. 0 disables it."""

    draft_corpus: Annotated[Path | str | None, checks.path] = None
    """File with texts that outputs may resemble: a text file, or JSON lines of strings or of
    objects with a "text" or a "target". What followed each n-gram in them is counted when the
    session opens, within draft_memory_mb, and drafted for every user. 1 MB holds about 50,000
    tokens. Default: none."""

    @property
    def draft_memory_bytes(self) -> int:
        """Memory limit for the draft memory, in bytes."""
        return int(self.draft_memory_mb) * 1_000_000

    @property
    def prefix_cache_bytes(self) -> int:
        """Memory limit for the prefix cache, in bytes."""
        return int(self.prefix_cache_mb or 0) * 1_000_000

    def __post_init__(self) -> None:
        checks.check_fields(self)
        for name in ("adaptive_target", "adaptive_state"):
            if getattr(self, name) is not None and self.threshold != "adaptive":
                raise OptionError(
                    f"{name} is given, but threshold is {shown(self.threshold)}; choose 'adaptive'"
                )
        on_cpu = Device.parse(self.device).index is None
        if on_cpu and self.overlap:
            raise OptionError(
                "overlap is True on the CPU, where both engines share the cores and it measured "
                "slower (152 tokens/s, in turn 251); leave it out"
            )
        if self.draft_corpus is not None and not self.draft_memory_mb:
            raise OptionError(
                f"draft_corpus is {shown(str(self.draft_corpus))}, but draft_memory_mb is 0; leave "
                "one of them out"
            )
        if self.prefix_cache_mb and not on_cpu:
            raise OptionError(
                f"prefix_cache_mb is {self.prefix_cache_mb} with device {self.device!r}: "
                "prefixes are kept on the CPU only; leave it out"
            )
