"""From a config.json to a resolved :class:`ModelConfig`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cupyinfer.errors import CheckpointError, ConfigError
from cupyinfer.model.architecture import ModelConfig, RopeConfig
from cupyinfer.model.families import FAMILIES, Family
from cupyinfer.model.families.common import read_token_ids
from cupyinfer.model.fields import Fields
from cupyinfer.types import FLOAT_NAMES

__all__ = ["ModelConfig", "RopeConfig", "read_config", "resolve_config"]


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face model directory: config.json, and generation_config.json's end tokens.

    Raises CheckpointError when a file is missing or is not JSON, ConfigError naming the field, its value and what is
    allowed when the model cannot be run as the file describes it.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return resolve_config(config, read_json(generation) if generation.is_file() else {})


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def resolve_config(config: Any, generation: Any = None) -> ModelConfig:
    """The configuration that a parsed config.json (and generation_config.json) describes. Raises ConfigError."""
    fields = Fields(config)
    family = find_family(fields)
    if fields.get("quantization_config"):
        raise fields.error("quantization_config", fields.get("quantization_config"), "an unquantized checkpoint")
    fields.must_be("is_encoder_decoder", False)
    fields.must_be("pruned_heads", None, {})
    values = family.read(fields)
    fields.finish()
    ends = read_token_ids("generation_config.json: eos_token_id", Fields(generation or {}).get("eos_token_id"))
    ends += read_token_ids("config.json: eos_token_id", fields.get("eos_token_id"))
    bos = read_token_ids("config.json: bos_token_id", fields.get("bos_token_id"))
    vocab = values["vocab_size"]
    return ModelConfig(
        architecture=family.architecture,
        # an id beyond the vocabulary cannot be sampled, and must not reach a kernel that indexes logits with it
        eos_token_ids=tuple(dict.fromkeys(t for t in ends if t < vocab)),
        bos_token_id=bos[0] if bos and bos[0] < vocab else None,
        dtype=_dtype(fields),
        **values,
    )


def find_family(fields: Fields) -> Family:
    """The family that ``architectures`` names, or ``model_type`` when there is no such list; the two must agree."""
    names, kind = fields.get("architectures"), fields.get("model_type")
    if names is None:
        found = [family for family in FAMILIES.values() if family.model_type == kind]
        if not found:
            raise fields.error("model_type", kind, ", ".join(f.model_type for f in FAMILIES.values()))
        return found[0]
    if not isinstance(names, list) or not names or names[0] not in FAMILIES:
        raise fields.error("architectures", names, f"[one of {', '.join(FAMILIES)}]")
    family = FAMILIES[names[0]]
    if kind not in (None, family.model_type):
        raise fields.error("model_type", kind, f"{family.model_type} with architectures={names!r}")
    return family


def _dtype(fields: Fields) -> str:
    """``dtype``, or ``torch_dtype`` in older files; empty when neither is there."""
    name = fields.get("dtype", fields.get("torch_dtype", ""))
    short = name.removeprefix("torch.") if isinstance(name, str) else name
    if short and short not in FLOAT_NAMES:
        raise ConfigError(f"config.json: dtype={name!r} is not allowed; allowed: {', '.join(FLOAT_NAMES)}")
    return short
