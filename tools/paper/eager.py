"""Decoders in eager PyTorch, in which FREE's authors compare: the full model and early exits.

`eager` is `generate` of transformers. The other methods share one loop over the modules of a T5:

- `eager-full`: all layers.
- `eager-static`: every token exits after the bundle's exit layer.
- `eager-free`: FREE. Tokens that exit wait, in any number, for the next one that takes all layers.
- `calm`: CALM (Schuster et al. 2022, arXiv 2207.07061). A token exits after any layer, and its
  state is copied: the skipped layers compute their keys and values from it.
- `calm-single`: one exit, as FREE, with states copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.transformers_model import Dtype, greedy_ids, reference_model
from freeexport.evaluate.settings import Setting
from freeexport.training.shallow_deep import exits_of, shared_head
from graphs.description import Description, RelativeBias
from graphs.dialects.base import buckets
from graphs.families import describe
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Precision
from runtime.text.tokenizer import Tokenizer

# Methods of `EarlyExits`.
EARLY = ("eager-full", "eager-static", "eager-free", "calm", "calm-single")
EAGER = ("eager", *EARLY)
KeyValue = tuple[torch.Tensor, torch.Tensor]
_DTYPES: dict[Precision, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}


class TokenTimes:
    """Streamer of transformers that notes when each token was generated."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Note the time. `generate` calls this with the prompt first, and copies to the CPU."""
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class EagerDecoder:
    """Decodes greedily with the PyTorch model of a checkpoint, one prompt at a time.

    Args:
        bundle: Bundle of the checkpoint, whose tokenizer, precision and exit layer are used.
        min_layer: First layer after which `calm` may exit.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        OptionError: If the device is missing.
    """

    def __init__(
        self, bundle: Bundle, checkpoint: str, device: str, threads: int, min_layer: int = 1
    ) -> None:
        torch.set_num_threads(threads)
        self._checkpoint = open_checkpoint(checkpoint)
        self._manifest = bundle.manifest
        dtype = _DTYPES.get(bundle.manifest.precision, "float32")
        self._model = reference_model(self._checkpoint, device, dtype)
        self._tokenizer = Tokenizer.load(bundle.path, bundle.manifest.files)
        description = describe(self._checkpoint.config, self._checkpoint)
        self._exits = None
        if description.family == "t5":
            self._exits = EarlyExits(
                self._model, description, bundle.manifest.exit_layer, min_layer
            )

    @torch.inference_mode()
    def decode(self, setting: Setting, prompt: Any, max_tokens: int) -> dict[str, Any]:
        """Decode a prompt, and return the fields of its record."""
        manifest = self._manifest
        taken: list[int] = []
        began = perf_counter()
        if self._exits is None or setting.method == "eager":
            clock = TokenTimes()
            (made,) = greedy_ids(
                self._model, self._checkpoint, [np.asarray(prompt)], max_tokens, streamer=clock
            )
            ids = made.tolist()
            times = clock.times[1:]
        else:
            ids = []
            times = []
            self._exits.begin(prompt)
            while len(ids) < max_tokens and (not ids or ids[-1] not in manifest.eos_token_ids):
                newest = ids[-1] if ids else manifest.decoder_start_token_id or 0
                token, layers = self._exits.step(newest, setting)
                ids.append(token)
                taken.append(layers)
                times.append(perf_counter())
        seconds = perf_counter() - began
        first = times[0] - began
        ended = ids[-1] in manifest.eos_token_ids
        written = ids[:-1] if ended else ids
        return {
            "seconds": round(seconds, 7),
            "decode_seconds": round(seconds - first, 7),
            "first_seconds": round(first, 7),
            "tokens": len(ids),
            "text": "" if self._tokenizer is None else self._tokenizer.decode(written),
            "token_ids": tuple(ids),
            "exited": tuple(layers < manifest.layers for layers in taken) or (False,) * len(ids),
            "finish_reason": "eos" if ended else "length",
            "layers": sum(taken) or None,
        }


