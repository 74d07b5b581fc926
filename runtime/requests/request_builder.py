"""From a prompt and its options to a request that can be scheduled, and what requests teach the session."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from runtime.adaptation.adaptive_threshold import AdaptiveThreshold
from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.draft_length import DraftLengths
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import NEUTRAL, Costs
from runtime.engines.encoder import Encoder
from runtime.engines.memory import check_beams
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.options import GenerationOptions, SessionOptions
from runtime.requests.generation_config import read_defaults, with_defaults
from runtime.requests.request import Request, processors_of, threshold_of
from runtime.requests.response import Response, Start
from runtime.scheduling.callbacks import guarded
from runtime.scheduling.ending import Ending
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.task import Run, Task
from runtime.text.detokenizer import Detokenizer
from runtime.text.prompt import NO_TOKENIZER, UNTRUSTED, Prompt, encode_prompt
from runtime.text.tokenizer import Tokenizer


class RequestBuilder:
    """For a `scheduler` with `capacity` positions a slot. Setting `ending` ends all of them after
    their next token. `paces`: what lossless drafts have taught, beginning with `costs` of this machine."""

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        capacity: int,
        tokenizer: Tokenizer | None,
        encoder: Encoder | None,
        scheduler: Scheduler,
        adaptive: AdaptiveThreshold | None,
        costs: Costs | None,
    ) -> None:
        self._bundle, self._options, self._capacity = bundle, options, capacity
        self._tokenizer, self._encoder, self._scheduler = tokenizer, encoder, scheduler
        self.ending = False
        self.adaptive = adaptive
        self.paces = DraftLengths(CallCosts(costs or NEUTRAL))

    def row(
        self, given: dict[str, Any], cancel: threading.Event | None, began: float, prompt: Prompt
    ) -> tuple[Task, Response]:
        """A request for the scheduler and its answer. Raises PromptError, OptionError."""
        request, ending = self.request(prompt, given, cancel, began)
        reply = self.reply(request.start, request, ending, began, partial(self.learn, request))
        return self.placed(reply.run, request, ending), reply

    def placed(self, run: Run, request: Request, ending: Ending) -> Task:
        """What does `run` in a slot, for this request."""
        aside = bool(request.options.logits_processor) or request.options.num_beams > 1
        return Task(run, ending.due, until=ending.until, aside=aside)

    def request(
        self, prompt: Prompt, given: dict[str, Any], cancel: threading.Event | None, began: float
    ) -> tuple[Request, Ending]:
        """The request, and what may end it: its deadline is counted from `began`. Raises CapacityError for beams."""
        manifest = self._bundle.manifest
        options = GenerationOptions(**known(GenerationOptions, given))
        if options.max_pending is not None and options.max_pending > manifest.max_pending:
            raise OptionError(
                f"max_pending is {options.max_pending}; this bundle has room for {manifest.max_pending} (see convert)"
            )
        if options.threshold is None and isinstance(self._options.threshold, (int, float)):
            options = replace(options, threshold=self._options.threshold)
        if options.samples:
            options = with_defaults(options, read_defaults(self._bundle.path, manifest.files))
        if options.logits_processor:
            processors = processors_of(options)
            options = replace(options, logits_processor=[guarded(each, self._scheduler) for each in processors])
        limit = manifest.encoder_capacity or self._capacity
        missing = NO_TOKENIZER if self._options.trust_templates else UNTRUSTED
        parse_special = None if options.parse_special is None else bool(options.parse_special)
        tokens = encode_prompt(prompt, self._tokenizer, manifest.vocab_size, limit, parse_special, missing)
        drafts = options.mode == "lossless"
        pace = self.paces.of(threshold_of(options, manifest), options.samples) if drafts else None
        ending = Ending(cancel, deadline_of(options, began), lambda: self.ending)
        adapts = self.adaptive is not None and options.threshold is None and options.mode == "free"
        observation = self.adaptive.begin() if self.adaptive is not None and adapts else None
        request = Request(manifest, self._capacity, self._encoder, tokens, options, pace, ending.due, observation)
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
        if self.adaptive is not None and request.observation is not None:
            self.adaptive.complete(request.observation)


def adapting(bundle: Bundle, options: SessionOptions, costs: Costs | None) -> AdaptiveThreshold | None:
    """None where the threshold is a number. Raises OptionError for a state that does not fit."""
    if options.threshold != "adaptive":
        return None
    memory, state = options.adaptive_memory, options.adaptive_state
    return AdaptiveThreshold(bundle.manifest, bundle.calibration, memory, state, costs)


def known(options: type, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, if these are names of options. Raises OptionError."""
    names = [field.name for field in fields(options)]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; known are {', '.join(names)}")
    return given


def deadline_of(options: GenerationOptions, began: float) -> float:
    """When the deadline is, by the monotonic clock."""
    return math.inf if options.deadline is None else began + options.deadline
