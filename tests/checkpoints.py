"""Tiny random checkpoints of every family, as Hugging Face directories.

Every tensor is drawn with a seed from the names of case and tensor, so weights do not depend on the version of
transformers. They are scaled so that greedy output varies instead of repeating one token, and shallow confidences
spread over [0, 1].
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

VOCAB_SIZE = 288  # more than the 259 ids of the tokenizer, as in T5
# Additional tokens for models derived from BART. The tokenizer adds the first to prompts.
LANGUAGES = {"eng_Latn": 259, "deu_Latn": 260, "fra_Latn": 261}

# Prompts as token IDs, valid in every case. They contain no special tokens, such as 0, which is padding in T5.
PROMPTS: tuple[tuple[int, ...], ...] = (
    (87, 104, 101, 44, 35, 100, 115, 35, 118),
    (35,),
    tuple(3 + (37 * step + 11) % 250 for step in range(45)),
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Scale of each kind of block's output, relative to the embedding. With these scales depth changes some predictions, but
# not all. Cross-attention has the lowest, because its output is similar at every step.
SELF_ATTENTION = 1.2
CROSS_ATTENTION = 0.3
MLP = 1.5
LOGIT_SPREAD = 4.0


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        name: Name of the case.
        build: Writes the checkpoint into a directory: configuration, float32 safetensors, tokenizer and generation
            configuration.
        exit_layers: Exit layers worth testing, ascending from 1 to L - 1.
        model: Returns the Hugging Face model of a directory. Default: `load`.
    """

    name: str
    build: Callable[[Path], None]
    exit_layers: tuple[int, ...]
    model: Callable[[Path], Any] | None = None

    @property
    def layers(self) -> int:
        """Number of decoder layers, L."""
        return self.exit_layers[-1] + 1


def load(directory: Path) -> Any:
    """Return the Hugging Face model of a checkpoint, in float32 and evaluation mode."""
    import torch
    import transformers

    (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def _llama(
    name: str, exit_layers: tuple[int, ...], model: str = "Llama", legacy_rope: bool = False, **options: Any
) -> Case:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": exit_layers[-1] + 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    config = {
        **({} if model == "GPT2" else sizes),
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **options,
    }
    config_class = "Gemma3TextConfig" if model == "Gemma3" else f"{model}Config"
    head = "GPT2LMHeadModel" if model == "GPT2" else f"{model}ForCausalLM"
    blueprint = _Blueprint(name, config_class, head, config, t5=False, legacy_rope=legacy_rope)
    return Case(name, partial(_write, blueprint), exit_layers)


def _t5(name: str, exit_layers: tuple[int, ...], model: str = "T5", **options: Any) -> Case:
    config = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 64,
        "num_layers": exit_layers[-1] + 1,
        "num_decoder_layers": exit_layers[-1] + 1,
        # Few buckets and a short range, so that short sequences reach the logarithmic buckets and the last one.
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 40,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **options,
    }
    blueprint = _Blueprint(name, f"{model}Config", f"{model}ForConditionalGeneration", config, t5=True)
    return Case(name, partial(_write, blueprint), exit_layers)


def _bart(
    name: str,
    exit_layers: tuple[int, ...],
    model: str = "Bart",
    generation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Case:
    config = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 32,
        "encoder_layers": exit_layers[-1] + 1,
        "decoder_layers": exit_layers[-1] + 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 72,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
        "tie_word_embeddings": True,
        **options,
    }
    suffix = "MTModel" if model == "Marian" else "ForConditionalGeneration"
    blueprint = _Blueprint(name, f"{model}Config", f"{model}{suffix}", config, t5=True, generation=generation)
    return Case(name, partial(_write, blueprint), exit_layers)


def _t5gemma(name: str, exit_layers: tuple[int, ...], encoder_layers: int, **options: Any) -> Case:
    stack = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": 11,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        **options,
    }
    config = {
        "encoder": {**stack, "num_hidden_layers": encoder_layers, "intermediate_size": 80},
        "decoder": {**stack, "num_hidden_layers": exit_layers[-1] + 1},
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 2,
    }
    model = "T5GemmaForConditionalGeneration"
    return Case(name, partial(_write, _Blueprint(name, "T5GemmaConfig", model, config, t5=True)), exit_layers)


