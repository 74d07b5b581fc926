"""One comparison of a verification: what was measured, how far it may be, and how people read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# largest, rms: of a difference, as a share of the largest or of the root mean square of what it is from.
# divergence: mean Kullback-Leibler divergence of predictions, in nats. nats: mean nats lost of the token that stands
# there. best: share of the rows with another best token, of those where the two best are further apart than noise.
# rows: share of the rows that moved further than noise.
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
    """`error` is how far `tensor` is off by `measure`, at most `tolerance`. `reference` is how far transformers, in the
    bundle's precision, is from the same float64 values itself; None where the engines are compared with themselves.
    `scale` turns a share of the largest value into logits.
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
    """Describe a check of a report, passed or not."""

    def shown(value: float | None) -> str:
        if value is None:
            return "not a number"
        return f"{value:.1%}" if check["measure"] in ("best", "rows") else f"{value:.2e}"

    found = _SENTENCES[check["measure"]].format(shown(check["error"]))
    itself = (
        ""
        if check["reference"] is None
        else f"; transformers itself is {shown(check['reference'])} from float64"
    )
    return (
        f"{check['name']}: {check['tensor']} {found}, the limit is "
        f"{shown(check['tolerance'])}{itself}"
    )


def entry_of(check: dict[str, Any]) -> tuple[str, str]:
    """A check of a report, older ones too, as a line of a table: what was compared, and the figures."""
    measure = check.get("measure", "largest")
    what = f"{check['name']}: {check['tensor']}" + (
        "" if measure in ("largest", "rms") else f", {measure}"
    )
    found = "not a number" if check["error"] is None else f"{check['error']:.1e}"
    limit = "not a number" if check["tolerance"] is None else f"{check['tolerance']:.0e}"
    reference = (
        "" if check.get("reference") is None else f" (transformers itself {check['reference']:.1e})"
    )
    return what, f"{found}, at most {limit}{reference}{'' if check['passed'] else '  FAILED'}"


def greedy_line(greedy: dict[str, Any]) -> tuple[bool, str]:
    """Whether greedy decoding gave the checkpoint's token ids for every prompt, up to ties, and the line that says so:
    where the others first differ, and how far apart the checkpoint's two best logits are there."""
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
    """The quality measured on text, as people read it."""
    return (
        f"quality on {quality['tokens']} tokens: same best token {quality['agreement']:.1%}, "
        f"perplexity x {quality['perplexity_ratio']:.3f}, divergence {quality['divergence']:.2g} "
        "nats"
    )
