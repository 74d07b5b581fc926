"""The plan of `freeexport fit` as a table, for the terminal and the report."""

from __future__ import annotations

from freeexport.costs.verdict import break_even_text
from freeexport.fit.fit_options import FitOptions
from freeexport.fit.fit_plan import Plan
from freeexport.system.load import load_note
from freeexport.system.progress import duration


def describe_plan(options: FitOptions, plan: Plan) -> list[tuple[str, str]]:
    """Return names and texts that describe a plan, for a page."""
    found = plan.exit
    texts = plan.texts
    training = plan.training
    seconds = plan.seconds
    bits = {
        "int8": "8 bits a weight",
        "int4": "4 bits a weight, as the file has them",
        "fp16": "16 bits a weight",
    }[plan.precision]
    rows = {
        "model": f"{plan.name}, {plan.layers} decoder layers",
        "precision": f"{plan.precision}, {bits}",
    }
    if options.target == "cpu":
        rows["speed"] = (
            f"about {plan.rate:.0f} tokens/s of the full model in {bits[:6]}, by memory bandwidth"
        )
    else:
        rows["speed"] = (
            f"at least {plan.rate:.0f} tokens/s of the full model on {options.device}, by the "
            "bandwidth of main memory, so that steps may take less than planned"
        )
    if plan.ready_made:
        names = ", ".join(plan.ready_made)
        rows["ready-made exits"] = (
            f"{names} fit these weights; what they gain: freeexport exits MODEL"
        )
    if texts is not None:
        inputs = (
            f"recordings, each as expensive as {texts.read:.0f} tokens"
            if texts.speech
            else f"{texts.prompt:.0f} tokens in"
        )
        rows["data"] = f"{inputs}, {texts.target:.0f} out; outputs get at most {texts.max_output}"
        rows["lines"] = ", ".join(f"{count} {name}" for name, count in plan.lines.items())
    if plan.has_exit and options.data is not None:
        rows["existing exit"] = "calibrated and evaluated as it is; only a better one replaces it"
    if found is None or texts is None or training is None:
        drafting = f" with the ready-made exit {plan.drafting}" if plan.drafting else ""
        rows["training"] = (
            f"none: {plan.why}; mode lossless{drafting} generates the full model's tokens"
        )
    else:
        known = (
            f", knowing {found.vocabulary} tokens ({found.covered:.1%} of the targets')"
            if found.vocabulary
            else ""
        )
        even = break_even_text(found.break_even, "bytes")
        reads = "" if found.input == "state" else ", which read the deep decoder's feature"
        place = f"after layer {found.layer}" if found.layer else "before layer 1"
        place = f"the existing one, trained further: {place}" if found.exists else place
        own = f", with {found.own} layer(s) of its own" if found.own else ""
        rows["exit"] = f"{place} of {plan.layers}{own}{reads}{known}: {even}"
        rates = ", ".join(f"{rate:.0%} on {name} tasks" for name, rate in found.rates.items())
        rows["tokens that exit"] = f"{rates}, by what such exits reached on other tasks"
        for name, speed_of in (("a token", float), ("a request", texts.request)):
            speeds = ", ".join(
                f"{speed_of(speed):.2f}x on {kind} tasks" for kind, speed in found.speeds.items()
            )
            rows[f"expected, {name}"] = f"{speeds}, by the bytes that are read"
        weights = "all weights with the exit" if found.input == "state" else "all weights"
        trained = {"joint": weights, "exit": "the exit alone"}
        times = (f"{duration(seconds[name])} of {trained[name]}" for name in plan.trainings)
        each = f"{training.step:.2f} s a step of {training.batch_tokens} tokens"
        speed = f"{training.tokens_per_second:,.0f} tokens/s, {each}"
        rows["training"] = f"{speed}: {', then '.join(times)}"
    rows["time"] = ", ".join(f"{name} {duration(time)}" for name, time in seconds.items())
    rows["in all"] = f"{duration(sum(seconds.values()))} of {duration(options.budget)}"
    rows |= {"missing": plan.missing} if plan.missing else {}
    notes = [note for note in (plan.unwritable, load_note(plan.busy)) if note]
    return [*rows.items(), *(("note", note) for note in notes)]
