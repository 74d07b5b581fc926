"""State shared by the requests of a session: the bundle, its loaded parts, and what was learned."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.bundle import Bundle
from runtime.bundle.json_file import read_object
from runtime.bundle.manifest import REMEDY
from runtime.decoding.acceptance import LearnedDrafts
from runtime.decoding.phrases import PHRASES, PhraseTable, misfit
from runtime.decoding.text_index import TextMemory
from runtime.engines.prefix_store import PrefixStore, generated_limit
from runtime.engines.runner import Encoder
from runtime.errors import BundleError, OptionError, shown
from runtime.machine.device import Device
from runtime.options.generation_options import GenerationOptions
from runtime.options.session_options import SessionOptions
from runtime.requests.languages import check_languages, with_languages
from runtime.requests.metrics import Observer
from runtime.requests.thresholds import Thresholds
from runtime.text.corpus import read_corpus
from runtime.text.grammar import Grammar, Grammars
from runtime.text.prompt import NO_TOKENIZER, UNTRUSTED, Prompt, encode_expected, encode_prompt
from runtime.text.sampler import LogitsProcessor
from runtime.text.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
LARGEST_CONFIG = 4 << 20  # bytes
# Sampling options that a bundle may set.
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# Wraps a callback of the caller, so that it cannot wait for the session that waits for it.
Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class SessionState:
    """State shared by the requests of a session.

    Attributes:
        bundle: The bundle.
        options: Options of the session.
        capacity: Positions per slot.
        encoder: Runs the encoder. None for decoder-only models.
        tokenizer: None if results have no text.
        thresholds: Thresholds of the session.
        costs: Measured costs of engine calls.
        observer: Receives the events of requests.
        guard: Wraps callbacks of the caller.
        prefixes: Stored keys and values, or encoder outputs, of earlier requests. None if disabled.
        memory: Outputs of earlier requests, for drafts. None if disabled.
        corpus: What followed each n-gram of the texts of `draft_corpus`. None without them.
        phrases: The bundle's table of phrases. None if it has none.
        drafts_exit: Mode lossless drafts from the exit by default. False if `convert` measured on
            this machine that it does not pay.
    """

    bundle: Bundle
    options: SessionOptions
    capacity: int
    encoder: Encoder | None
    tokenizer: Tokenizer | None
    thresholds: Thresholds
    costs: CallCosts
    observer: Observer
    guard: Guard
    prefixes: PrefixStore | None = None
    memory: TextMemory | None = None
    corpus: PhraseTable | None = None
    phrases: PhraseTable | None = None
    drafts_exit: bool = True

    def __post_init__(self) -> None:
        self.manifest = self.bundle.manifest
        self.learned = LearnedDrafts(self.costs)
        self.generated_limit = generated_limit(self.manifest)
        # `own_layers`: the exit's own layers read every row. `chooses_exit`: a request may skip
        # them, unless its keys and values are stored: a request that needs these layers cannot use
        # a prefix that they have not read.
        self.own_layers = bool(self.manifest.exit_layers) and not self.manifest.exit_engine
        self.chooses_exit = self.own_layers and (self.encoder is not None or self.prefixes is None)
        self._grammars = Grammars(
            self.tokenizer, self.manifest.vocab_size, self.manifest.eos_token_ids
        )

    def phrase_tables(self, bundled: bool) -> list[PhraseTable]:
        """Return the tables that a request drafts from, with or without that of the bundle."""
        tables = (self.corpus, self.phrases if bundled else None)
        return [table for table in tables if table is not None]

    def encode(
        self,
        prompt: Prompt,
        *,
        parse_special: bool | None = None,
        tools: List[Mapping[str, Any]] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> np.ndarray:
        """Return the token ids of a prompt, int64 [n], with its language tokens.

        Raises:
            PromptError: If the prompt is not valid or does not fit.
            OptionError: If a language is not supported.
        """
        is_text = isinstance(prompt, str)
        check_languages(self.manifest, is_text, src_lang=src_lang, tgt_lang=tgt_lang)
        ids = encode_prompt(
            prompt,
            self.tokenizer,
            vocab_size=self.manifest.vocab_size,
            limit=self.manifest.encoder_capacity or self.capacity,
            parse_special=None if parse_special is None else bool(parse_special),
            missing=NO_TOKENIZER if self.options.trust_templates else UNTRUSTED,
            tools=tools,
        )
        return with_languages(ids, self.manifest, src_lang, tgt_lang)

    def embed(self, prompts: List[Prompt], *, normalize: bool, src_lang: str | None) -> np.ndarray:
        """Return the mean of the encoder's states over each prompt, float32 [n, d].

        Raises:
            OptionError: If the bundle has no encoder for text, or runs on a GPU.
            PromptError: If a prompt is not valid or does not fit.
        """
        encoder = self.encoder
        if encoder is None or self.manifest.speech is not None:
            read = "is decoder-only" if encoder is None else "reads speech"
            raise OptionError(
                f"the bundle {read}; embeddings need an encoder of text, such as T5's or BART's"
            )
        if Device.parse(self.options.device).index is not None:
            raise OptionError(
                f"device is {self.options.device!r}; embeddings are computed on a CPU only, use "
                "another session"
            )
        encoded = [self.encode(prompt, src_lang=src_lang) for prompt in prompts]
        states = [encoder.states(ids).mean(axis=0, dtype=np.float32) for ids in encoded]
        found = np.array(states, np.float32).reshape(len(states), self.manifest.hidden_size)
        if normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.float32(1e-12))
        return found

    def grammar(self, options: GenerationOptions) -> Grammar | None:
        """Return the grammar that constrains a request, if any. Compiled grammars are cached.

        Raises:
            OptionError: If the grammar cannot be compiled.
        """
        constraint = options.constraint
        return None if constraint is None else self._grammars.open(*constraint, self.capacity + 1)

    def resolve(self, options: GenerationOptions) -> GenerationOptions:
        """Return options completed for this bundle.

        Sets the mode, the sampling values of the bundle, guarded callbacks, and the token ids of
        `predicted_output`.

        Raises:
            OptionError: If the options do not fit the bundle.
        """
        manifest = self.manifest
        options = self.thresholds.with_mode(options)
        if options.max_pending is not None and options.max_pending > manifest.max_pending:
            raise OptionError(
                f"max_pending is {options.max_pending}; this bundle has room for "
                f"{manifest.max_pending} (see convert)"
            )
        if options.num_beams > 1 and self.encoder is None:
            raise OptionError(
                f"num_beams is {options.num_beams}; beam search is for encoder-decoders, this "
                "bundle is decoder-only"
            )
        if options.prompt_logprobs is not None and self.encoder is not None:
            raise OptionError(
                "prompt_logprobs: an encoder-decoder does not predict its prompt; use a "
                "decoder-only bundle, or None"
            )
        for tokens in options.sequence_bias or ():
            if max(tokens) >= manifest.vocab_size:
                raise OptionError(
                    f"sequence_bias names token {max(tokens)}; valid ids are 0 to "
                    f"{manifest.vocab_size - 1}"
                )
        changes: dict[str, Any] = {}
        if options.samples:
            recommended = read_defaults(self.bundle.path, manifest.files).items()
            changes |= {
                name: value for name, value in recommended if getattr(options, name) is None
            }
        if options.logits_processor:
            processors = cast(tuple[LogitsProcessor, ...], options.logits_processor)
            changes["logits_processor"] = [self.guard(each) for each in processors]
        if options.draft_source is not None:
            changes["draft_source"] = self.guard(options.draft_source)
        if options.predicted_output is not None:
            expected = options.predicted_output
            ids = encode_expected(expected, self.tokenizer, manifest.vocab_size, self.capacity)
            changes["predicted_output"] = ids.tolist()
        return replace(options, **changes) if changes else options


def open_corpus(options: SessionOptions, tokenizer: Tokenizer | None) -> PhraseTable | None:
    """Return the phrases of the texts of `draft_corpus`, None without them.

    Raises:
        OptionError: If the texts cannot be used.
    """
    if options.draft_corpus is None:
        return None
    path = Path(options.draft_corpus)
    limit = options.draft_memory_bytes
    texts = read_corpus(path, limit)
    if tokenizer is None:
        raise OptionError(
            f"draft_corpus is {shown(str(path))}, and the session has no tokenizer to read it; "
            "leave it out"
        )
    encoded = (tokenizer.encode(text, special=False, parse_special=False) for text in texts)
    table = PhraseTable.build(encoded)
    if table.nbytes > limit:
        raise OptionError(
            f"draft_corpus is {shown(str(path))}, whose phrases take {table.nbytes:,} bytes, more "
            f"than draft_memory_mb allows, {limit:,}; shorten it or raise draft_memory_mb"
        )
    return table


def read_phrases(bundle: Bundle) -> PhraseTable | None:
    """Return the bundle's table of phrases, None if it has none.

    Raises:
        BundleError: If the table is damaged.
    """
    if PHRASES not in bundle.manifest.files:
        return None
    try:
        entries = np.load(bundle.path / PHRASES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise BundleError(f"{PHRASES} is damaged: it cannot be read; {REMEDY}") from None
    if (reason := misfit(entries, bundle.manifest.vocab_size)) is not None:
        raise BundleError(f"{PHRASES} is damaged: {reason}; {REMEDY}")
    return PhraseTable(entries)


def read_defaults(bundle: Path, listed: Container[str] = (GENERATION_CONFIG,)) -> dict[str, Any]:
    """Return the sampling options in the bundle's generation_config.json.

    Returns an empty dict unless the file is `listed` in the manifest.

    Raises:
        BundleError: If a value cannot be used.
    """
    file = bundle / GENERATION_CONFIG
    if GENERATION_CONFIG not in listed or not file.exists():
        return {}
    content = read_object(file, "convert the checkpoint again", limit=LARGEST_CONFIG)
    values = {name: content[name] for name in RECOMMENDED if content.get(name) is not None}
    try:
        GenerationOptions(do_sample=True, **values)
    except OptionError as error:
        raise BundleError(f"{file}: {str(error)[:300]}; or pass another") from None
    return values