class EarlyExits:
    """A T5 whose tokens may exit early, and the keys and values of one sequence.

    Args:
        exit_layer: Exit layer of all methods but `calm`.
        min_layer: First layer after which `calm` may exit.
    """

    def __init__(
        self, model: Any, description: Description, exit_layer: int, min_layer: int
    ) -> None:
        self._model = model
        self._exit_layer = exit_layer
        self._min_layer = min_layer
        self._layers = description.decoder.layers
        self._blocks = model.get_decoder().block
        self._head = shared_head(model, description)

    def begin(self, prompt: Any) -> None:
        """Run the encoder over a prompt, token ids [n]."""
        ids = torch.tensor(np.asarray(prompt, np.int64)[None], device=self._model.device)
        encoder = self._model.get_encoder()
        self._encoded = encoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0]  # [1, n, d]
        # Keys and values by layer, [1, heads, n, head_dim].
        self._own: dict[int, KeyValue] = {}
        self._cross: dict[int, KeyValue] = {}
        # States [1, 1, d] after the exit layer, of tokens that exited since the last full pass.
        self._waiting: list[torch.Tensor] = []

    def step(self, token: int, setting: Setting) -> tuple[int, int]:
        """Read a token. Returns the next one, and the number of layers that predicted it."""
        layers = len(self._blocks)
        x = self._model.get_input_embeddings()(torch.tensor([[token]], device=self._model.device))
        bar = 1.0 if setting.threshold is None else setting.threshold
        if setting.method in ("eager-static", "eager-free"):
            x = self._through(0, self._exit_layer, x)
            predicted, confidence = self._predict(x)
            if setting.method == "eager-static":
                return predicted, self._exit_layer
            self._waiting.append(x)
            if confidence > bar:
                return predicted, self._exit_layer
            x = self._through(self._exit_layer, layers, torch.cat(self._waiting, dim=1))
            self._waiting.clear()
            return self._predict(x)[0], layers
        exits: Sequence[int] = ()
        if setting.method != "eager-full":
            exits = (
                range(self._min_layer, layers) if setting.method == "calm" else (self._exit_layer,)
            )
        done = 0
        for last in (*exits, layers):
            x = self._through(done, last, x)
            done = last
            predicted, confidence = self._predict(x)
            if confidence > bar:
                break
        for number in range(done, layers):  # copy the state
            own = self._blocks[number].layer[0]
            self._extend(number, own.layer_norm(x))
        return predicted, done

    def _predict(self, x: torch.Tensor) -> tuple[int, float]:
        """Return the prediction of the last row of x [1, k, d], and its confidence."""
        token, confidence = exits_of(self._head(x[:, -1]))
        return int(token), float(confidence)

    def _through(self, first: int, last: int, x: torch.Tensor) -> torch.Tensor:
        """Run layers on x [1, k, d], the newest k positions. Layers count from 0."""
        biases: dict[str, torch.Tensor] = {}
        for number in range(first, last):
            own, cross, mlp = self._blocks[number].layer
            read = own.layer_norm(x)
            keys, values = self._extend(number, read)
            bias = self._layers[number].attention.relative_bias
            assert bias is not None
            if bias.table not in biases:  # layers share one, but for UMT5
                biases[bias.table] = self._bias(bias, x.shape[1], keys.shape[2])
            x = x + attended(own.SelfAttention, read, keys, values, biases[bias.table])
            read = cross.layer_norm(x)
            if number not in self._cross:
                self._cross[number] = keys_and_values(cross.EncDecAttention, self._encoded)
            x = x + attended(cross.EncDecAttention, read, *self._cross[number])
            x = mlp(x)
        return x

    def _extend(self, number: int, read: torch.Tensor) -> KeyValue:
        """Add the keys and values of normed states [1, k, d] to a layer, and return all."""
        found = keys_and_values(self._blocks[number].layer[0].SelfAttention, read)
        if number in self._own:
            keys, values = (
                torch.cat(pair, 2) for pair in zip(self._own[number], found, strict=True)
            )
            found = keys, values
        self._own[number] = found
        return found

    def _bias(self, bias: RelativeBias, queries: int, keys: int) -> torch.Tensor:
        """Return the position bias and causal mask [heads, k, n] of the newest k positions."""
        table = self._model.get_parameter(bias.table)  # [buckets, heads]
        distance = np.arange(keys) - np.arange(keys - queries, keys)[:, None]
        found = table[torch.from_numpy(buckets(distance, bias)).to(table.device)].permute(2, 0, 1)
        later = torch.from_numpy(distance > 0).to(table.device)
        return found.masked_fill(later, float("-inf"))


def keys_and_values(attention: Any, read: torch.Tensor) -> KeyValue:
    """Return keys and values [1, heads, n, head_dim] of normed states [1, n, d]."""
    return _by_head(attention, attention.k(read)), _by_head(attention, attention.v(read))


def attended(
    attention: Any,
    read: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output [1, k, d] of an attention whose queries are those of normed states."""
    scores = _by_head(attention, attention.q(read)) @ keys.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    shares = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    mixed: torch.Tensor = attention.o((shares @ values).transpose(1, 2).flatten(2))
    return mixed


def _by_head(attention: Any, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, attention.key_value_proj_dim)).transpose(1, 2)