def _t5gemma2(name: str, exit_layers: tuple[int, ...], encoder_layers: int) -> Case:
    kinds = ["sliding_attention", "full_attention"]
    stack = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": 12,
        "query_pre_attn_scalar": 20,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    layers = exit_layers[-1] + 1
    text = {**stack, "num_hidden_layers": encoder_layers, "layer_types": (kinds * encoder_layers)[:encoder_layers]}
    config = {
        "encoder": {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4},
        "decoder": {**stack, "num_hidden_layers": layers, "layer_types": (kinds * layers)[:layers]},
        "image_token_index": 270,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 2,
    }
    model = "T5Gemma2ForConditionalGeneration"
    return Case(name, partial(_write, _Blueprint(name, "T5Gemma2Config", model, config, t5=True)), exit_layers)


@dataclass(frozen=True)
class _Blueprint:
    """Parameters of `_write`.

    Attributes:
        options: Fields of the configuration.
        t5: The model is an encoder-decoder, with the special tokens of T5.
        legacy_rope: Write the rope configuration with the keys of transformers 4.
        generation: Changes to the generation configuration.
    """

    name: str
    config_class: str
    model_class: str
    options: dict[str, Any]
    t5: bool
    legacy_rope: bool = False
    generation: Mapping[str, Any] | None = None

    @property
    def kin_of_bart(self) -> bool:
        return "encoder_layers" in self.options

    @property
    def tied(self) -> bool:
        return bool(self.options["tie_word_embeddings"])


