"""Where the demo model is: the small code model that ships with the package."""

from __future__ import annotations

from pathlib import Path

from cupyinfer.errors import CheckpointError


def demo_model_candidates() -> list[Path]:
    """The folders it may be in: inside the installed package, or in a checkout."""
    package = Path(__file__).resolve().parent
    return [package / "demo_model", package.parent / "tutorials" / "demo_model" / "model"]


def demo_model_path() -> Path:
    """The demo model's folder. Raises CheckpointError when it is missing."""
    for folder in demo_model_candidates():
        if (folder / "config.json").is_file():
            return folder
    looked = " and ".join(str(f) for f in demo_model_candidates())
    raise CheckpointError(f"the demo model is missing (looked in {looked}); reinstall cupyinfer or give --model")
