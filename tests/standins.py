"""Tiny tokenizers and models of the kinds that checkpoints carry, built here so that no download is needed."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["def quicksort(items):\n    return sorted(items)\n", "hello world, hello there", "grüße 你好 😀"] * 4
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: 256 bytes and some merges."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool call>", "grüß"])
    made.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    return made


def sentencepiece(strip: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 (strip) and Gemma: spaces spelled as U+2581, unknown characters fall back to bytes."""
    letters = sorted(set(ascii_lowercase + "(),.:\n\u2581"))
    pieces = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *letters, "he", "ll", "hell", "hello", "\u2581hello", "\u2581w"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello"), ("\u2581", "w")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("\u2581")] if strip else []
    made.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return made


def word_piece() -> tokenizers.Tokenizer:
    """A decoder whose text depends on neighbouring tokens: the general way of detokenizing."""
    words = ["[UNK]", *ascii_lowercase, *[f"##{c}" for c in ascii_lowercase], "hello", "##world"]
    made = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    return made


def metaspace() -> tokenizers.Tokenizer:
    """As T5 and XLNet: U+2581 for spaces, dropped at the start of a text; no byte fallback."""
    letters = [(c, -3.0) for c in ascii_lowercase + "你好"]
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("\u2581hello", -1.0), *letters]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


KINDS = {
    "byte_level": byte_level,
    "llama2": sentencepiece,
    "gemma": lambda: sentencepiece(strip=False),
    "word_piece": word_piece,
    "metaspace": metaspace,
}


def write_text_files(directory: Path) -> Path:
    """The text files of a checkpoint: tokenizer.json, tokenizer_config.json, generation_config.json."""
    byte_level().save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    return directory


def write_model(directory: Path, context: int = 256, seed: int = 0) -> Path:
    """A complete tiny Llama with random weights and a byte-level tokenizer: it babbles, but every part is real."""
    write_text_files(directory)
    vocab, E, F, H, K, D = byte_level().get_vocab_size(), 64, 96, 2, 1, 32
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": E,
        "intermediate_size": F,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": D,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, E), "model.norm.weight": (E,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"self_attn.{n}_proj.weight": (rows * D, E) for n, rows in (("q", H), ("k", K), ("v", K))}
        shapes |= {layer + "self_attn.o_proj.weight": (E, H * D), layer + "mlp.down_proj.weight": (E, F)}
        shapes |= {layer + f"mlp.{n}_proj.weight": (F, E) for n in ("gate", "up")}
        shapes |= {layer + f"{n}_layernorm.weight": (E,) for n in ("input", "post_attention")}
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(s, dtype=np.float32) * (0.5 if "embed" in n else 0.15) for n, s in shapes.items()}
    weights |= {n: np.ones(s, np.float32) for n, s in shapes.items() if "norm" in n}
    save_file(weights, str(directory / "model.safetensors"))
    return directory
