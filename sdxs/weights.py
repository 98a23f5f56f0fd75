"""Networks of folders in the format of diffusers and transformers: safetensors alone, and every weight there. Imports torch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sdxs.errors import CorruptArtifact

_ONE_AT_A_TIME = threading.Lock()
"""While the libraries load, modules made in any other thread have no memory behind their weights."""


def load(kind: Any, folder: Path, dtype: torch.dtype, unused: tuple[str, ...] = (), **options: Any) -> Any:
    """A network for inference, of a class with `from_pretrained`, which takes the options; any threads may load at once.

    Raises:
        CorruptArtifact: its weights cannot be read, or one is missing, which the libraries would draw at random, but for those whose names
            begin with one of `unused`.
    """
    told = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        with _ONE_AT_A_TIME:
            network, found = kind.from_pretrained(folder, **told, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CorruptArtifact(f"the weights of {kind.__name__} {folder.name!r} cannot be read: {error}") from error
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(unused))
    if missing:
        raise CorruptArtifact(f"{folder.name} lacks {len(missing)} weights of its {kind.__name__}, among them {missing[0]}")
    return network.eval().requires_grad_(False)
