"""From a prompt and its options to a request that can be scheduled, and what requests teach the session."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from runtime.adaptation.draft_lengths import DraftLengths
from runtime.bundle.bundle import Bundle
from runtime.engines.encoder import Encoder
from runtime.engines.memory import check_beams
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.options import GenerationOptions, SessionOptions
from runtime.requests.generation_config import read_defaults, with_defaults
from runtime.requests.request import Request, processors_of
from runtime.requests.response import Response, Start
from runtime.requests.thresholds import Thresholds
from runtime.scheduling.callbacks import guarded
from runtime.scheduling.ending import Ending
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.task import Run, Task
from runtime.text.detokenizer import Detokenizer
from runtime.text.prompt import NO_TOKENIZER, UNTRUSTED, Prompt, encode_prompt
from runtime.text.tokenizer import Tokenizer


class RequestBuilder:
    """For a `scheduler` with `capacity` positions a slot. Setting `ending` ends all of them after
    their next token. `paces`: what lossless drafts have taught."""

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        capacity: int,
        tokenizer: Tokenizer | None,
        encoder: Encoder | None,
        scheduler: Scheduler,
        thresholds: Thresholds,
    ) -> None:
        self._bundle, self._options, self._capacity = bundle, options, capacity
        self._tokenizer, self._encoder, self._scheduler = tokenizer, encoder, scheduler
        self.ending = False
        self.thresholds = thresholds
        self.paces = DraftLengths(bundle)

    def row(
        self, options: GenerationOptions, cancel: threading.Event | None, began: float, prompt: Prompt
    ) -> tuple[Task, Response]:
        """A request for the scheduler and its answer. Raises PromptError, OptionError."""
        request, ending = self.request(prompt, options, cancel, began)
        reply = self.reply(request.start, request, ending, began, partial(self.learn, request))
        return self.placed(reply.run, request, ending), reply

    def placed(self, run: Run, request: Request, ending: Ending) -> Task:
        """What does `run` in a slot, for this request."""
        aside = bool(request.options.logits_processor) or request.options.num_beams > 1
        return Task(run, ending.due, until=ending.until, aside=aside)

    def request(
        self, prompt: Prompt, options: GenerationOptions, cancel: threading.Event | None, began: float
    ) -> tuple[Request, Ending]:
        """The request, and what may end it: its deadline is counted from `began`. Raises CapacityError for beams."""
        manifest = self._bundle.manifest
        if options.max_pending is not None and options.max_pending > manifest.max_pending:
            raise OptionError(
                f"max_pending is {options.max_pending}; this bundle has room for {manifest.max_pending} (see convert)"
            )
        if options.samples:
            options = with_defaults(options, read_defaults(self._bundle.path, manifest.files))
        if options.logits_processor:
            processors = processors_of(options)
            options = replace(options, logits_processor=[guarded(each, self._scheduler) for each in processors])
        limit = manifest.encoder_capacity or self._capacity
        missing = NO_TOKENIZER if self._options.trust_templates else UNTRUSTED
        parse_special = None if options.parse_special is None else bool(options.parse_special)
        tokens = encode_prompt(prompt, self._tokenizer, manifest.vocab_size, limit, parse_special, missing)
        threshold = self.thresholds.decide(options.threshold, options.mode)
        pace = self.paces.of(threshold.value, options.samples) if options.mode == "lossless" else None
        ending = Ending(cancel, deadline_of(options, began), lambda: self.ending)
        request = Request(manifest, self._capacity, self._encoder, tokens, options, threshold, pace, ending.due)
        if options.num_beams > 1 and Device.parse(self._options.device).index is None:
            check_beams(manifest, options.num_beams, request.positions)
        return request, ending

    def reply(
        self,
        start: Start,
        request: Request,
        ending: Ending,
        began: float,
        ended: Callable[[], None] | None = None,
    ) -> Response:
        text = Detokenizer(self._tokenizer, tuple(request.options.stop))
        return Response(start, text, request.eos, request.limit, ending, began, self._scheduler.clock, ended)

    def learn(self, request: Request) -> None:
        """What a request that has ended saw."""
        if self.thresholds.adaptive is not None and request.observation is not None:
            self.thresholds.adaptive.complete(request.observation)


def deadline_of(options: GenerationOptions, began: float) -> float:
    """When the deadline is, by the monotonic clock."""
    return math.inf if options.deadline is None else began + options.deadline
