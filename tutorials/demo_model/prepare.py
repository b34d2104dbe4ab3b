"""Turn CPython's standard library into the demo model's tokenizer and token arrays. CPU only, under a minute.

    python prepare.py [--stdlib DIR] [--out data]

Writes into --out:
    tokenizer.json, tokenizer_config.json   byte-level BPE, 4096 entries, lossless, read by transformers too
    train.npy, valid.npy                    uint16 token ids: `<|begin|> document <|end|>` again and again
    meta.json                               where each part of the arrays starts, sizes, versions, licence

train.npy holds three parts, so that train.py can draw from them at different rates: `library` (the modules that people
import), `tests` (Lib/test and its like: twice as much text, but monotonous), and `snippets` (the library's short
top-level functions and classes once more, each a document of its own: that teaches the model to stop after one).
"""

import argparse
import ast
import hashlib
import json
import platform
import random
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<|begin|>", "<|end|>"
VOCAB_SIZE = 4096
MAX_POSITIONS = 1024
HELD_OUT_PERMILLE = 30
SNIPPET_CHARS = (80, 2500)

# What a token may not cross. Identifiers stay whole and digits come in threes at most. A newline and the indentation
# after it are two pieces: a prompt that ends in "\n" or in "\n    " is then cut exactly as the training text was, and
# the model can go on from either. Two or more spaces are one piece, so that an indentation can be one token.
PIECES = "|".join([r"\n+", r" {2,}", r"\t+", r" ?[\p{L}_]+", r" ?\p{N}{1,3}", r" ?[^\s\p{L}\p{N}_]+", r"\s"])

# Tables, prose and deliberately broken files: they may parse, but nobody wants them completed.
EXCLUDED_FOLDERS = {"site-packages", "__pycache__", "pydoc_data", "data"}
EXCLUDED_FILES = {"html/entities.py"}
KEPT_ENCODINGS = {"__init__.py", "idna.py", "punycode.py", "utf_8.py", "utf_8_sig.py", "base64_codec.py"}


def is_wanted(path):
    """Whether the file at `path` (relative to the library) is source code that a person wrote and would read."""
    if path.parts[0] == "encodings":
        return path.name in KEPT_ENCODINGS
    generated = path.as_posix() in EXCLUDED_FILES or path.name.startswith("_sysconfigdata")
    return not generated and not EXCLUDED_FOLDERS & set(path.parts)


def is_test(path):
    """Whether the file belongs to a test suite rather than to the importable library."""
    return bool({"test", "tests", "idle_test"} & set(path.parts[:-1])) or path.name.startswith("test_")


def is_held_out(path):
    """A stable 3 % of the files, chosen by path alone: adding a file never moves another across the split."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PERMILLE


def read_source(file):
    """The file's text with `\\n` line ends, or None when it is not valid Python in its declared encoding."""
    try:
        with tokenize.open(file) as stream:
            text = stream.read()
        ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    return text


def gather(stdlib):
    """List `(relative path, text)` for every wanted file, each distinct text once."""
    documents, seen = [], set()
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib)
        text = read_source(file) if is_wanted(path) else None
        if text is None or len(text) < 40 or text in seen:
            continue
        seen.add(text)
        documents.append((path, text))
    return documents


def top_level_snippets(text):
    """The short functions and classes at the left margin of `text`, decorators included."""
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            snippet = "".join(lines[first - 1 : node.end_lineno])
            if SNIPPET_CHARS[0] <= len(snippet) <= SNIPPET_CHARS[1]:
                yield snippet


def train_tokenizer(texts):
    """A byte-level BPE over `texts`; encoding puts `<|begin|>` first, decoding gives back exactly the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def encode(tokenizer, texts):
    """One uint16 array of `<|begin|> text <|end|>` per text, after checking that every text survives the round trip."""
    end = tokenizer.token_to_id(END)
    encodings = tokenizer.encode_batch(texts)
    for text, encoding in zip(texts, encodings, strict=True):
        if tokenizer.decode(encoding.ids) != text:
            raise ValueError(f"the tokenizer is not lossless on a text that starts {text[:60]!r}")
    ids = [np.array([*encoding.ids, end], np.uint16) for encoding in encodings]
    return np.concatenate(ids) if ids else np.empty(0, np.uint16)


def write_tokenizer(tokenizer, out):
    """The two files that `tokenizers` and transformers' AutoTokenizer read."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": MAX_POSITIONS,
        # transformers would otherwise delete spaces before punctuation when decoding, which changes code.
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_arrays(tokenizer, splits, out):
    """Save `{split: {part: texts}}` as `<split>.npy`; return what meta.json says about them."""
    meta = {}
    for split, parts in splits.items():
        arrays, described, start = [], {}, 0
        for part, texts in parts.items():
            ids = encode(tokenizer, texts)
            size = sum(len(text.encode()) for text in texts)
            described[part] = {"start": start, "tokens": len(ids), "documents": len(texts), "bytes": size}
            start += len(ids)
            arrays.append(ids)
        np.save(out / f"{split}.npy", np.concatenate(arrays))
        meta[split] = described
    return meta


def main():
    """Gather, split, train the tokenizer, encode, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="a Lib folder")
    parser.add_argument("--python-version", default=platform.python_version(), help="the version that --stdlib is of")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    documents = gather(args.stdlib)
    # Neighbours in a folder look alike; shuffled, one document says nothing about the next, as when the model is used.
    random.Random(0).shuffle(documents)
    splits = {split: {"library": [], "tests": []} for split in ("train", "valid")}
    for path, text in documents:
        splits["valid" if is_held_out(path) else "train"]["tests" if is_test(path) else "library"].append(text)
    train = splits["train"]
    train["snippets"] = [snippet for text in train["library"] for snippet in top_level_snippets(text)]
    random.Random(1).shuffle(train["snippets"])

    # The library counts twice against the tests here, too: its identifiers are the ones that people type.
    tokenizer = train_tokenizer(train["library"] * 2 + train["tests"])
    write_tokenizer(tokenizer, args.out)
    meta = {
        "source": f"CPython {args.python_version} standard library (Lib/**/*.py)",
        "licence": "Python Software Foundation License Version 2 (PSF-2.0)",
        "vocabulary": tokenizer.get_vocab_size(),
        "held_out_files": sorted(path.as_posix() for path, _ in documents if is_held_out(path)),
        **write_arrays(tokenizer, splits, args.out),
    }
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for split in splits:
        for part, figures in meta[split].items():
            ratio = figures["bytes"] / max(figures["tokens"], 1)
            counts = f"{figures['documents']:6} documents {figures['tokens']:9} tokens"
            print(f"{split:6}{part:9}{counts} {ratio:5.2f} bytes/token")


if __name__ == "__main__":
    main()
