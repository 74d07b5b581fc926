"""A single comparison of a verification: error, tolerance, and descriptions for users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Measures of an error.
# largest, rms: difference as a share of the largest value, or of the root mean square, of the
# reference.
# divergence: mean Kullback-Leibler divergence of predictions, in nats.
# nats: mean change of the next token's log probability, in nats.
# best: share of rows with a different best token, among rows where noise cannot change it.
# rows: share of rows that moved further than noise.
Measure = Literal["largest", "rms", "divergence", "nats", "best", "rows"]

_SENTENCES: dict[str, str] = {
    "largest": "differs by {} of its largest value",
    "rms": "differs by {} of its root mean square",
    "divergence": "diverges by {} nats a token on average",
    "nats": "moves by {} nats a token on average",
    "best": "has another best token in {} of the rows where noise decides nothing",
    "rows": "has {} of its rows further off than noise",
}


@dataclass(frozen=True)
class Check:
    """Result of one comparison.

    Attributes:
        error: Error by `measure`.
        tolerance: Largest error that passes.
        reference: Error of transformers in the bundle's precision, from the same float64 values.
            None if the engines are compared with themselves.
        scale: Factor from shares of the largest value to logits.
    """

    name: str
    tensor: str
    error: float
    tolerance: float
    measure: Measure = "largest"
    reference: float | None = None
    scale: float = 1.0

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # NaN fails


def sentence_of(check: dict[str, Any]) -> str:
    """Describe a check of a report in a sentence."""

    def shown(value: float | None) -> str:
        if value is None:
            return "not a number"
        return f"{value:.1%}" if check["measure"] in ("best", "rows") else f"{value:.2e}"

    sentence = _SENTENCES[check["measure"]].format(shown(check["error"]))
    itself = (
        ""
        if check["reference"] is None
        else f"; transformers itself is {shown(check['reference'])} from float64"
    )
    return (
        f"{check['name']}: {check['tensor']} {sentence}, the limit is "
        f"{shown(check['tolerance'])}{itself}"
    )


def entry_of(check: dict[str, Any]) -> tuple[str, str]:
    """Return a row of a table for a check of a report: the comparison and its values.

    Accepts reports of older versions.
    """
    measure = check.get("measure", "largest")
    what = f"{check['name']}: {check['tensor']}" + (
        "" if measure in ("largest", "rms") else f", {measure}"
    )
    error = "not a number" if check["error"] is None else f"{check['error']:.1e}"
    limit = "not a number" if check["tolerance"] is None else f"{check['tolerance']:.0e}"
    reference = (
        "" if check.get("reference") is None else f" (transformers itself {check['reference']:.1e})"
    )
    return what, f"{error}, at most {limit}{reference}{'' if check['passed'] else '  FAILED'}"


def greedy_line(greedy: dict[str, Any]) -> tuple[bool, str]:
    """Return the result of greedy decoding and a line that describes it.

    The result is True if the token ids of every prompt equal the checkpoint's, up to ties. The line
    reports where others first differ, and the distance of the checkpoint's two best logits there.
    """
    prompts = greedy["prompts"]
    others = [prompt for prompt in prompts if prompt["first_difference"] is not None]
    line = f"greedy decoding: ids of {len(prompts) - len(others)} of {len(prompts)} prompts equal"
    if not others:
        return True, line
    if greedy["tie"] is not None:
        return True, f"{line}, the others first differ at a tie"
    places = []
    for prompt in others:
        gap = "" if prompt["gap"] is None else f" (best logits {prompt['gap']:.2g} apart)"
        places.append(f"{prompt['first_difference'] + 1}{gap}")
    return False, f"{line}; the others first differ at token {', '.join(places)}"


def quality_line(quality: dict[str, Any]) -> str:
    """Describe the quality measured on text in a line."""
    return (
        f"quality on {quality['tokens']} tokens: same best token {quality['agreement']:.1%}, "
        f"perplexity x {quality['perplexity_ratio']:.3f}, divergence {quality['divergence']:.2g} "
        "nats"
    )
