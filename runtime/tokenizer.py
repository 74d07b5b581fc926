"""Text to token ids and back, as the bundle's tokenizer.json and chat template say."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tokenizers

from runtime.errors import BundleError, PromptError

if TYPE_CHECKING:
    from jinja2 import Template

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"


class Tokenizer:
    """The tokenizer of a bundle. Safe to use from many threads at once.

    `special_ids` are the ids that `decode` leaves out, `special_tokens` the strings a chat template may name
    (bos_token, eos_token ...), `chat_template` its source, or None. `known_texts` and `known_bytes`: what streams have
    found single tokens in mid-text to be, where that depends on nothing else.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.known_texts: dict[int, str] = {}
        self.known_bytes: dict[int, bytes] = {}
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, bundle_dir: Path) -> Tokenizer | None:
        """Read tokenizer.json and, where they are there, chat_template.jinja and tokenizer_config.json.

        None where the bundle has no tokenizer.json. Raises BundleError when a file cannot be read or parsed.
        """
        path = bundle_dir / TOKENIZER
        source = _read(path)
        if source is None:
            return None
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except BaseException as error:  # the library raises bare Exception for everything it cannot parse
            if not _by_the_library(error):
                raise
            raise _broken(path, error) from None
        template = _read(bundle_dir / CHAT_TEMPLATE)
        return cls(backend, template, _special_tokens(bundle_dir / TOKENIZER_CONFIG))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer adds (bos, eos) unless `special` is False.

        Raises PromptError for text that the tokenizer has no tokens for, not even an unknown one.
        """
        try:
            return self._backend.encode(text, add_special_tokens=special).ids
        except BaseException as error:  # bare Exception for a missing unknown token, TypeError for a lone surrogate
            if not _by_the_library(error):
                raise
            raise PromptError(f"the tokenizer cannot encode the text ({_one_line(error)}); change it") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the model's answer; raises as `render_chat` does."""
        return self.encode(self.render_chat(messages), special=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation by the chat template, which writes its special tokens itself.

        Raises PromptError when there is no template or it refuses the messages, BundleError when it is not valid.
        """
        if self.chat_template is None:
            raise PromptError("the bundle has no chat template; pass the prompt as text or token ids")
        import jinja2

        template = self._template
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refuses the messages ({_one_line(error)}); change them") from None
        except Exception as error:  # whatever the template's own expressions raise on messages it does not expect
            raise PromptError(
                f"the chat template fails on the messages ({type(error).__name__}: {_one_line(error)}); change them"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens and ids without a token are left out. PromptError where it has none."""
        try:
            return self._backend.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            if not _by_the_library(error):
                raise
            raise PromptError(
                f"the tokenizer cannot decode the {len(ids)} tokens ({_one_line(error)}); change the prompt, "
                "or mend the decoder in tokenizer.json"
            ) from None

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, not as text; None for an id that has none."""
        return self._backend.id_to_token(token_id)

    @cached_property
    def decoder_steps(self) -> tuple[dict[str, Any], ...]:
        """The steps that make text of tokens, in order, each as tokenizer.json describes it; a sequence is flat."""
        return tuple(_flat(json.loads(self._backend.decoder.__getstate__()))) if self._backend.decoder else ()

    @cached_property
    def _template(self) -> Template:
        return _compile(self.chat_template or "")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, error) from None


def _special_tokens(path: Path) -> dict[str, str]:
    source = _read(path)
    try:
        config = json.loads(source) if source is not None else {}
    except ValueError as error:
        raise _broken(path, error) from None
    if not isinstance(config, dict):
        raise _broken(path, ValueError(f"{type(config).__name__} instead of an object"))
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _compile(source: str) -> Template:
    """The environment chat templates are written for; sandboxed, as they come with models from anywhere."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; here its body is simply part of the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise BundleError(
            f"{CHAT_TEMPLATE} line {error.lineno} is not a valid template ({_one_line(error)}); "
            "convert the checkpoint again"
        ) from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _by_the_library(error: BaseException) -> bool:
    """Whether tokenizers raised it. A panic of its Rust code, as of a regular expression that gives up, comes as a
    BaseException, which would end whatever thread this is."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _broken(path: Path, error: BaseException) -> BundleError:
    return BundleError(f"{path} cannot be read ({_one_line(error)}); convert the checkpoint again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
