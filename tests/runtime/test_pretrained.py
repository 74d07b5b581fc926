"""`generate` of FreeModelForCausalLM and FreeModelForSeq2SeqLM returns what transformers' own returns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, PROMPTS, Bundles, Case
from transformers import GenerationConfig, TextStreamer

from runtime import FreeModelForCausalLM, FreeModelForSeq2SeqLM, OptionError, PromptError, Session

ROOT = Path(__file__).resolve().parents[2]
LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-relu-tied"]
PAD = 0


def padded(side: str) -> dict[str, torch.Tensor]:
    """Two prompts of several lengths, padded on one side."""
    rows = [list(PROMPTS[0]), list(PROMPTS[0][:4])]
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    ids = [gap + row if side == "left" else row + gap for gap, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(gap) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(gap)
        for gap, row in zip(fill, rows, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="module")
def llama(bundle: Bundles) -> Iterator[FreeModelForCausalLM]:
    with FreeModelForCausalLM.from_pretrained(bundle(LLAMA), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def t5(bundle: Bundles) -> Iterator[FreeModelForSeq2SeqLM]:
    with FreeModelForSeq2SeqLM.from_pretrained(bundle(T5), threads=1) as model:
        yield model


CASES: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 12},
    {"max_length": 24},
    {"max_new_tokens": 8, "repetition_penalty": 1.3},
    {"max_new_tokens": 8, "do_sample": False, "num_return_sequences": 1, "use_cache": True},
    {"generation_config": GenerationConfig(max_new_tokens=7, repetition_penalty=1.2)},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_padded_batch_gives_the_ids_of_transformers(
    name: str, options: dict[str, Any], request: pytest.FixtureRequest, source_model: Callable[[Case], Any]
) -> None:
    model = request.getfixturevalue(name)
    batch = padded("left" if name == "llama" else "right")
    reference = source_model(LLAMA if name == "llama" else T5)
    expected = reference.generate(**batch, pad_token_id=PAD, **options)
    found = model.generate(**batch, pad_token_id=PAD, **options)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()
    # Another library's arrays, and lists, give numpy arrays.
    arrays = {name: array.numpy() for name, array in batch.items()}
    found = model.generate(arrays["input_ids"].tolist(), attention_mask=arrays["attention_mask"], pad_token_id=PAD,
                           **options)  # fmt: skip
    assert isinstance(found, np.ndarray)
    assert found.tolist() == expected.tolist()


def test_custom_end_of_sequence_and_pad_tokens_are_used(
    llama: FreeModelForCausalLM, source_model: Callable[[Case], Any]
) -> None:
    batch = padded("left")
    whole = source_model(LLAMA).generate(**batch, pad_token_id=PAD, max_new_tokens=12)
    ends = [int(whole[0, 10]), int(whole[1, 12])]
    lasts = set[int]()
    for eos in (*ends, ends):
        options = {**batch, "pad_token_id": PAD, "max_new_tokens": 12, "eos_token_id": eos}
        expected = source_model(LLAMA).generate(**options)
        assert llama.generate(**options).tolist() == expected.tolist()
        lasts.update(expected[:, -1].tolist())
    assert PAD in lasts


@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("t5", "right")])
def test_padding_without_a_mask_is_treated_as_in_transformers(
    name: str, side: str, request: pytest.FixtureRequest, source_model: Callable[[Case], Any]
) -> None:
    ids = padded(side)["input_ids"]
    for pad in (PAD, 2):
        expected = source_model(LLAMA if name == "llama" else T5).generate(ids, max_new_tokens=8, pad_token_id=pad)
        found = request.getfixturevalue(name).generate(ids, max_new_tokens=8, pad_token_id=pad)
        assert found.tolist() == expected.tolist()


def test_beams_match_transformers(t5: FreeModelForSeq2SeqLM, source_model: Callable[[Case], Any]) -> None:
    options = {"num_beams": 3, "max_new_tokens": 8, "length_penalty": 0.5}
    batch = padded("right")
    expected = source_model(T5).generate(**batch, **options)
    assert t5.generate(**batch, **options).tolist() == expected.tolist()


def test_sampling_matches_the_session(llama: FreeModelForCausalLM) -> None:
    prompt = np.array([PROMPTS[0]])
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "seed": 3,
        "max_new_tokens": 6,
    }
    expected = llama.session.generate(list(PROMPTS[0]), **options).token_ids
    assert llama.generate(prompt, **options)[0].tolist() == [*PROMPTS[0], *expected]
    greedy = llama.generate(prompt, max_new_tokens=6)
    with pytest.warns(UserWarning, match=r"^temperature, top_k have no effect without do_sample$"):
        assert llama.generate(prompt, max_new_tokens=6, temperature=0.9, top_k=20).tolist() == greedy.tolist()


def test_a_streamer_gets_prompt_and_tokens(llama: FreeModelForCausalLM, t5: FreeModelForSeq2SeqLM) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.put_: list[Any] = []
            self.ended = False

        def put(self, value: Any) -> None:
            self.put_.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    for model, begin in ((llama, list(PROMPTS[0])), (t5, [0])):
        recorder = Recorder()
        found = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=5, streamer=recorder)
        assert recorder.put_ == [[begin], *([token] for token in found[0, len(begin) :].tolist())]
        assert recorder.ended

    class Decoder:
        def decode(self, ids: Any, **options: Any) -> str:
            return "".join(f"{token} " for token in ids)

    llama.generate([list(PROMPTS[0])], max_new_tokens=2, streamer=TextStreamer(cast(Any, Decoder())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 0.6}, "generate does not support penalty_alpha = 0.6; leave it out"),
        ({"num_return_sequences": 2}, "generate does not support num_return_sequences = 2; give 1"),
        ({"return_dict_in_generate": True}, "generate does not support return_dict_in_generate = True; give False"),
        ({"forced_bos_token_id": 7}, "generate does not support forced_bos_token_id = 7; leave it out"),
        ({"stopping_criteria": [len]}, r"generate does not support stopping_criteria = \[<built-in .*"),
        ({"generation_config": {"no_repeat_ngram_size": 3}}, ".* no_repeat_ngram_size = 3; give 0"),
        ({"generation_config": 3}, "generation_config is 3; give a GenerationConfig or a dict"),
        ({"max_length": 9}, "max_length is 9, but the rows begin with 9 tokens; give max_new_tokens"),
        ({"num_beams": 2}, "num_beams is 2; beam search is for encoder-decoders, .*"),
        (
            {"eos_token_id": 5, "min_new_tokens": 2},
            "min_new_tokens is for the bundle's own eos_token_id; leave one out",
        ),
        ({"streamer": TextStreamer}, "a streamer is for one prompt and one beam; leave it out"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(
    options: dict[str, Any], message: str, llama: FreeModelForCausalLM
) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        llama.generate(**padded("left"), **options)


def test_invalid_prompts_are_refused(llama: FreeModelForCausalLM, t5: FreeModelForSeq2SeqLM) -> None:
    left, right = padded("left"), padded("right")
    for model, batch, message in (
        (llama, right, r"attention_mask has padding that is not on the left; pad on the left \(tokenizer.padding_side"),
        (t5, left, "attention_mask has padding that is not on the right; pad on the right"),
        (llama, {"inputs": [[1, 2], [3]]}, r"inputs is \[\[1, 2\], \[3\]\]; give integers \[B, n\], with rows padded"),
        (llama, {"inputs": [1, 2]}, r"inputs is \[1, 2\]; give integers"),
        (llama, {"inputs": np.array([[0.5]])}, "inputs is array"),
        (llama, {}, r"give the prompts as inputs or as input_ids, \[B, n\]"),
        (llama, {**left, "inputs": [[1]]}, "give the prompts as inputs or as input_ids"),
        (llama, {**left, "attention_mask": [[1]]}, r"attention_mask is \[1, 1\], but inputs are \[2, 9\]"),
        (llama, {"inputs": [[288]]}, "token id 0 of the prompt is 288"),
    ):
        with pytest.raises(PromptError, match=f"^{message}"):
            model.generate(**batch)


def test_bundle_of_the_other_architecture_is_refused(bundle: Bundles) -> None:
    with pytest.raises(OptionError, match=r"^the bundle is an encoder-decoder; use FreeModelForSeq2SeqLM$"):
        FreeModelForCausalLM.from_pretrained(bundle(T5), threads=1)
    with Session(bundle(LLAMA), threads=1) as session, pytest.raises(OptionError, match=r"use FreeModelForCausalLM$"):
        FreeModelForSeq2SeqLM(session)
    with pytest.raises(OptionError, match=r"^unknown option torch_dtype; known are threads"):
        FreeModelForCausalLM.from_pretrained(bundle(LLAMA), torch_dtype="auto")


def test_module_imports_neither_torch_nor_transformers(bundle: Bundles) -> None:
    code = (
        "import sys; from runtime import FreeModelForCausalLM\n"
        f"model = FreeModelForCausalLM.from_pretrained({str(bundle(LLAMA))!r}, threads=1)\n"
        "assert model.generate([[5, 6]], max_new_tokens=2).shape == (1, 4)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
