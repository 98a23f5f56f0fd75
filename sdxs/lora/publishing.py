"""A LoRA's way into the store: read, held against the model it is for, described. Imports torch."""

from __future__ import annotations

import hashlib
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sdxs import bundle, registry
from sdxs.bundle import FileEntry
from sdxs.lora import published
from sdxs.lora.files import check_fit, is_plain, read, save
from sdxs.lora.manifest import LoraManifest
from sdxs.settings import Settings
from sdxs.store import open_store


def publish(
    path: Path, name: str, model: str, settings: Settings, trigger_words: tuple[str, ...] = (), description: str = ""
) -> LoraManifest:
    """Upload a LoRA and point its name at it. A file stays as it is; what PEFT saved becomes one.

    Args:
        name: `name` or `name@pointer`.
        model: what it was made for: name, digest or folder.

    Raises:
        InvalidRequest: it is not a LoRA, is too large, or does not fit the model.
        NotFound: there is no such model.
    """
    own, pointer = published.split_reference(name, "name")
    folder, base = registry.open_model(model, settings)
    weights = read(path, "path")
    check_fit(weights, skeletons(folder), "path", str(path))
    with tempfile.TemporaryDirectory() as place:
        file = path / published.FILE if path.is_dir() else path
        if not is_plain(path):
            file = Path(place) / published.FILE
            save(weights, file)
        with file.open("rb") as opened:
            entry = FileEntry(sha256=hashlib.file_digest(opened, "sha256").hexdigest(), size=file.stat().st_size)
        manifest = LoraManifest(
            name=own, model=base.name, base=base.digest, rank=weights.rank, networks=weights.networks,
            trigger_words=trigger_words, description=description, file=entry,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        store = open_store(settings, "models")
        published.put(manifest, file, store)
    published.promote(own, pointer, manifest.digest, store)
    return manifest


def skeletons(folder: Path) -> dict[str, Any]:
    """The networks of a bundle that LoRAs can change, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        found: dict[str, Any] = {"unet": UNet2DConditionModel.from_config(bundle.read_config(folder, "unet/config.json"))}
        for name, kind in kinds.items():
            if (folder / name).is_dir():
                found[name] = kind(CLIPTextConfig.from_pretrained(folder / name))
    return found
