"""From a prompt and its options to a request that can be scheduled."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from time import monotonic

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.bundle import Bundle
from runtime.decoding.drafts import LearnedDrafts
from runtime.decoding.response import Caller
from runtime.engines.memory import check_beams
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.metrics import Observer
from runtime.options import GenerationOptions, SessionOptions
from runtime.requests.generation_config import read_defaults, with_defaults
from runtime.requests.request import Model, Request
from runtime.requests.sampling import processors_of
from runtime.requests.thresholds import Thresholds
from runtime.scheduling.callbacks import guarded
from runtime.scheduling.scheduler import Scheduler
from runtime.text.prompt import NO_TOKENIZER, UNTRUSTED, Prompt, encode_expected, encode_prompt


class RequestBuilder:
    """For a `scheduler`. `learned`: what lossless drafts have taught, with `costs` of calls."""

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        model: Model,
        scheduler: Scheduler,
        thresholds: Thresholds,
        costs: CallCosts,
        observer: Observer,
    ) -> None:
        self._bundle, self._options, self._model = bundle, options, model
        self._scheduler, self._thresholds, self._observer = scheduler, thresholds, observer
        self.learned = LearnedDrafts(costs)

    def caller(self, options: GenerationOptions, cancel: threading.Event | None) -> Caller:
        """Of a request, or of a list of them, that is asked for now."""
        asked = monotonic()
        until = math.inf if options.deadline is None else asked + options.deadline
        return Caller(self._scheduler, cancel, asked, until)

    def encode(self, prompt: Prompt, parse_special: bool | None = None) -> np.ndarray:
        """Token ids int64 [n]. Raises PromptError."""
        manifest = self._model.manifest
        limit = manifest.encoder_capacity or self._model.capacity
        missing = NO_TOKENIZER if self._options.trust_templates else UNTRUSTED
        parse_special = None if parse_special is None else bool(parse_special)
        return encode_prompt(prompt, self._model.tokenizer, manifest.vocab_size, limit, parse_special, missing)

    def request(self, prompt: Prompt, options: GenerationOptions, caller: Caller, count: int | None = None) -> Request:
        """Of so many continuations, to be ordered by log-probability; None is one as it is. Raises PromptError,
        OptionError, and CapacityError for beams."""
        manifest, options = self._model.manifest, self._thresholds.with_mode(options)
        if count is not None:
            options = replace(options, output_logprobs=True)
        if options.max_pending is not None and options.max_pending > manifest.max_pending:
            raise OptionError(
                f"max_pending is {options.max_pending}; this bundle has room for {manifest.max_pending} (see convert)"
            )
        if options.samples:
            options = with_defaults(options, read_defaults(self._bundle.path, manifest.files))
        if options.logits_processor:
            processors = processors_of(options)
            options = replace(options, logits_processor=[guarded(each, self._scheduler) for each in processors])
        if options.draft_source is not None:
            options = replace(options, draft_source=guarded(options.draft_source, self._scheduler))
        if options.predicted_output is not None:
            expected = encode_expected(
                options.predicted_output, self._model.tokenizer, manifest.vocab_size, self._model.capacity
            )
            options = replace(options, predicted_output=expected.tolist())
        tokens = self.encode(prompt, options.parse_special)
        assert options.mode is not None
        threshold = self._thresholds.decide(options.threshold, options.mode)
        watch = self._observer.watch()
        request = Request(self._model, tokens, options, threshold, self.learned, caller, count or 1, watch)
        if options.num_beams > 1 and Device.parse(self._options.device).index is None:
            check_beams(manifest, options.num_beams, request.positions)
        return request