def _write(blueprint: _Blueprint, directory: Path) -> None:
    import transformers
    from safetensors.numpy import save_file

    config = getattr(transformers, blueprint.config_class)(**copy.deepcopy(blueprint.options))
    config.architectures = [blueprint.model_class]
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: shape for name, shape in _shapes(blueprint, config).items() if not _sines(blueprint, name)}
    weights = {name: _draw(blueprint, name, shape) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    generation = transformers.GenerationConfig.from_model_config(config)
    generation.update(**(blueprint.generation or {}))
    generation.save_pretrained(directory)
    config.save_pretrained(directory)
    _write_published_keys(blueprint, directory / "config.json")
    _write_tokenizer(blueprint, directory)


def _shapes(blueprint: _Blueprint, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors. As in published checkpoints, shared tensors have only their first name."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, blueprint.model_class)(config)
    shared = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if "encoder" in blueprint.options:  # T5Gemma's tables are not shared, except in T5Gemma 2
        shared = {"lm_head.out_proj.weight"}
        if blueprint.config_class == "T5Gemma2Config":
            shared |= {"model.decoder.embed_tokens.weight", "model.decoder.embed_tokens.eoi_embedding"}
    elif blueprint.tied:
        shared |= {"lm_head.weight", *(f"model.{name}" for name in shared)}
    else:  # models derived from BART read separate tables
        shared.add("model.shared.weight")
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in shared}


def _sines(blueprint: _Blueprint, name: str) -> bool:
    """Return True if a tensor has computed positions, as in published Marian checkpoints."""
    return name.endswith("embed_positions.weight") and blueprint.model_class.startswith(("Marian", "Pegasus"))


def _draw(blueprint: _Blueprint, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(f"{blueprint.name}/{name}".encode())).standard_normal(shape)
    offset = 1 if "Gemma" in blueprint.model_class else 0  # of norm weights
    of_decoder = ("model.decoder.layer_norm.weight", "model.decoder.norm.weight")
    finals = ("model.norm.weight", "decoder.final_layer_norm.weight", *of_decoder)
    if name == "final_logits_bias" or "embed_positions" in name:
        value = noise
    elif name in (*finals, "transformer.ln_f.weight"):
        # Random signs, because a tied head would otherwise predict each token itself.
        value = np.where(noise > 0, 1, -1) * (1 + 0.2 * np.abs(noise)) - offset
    elif name.endswith(("norm.weight", "layernorm_embedding.weight")) or ".ln_" in name:
        value = (name.endswith("weight") - offset) + 0.2 * noise
    elif name.endswith(("relative_attention_bias.weight", ".bias")):
        value = noise * (2.0 if "relative" in name else 0.3)
    elif name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight", "transformer.wte.weight")):
        value = noise * _vocabulary_scale(blueprint, name, shape[1])
    elif name == "transformer.wpe.weight":
        value = 0.3 * noise * _vocabulary_scale(blueprint, name, shape[1])
    else:
        value = noise * _gain(blueprint, name) / math.sqrt(shape[1] if len(shape) > 1 else 1)
    return value.astype(np.float32)


def _vocabulary_scale(blueprint: _Blueprint, name: str, width: int) -> float:
    """Return the standard deviation of embedding or head rows for which that of the logits is LOGIT_SPREAD."""
    heads = name == "lm_head.weight" or blueprint.tied
    if not heads:
        scaled = blueprint.options.get("scale_embedding", blueprint.config_class == "M2M100Config")
        return 1 / math.sqrt(width) if scaled else 1.0
    scaled = blueprint.tied and blueprint.t5 and "d_kv" in blueprint.options
    return LOGIT_SPREAD if scaled else LOGIT_SPREAD / math.sqrt(width)


def _gain(blueprint: _Blueprint, name: str) -> float:
    """Return the standard deviation of a linear layer's outputs, relative to that of its inputs."""
    outer = (".o.weight", ".wo.weight", ".o_proj.weight", ".down_proj.weight", ".c_proj.weight", "out_proj.weight")
    if not name.endswith((*outer, "fc2.weight")):
        return 1.3
    options = blueprint.options.get("decoder", blueprint.options)
    width = next(options[key] for key in ("d_model", "n_embd", "hidden_size") if key in options)
    if any(part in name for part in ("EncDecAttention", "encoder_attn", "cross_attn")):
        share = CROSS_ATTENTION
    else:
        share = SELF_ATTENTION if any(part in name for part in ("SelfAttention", "self_attn", ".attn.")) else MLP
    if blueprint.kin_of_bart:
        return share / 3  # the norm after each block would soon remove the token's own share
    return share * _vocabulary_scale(blueprint, "shared.weight", width)


def _write_published_keys(blueprint: _Blueprint, path: Path) -> None:
    """Restore keys as in published checkpoints. transformers 5 marks every T5 as tied, and renames rope_scaling."""
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = blueprint.tied
    config.pop("scale_decoder_outputs", None)
    if blueprint.legacy_rope:
        config.pop("rope_parameters", None)
        config["rope_theta"] = blueprint.options["rope_theta"]
        config["rope_scaling"] = blueprint.options.get("rope_scaling")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_tokenizer(blueprint: _Blueprint, directory: Path) -> None:
    """Write a tokenizer of byte-level BPE without merges: three special tokens, then one ID per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"] if blueprint.t5 else ["<unk>", "<s>", "</s>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if blueprint.t5 else "<s> $A",
        special_tokens=[("</s>", 1)] if blueprint.t5 else [("<s>", 1)],
    )
    if blueprint.config_class in ("M2M100Config", "MBartConfig"):
        tokenizer.add_special_tokens(list(LANGUAGES))
        first, *_ = LANGUAGES.items()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first[0]} $A </s>", special_tokens=[first, ("</s>", 1)]
        )
    names = {"eos_token": "</s>", "unk_token": "<unk>"} | (
        {"pad_token": "<pad>"} if blueprint.t5 else {"bos_token": "<s>"}
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if not blueprint.t5:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Few rotations, so that the ramp between the two kinds of frequencies lies inside a small head.
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "original_max_position_embeddings": 128}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * step for step in range(24)],
    "long_factor": [1 + 2.5 * step for step in range(24)],
}

CASES: tuple[Case, ...] = (
    _t5("t5-relu-tied", (1, 2, 3), feed_forward_proj="relu", tie_word_embeddings=True),
    _t5("t5-gated-untied", (1, 3)),
    _t5("t5-gated-tied", (1, 2), tie_word_embeddings=True),
    _t5("t5-deep-decoder", (1, 3, 5), num_layers=2, feed_forward_proj="relu", tie_word_embeddings=True),
    _t5("t5-wide-heads", (1, 2), d_kv=16, num_heads=3),
    _t5("byt5-deep-encoder", (1, 2), num_layers=6, d_model=40, d_ff=104),
    _t5("mt5", (1, 3), model="MT5", num_heads=2, d_kv=16),
    _t5("umt5", (1, 3), model="UMT5"),
    _bart("bart", (1, 2), tie_word_embeddings=False),
    _bart(
        "marian",
        (1, 2),
        model="Marian",
        activation_function="silu",
        tie_word_embeddings=False,
        generation={"bad_words_ids": [[0]]},
    ),
    _bart(
        "m2m100",
        (1, 2),
        model="M2M100",
        decoder_attention_heads=2,
        encoder_layers=2,
        decoder_start_token_id=1,
        tie_word_embeddings=False,
    ),
    _llama("llama-tied", (1, 2, 4), tie_word_embeddings=True),
    _llama("llama-untied-many-eos", (1, 3), eos_token_id=[2, *range(223, 233)]),
    _llama(
        "llama-grouped-llama3-rope",
        (1, 3),
        num_key_value_heads=2,
        rope_theta=5e5,
        rope_scaling=LLAMA3_ROPE,
        legacy_rope=True,
    ),
    _llama("llama-yarn-rope", (1, 3), rope_scaling=YARN_ROPE, num_key_value_heads=1, head_dim=32),
    _llama("llama-biases", (1, 2), attention_bias=True, mlp_bias=True),
    _llama(
        "mistral-window",
        (1, 3),
        model="Mistral",
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=11,
        rope_theta=1e4,
        legacy_rope=True,
    ),
    _llama(
        "qwen2-tied", (1, 2, 3), model="Qwen2", num_key_value_heads=2, tie_word_embeddings=True, intermediate_size=112
    ),
    _llama(
        "qwen3",
        (1, 3),
        model="Qwen3",
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        use_sliding_window=True,
        sliding_window=11,
        max_window_layers=2,
    ),
    _llama("smollm3", (1, 3), model="SmolLM3", num_key_value_heads=2, no_rope_layer_interval=2),
    _llama(
        "granite",
        (1, 2),
        model="Granite",
        tie_word_embeddings=True,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        attention_bias=True,
    ),
    _llama(
        "phi3-longrope",
        (1, 2),
        model="Phi3",
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        original_max_position_embeddings=512,
        max_position_embeddings=4096,
        rope_parameters={**LONG_ROPE, "partial_rotary_factor": 0.75},
    ),
    _llama(
        "gemma2",
        (1, 3),
        model="Gemma2",
        head_dim=32,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        sliding_window=11,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=9.0,
    ),
    _llama(
        "gemma3",
        (1, 2),
        model="Gemma3",
        head_dim=16,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=20,
    ),
    _t5gemma("t5gemma", (1,), encoder_layers=2),
    _llama("gpt2", (1, 2), model="GPT2", tie_word_embeddings=True, n_layer=3, n_head=4, n_embd=64, n_positions=512),
)

# Their graphs have nothing that CASES lack. They add forced tokens, and languages of prompts and outputs.
KIN: tuple[Case, ...] = (
    _bart("bart-forced", (1,), generation={"forced_bos_token_id": 2, "forced_eos_token_id": 1}),
    _bart("mbart", (1, 2), model="MBart", decoder_start_token_id=LANGUAGES["deu_Latn"], scale_embedding=True),
    _bart(
        "nllb",
        (1, 2),
        model="M2M100",
        decoder_start_token_id=1,
        generation={"forced_bos_token_id": LANGUAGES["fra_Latn"]},
    ),
    _bart("pegasus", (1,), model="Pegasus", activation_function="relu", generation={"forced_eos_token_id": 1}),
)

T5GEMMA2 = _t5gemma2("t5gemma2", (1,), encoder_layers=2)

# Weights are large compared with tables, graphs and padding.
LARGER: tuple[Case, ...] = (
    _llama(
        "llama-larger-tied", (1, 2), vocab_size=4096, hidden_size=256, intermediate_size=512, tie_word_embeddings=True
    ),
    _llama("llama-larger-untied", (1, 2), vocab_size=4096, hidden_size=256, intermediate_size=512),
    _t5("t5-larger-tied", (1, 2), vocab_size=4096, d_model=256, d_kv=64, d_ff=512, tie_word_embeddings=True),
    _t5("t5-larger-untied", (1, 2), vocab_size=4096, d_model=256, d_kv=64, d_ff=512),
)

# The size of a head is not a multiple of 16, as in some published models.
HEADS_OF_40: tuple[Case, ...] = (
    _llama("llama-heads-of-40", (1, 2), head_dim=40, num_attention_heads=2, num_key_value_heads=1),
    _t5("t5-heads-of-40", (1, 2), d_kv=40, num_heads=3),
)

# Capacity for answers that take some time.
EIGHT_LAYERS = _llama("llama-eight-layers", (1, 7), num_key_value_heads=2)
LONG = _llama("llama-long", (1, 4), max_position_embeddings=8192)

# Weights are large even compared with what TensorRT adds to an engine.
WIDE: tuple[Case, ...] = (
    _llama("llama-wide", (1,), vocab_size=8192, hidden_size=512, intermediate_size=1536),
    _t5("t5-wide", (1,), vocab_size=8192, d_model=512, d_kv=64, d_ff=2048, num_heads=8),
)

BY_NAME = {case.name: case for case in (*CASES, *KIN, T5GEMMA2, *LARGER, *HEADS_OF_40, LONG, *WIDE)}

# Short prompts of different lengths for calibration.
TEXTS = ["one two three", "four", "x", *(f"line {n} of {n * n} lines" for n in range(33))]


class Bundles(Protocol):
    """Returns the bundle of a case. Options are those of ConvertOptions. Tests must not write into it."""

    def __call__(self, case: Case, exit_layer: int = 1, **options: Any) -> Path: ...


Open = Callable[..., Any]  # opens a session of a case, by name
Sessions = Callable[[str], Any]
Model = Callable[[Case], Any]  # the Hugging Face model of a case
