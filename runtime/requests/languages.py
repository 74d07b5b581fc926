"""Languages of translation models: checks of codes, and placement of language tokens."""

from __future__ import annotations

from typing import Literal

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError, PromptLengthError, shown


def check_languages(manifest: Manifest, is_text: bool, **codes: str | None) -> None:
    """Check the codes of `src_lang` and `tgt_lang` in `codes`.

    Args:
        manifest: Manifest of the bundle.
        is_text: The prompt is text.
        **codes: Language codes by option.

    Raises:
        OptionError: If the bundle does not support a code, or it cannot be set for this prompt.
    """
    languages = manifest.languages
    for name, code in codes.items():
        if code is None:
            continue
        given = f"{name} is {shown(code)}"
        if languages is None:
            raise OptionError(f"{given}; this bundle has no language tokens; omit it")
        if name == "src_lang" and languages.source is None:
            raise OptionError(f"{given}; this bundle's prompts have no language; omit it")
        if code not in languages.tokens:
            from difflib import get_close_matches  # only for the message

            near = get_close_matches(code, languages.tokens, 5, 0.3) or sorted(languages.tokens)[:5]
            known = f"{len(languages.tokens)} languages, as {', '.join(near)}"
            raise OptionError(f"{given}; this bundle has {known}")
        if not is_text and (name == "src_lang" or languages.target == "prompt"):
            raise OptionError(
                f"{given}, which is for a prompt of text; put its token among the ids"
            )


def with_languages(
    ids: np.ndarray,
    manifest: Manifest,
    src_lang: str | None,
    tgt_lang: str | None,
) -> np.ndarray:
    """Return a prompt, int64 [n], with the tokens of the languages. May modify `ids`.

    Raises:
        PromptLengthError: If it no longer fits.
    """
    languages = manifest.languages
    if languages is not None and languages.source is not None and src_lang is not None:
        # The tokenizer adds the token of one language, at the beginning or at the end.
        ends = np.array([0, len(ids) - 1])
        places = ends[ids[ends] == languages.tokens[languages.source]]
        ids[places] = languages.tokens[src_lang]
    target = target_token(manifest, tgt_lang, "prompt")
    if target is not None:
        ids = np.concatenate([[target], ids])
        max_ids = manifest.encoder_capacity
        if len(ids) > max_ids:
            raise PromptLengthError(
                f"the prompt and its language have {len(ids)} tokens, at most {max_ids} fit; "
                "shorten it, or convert with a larger capacity"
            )
    return ids


def target_token(
    manifest: Manifest,
    tgt_lang: str | None,
    place: Literal["first", "start", "prompt"],
) -> int | None:
    """Return the token of the target language if the model expects it at this place, else None."""
    languages = manifest.languages
    if languages is None or tgt_lang is None or languages.target != place:
        return None
    return languages.tokens[tgt_lang]
