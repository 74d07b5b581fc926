"""What a benchmark compares: each contender loads in a process of its own and decodes on request.

Apart, because the thread pools of torch and ONNX Runtime slow each other down within one process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import FreeExportError


@dataclass(frozen=True)
class Run:
    """One prompt decoded: tokens, wall seconds from prompt to last token, the share that exited, and how much of what
    was drafted was kept."""

    tokens: int
    seconds: float
    exit_rate: float = 0.0
    acceptance: float = 1.0


class Contender(Protocol):
    """Decodes greedily to exactly `count` new tokens, whatever they are."""

    def run(self, prompt: Sequence[int], count: int) -> Run: ...


@dataclass(frozen=True)
class Ours:
    """A bundle in one mode; `threshold` for those that exit, `rollback_threshold` for rollback."""

    bundle: Path
    threads: int
    mode: str
    threshold: float | None = None
    rollback_threshold: float | None = None

    @property
    def name(self) -> str:
        return self.mode if self.threshold is None else f"{self.mode}, threshold {self.threshold:g}"

    def load(self) -> Contender:
        from runtime import Session

        session, chosen = Session(self.bundle, threads=self.threads, slots=1), self

        class Loaded:
            def run(self, prompt: Sequence[int], count: int) -> Run:
                began = time.perf_counter()
                result = session.generate(
                    list(prompt),
                    max_new_tokens=count,
                    mode=chosen.mode,
                    threshold=chosen.threshold,
                    rollback_threshold=chosen.rollback_threshold,
                    ignore_eos=True,
                )
                seconds = time.perf_counter() - began
                return Run(len(result.token_ids), seconds, result.stats.exit_rate, result.stats.acceptance)

        return Loaded()


@dataclass(frozen=True)
class Transformers:
    """transformers' generate with the checkpoint a bundle was made from, eager, fp32, with its KV cache.

    `assistant_early_exit`: the layer after which it drafts, the counterpart of mode lossless; decoder-only models.
    """

    model: str
    threads: int
    assistant_early_exit: int | None = None

    @property
    def name(self) -> str:
        return "transformers" if self.assistant_early_exit is None else "transformers, early-exit draft"

    def load(self) -> Contender:
        import torch

        from freeexport.checkpoint import open_checkpoint
        from freeexport.reference import reference_model

        torch.set_num_threads(self.threads)
        model: Any = reference_model(open_checkpoint(self.model))
        seq2seq = bool(model.config.is_encoder_decoder)
        # transformers' cache fails for T5 with a decoder deeper than the encoder.
        cache = not seq2seq or model.config.num_decoder_layers <= model.config.num_layers
        draft = {} if self.assistant_early_exit is None else {"assistant_early_exit": self.assistant_early_exit}

        class Loaded:
            def run(self, prompt: Sequence[int], count: int) -> Run:
                ids = torch.tensor([list(prompt)])
                began = time.perf_counter()
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    num_beams=1,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    use_cache=cache,
                    **draft,
                )
                seconds = time.perf_counter() - began
                return Run(int(out.shape[1]) - (1 if seq2seq else len(prompt)), seconds)

        return Loaded()


class Worker:
    """A contender in its process. Raises FreeExportError where it cannot be loaded or fails."""

    def __init__(self, spec: Ours | Transformers) -> None:
        self.name = spec.name
        # Spawned: a fork would share this process's thread pools.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def run(self, prompt: Sequence[int], count: int) -> Run:
        self._pipe.send((list(prompt), count))
        run: Run = self._receive()
        return run

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise FreeExportError(f"{self.name}: its process ended unexpectedly (out of memory?)") from None
        if isinstance(answer, str):
            raise FreeExportError(f"{self.name}: {answer}")
        return answer


def _serve(spec: Ours | Transformers, pipe: Connection) -> None:
    try:
        contender = spec.load()
        pipe.send(None)
        while True:
            pipe.send(contender.run(*pipe.recv()))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
