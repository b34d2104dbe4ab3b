"""Where a model's files are: a directory, or a download from the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from cupyinfer.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_SKIPPED = ["original/*", "consolidated*", "onnx/*", "*/*"]  # second copies of the weights in other formats


def find_model(path_or_id: str | Path) -> Path:
    """The directory of a model: ``path_or_id`` itself when it is one, else the hub's snapshot of that id.

    Raises CheckpointError when there is no such directory and no such model, or when huggingface_hub is missing.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.is_file():
        raise CheckpointError(f"model={name!r} is a file; allowed: the directory that holds config.json, or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"model={name!r}: there is no such directory, and it is not a hub id (organisation/name)")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"model={name!r}: there is no such directory, and downloading it from the Hugging Face hub needs "
            f"huggingface_hub: pip install huggingface_hub"
        )
    return Path(_download(name))


def _download(name: str) -> Any:
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_SKIPPED)
    except Exception as error:  # the hub's client raises many types: no network, no such model, gated, disk full
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"model={name!r}: there is no such directory, and the hub refused it: {why}") from None
