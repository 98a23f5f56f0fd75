"""Manifests: what may be sealed, and that every change of a sealed folder is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sdxs import bundle
from sdxs.bundle import Manifest
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be spoilt."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def test_the_facts_are_the_networks_own(tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    assert (manifest.name, manifest.image_size, manifest.latent_shape) == ("tiny", 32, (8, 4, 4))
    assert (manifest.text_width, manifest.max_prompt_tokens, manifest.dtype) == (32, 16, "F32")
    assert manifest.one_step.timestep == 999
    on_disk = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert set(manifest.files) == on_disk - {"bundle.json"}


def test_the_digest_is_of_content_not_of_time(folder: Path) -> None:
    first = bundle.read(folder)
    again = bundle.seal(folder, "tiny")
    assert again.digest == first.digest == first.model_copy(update={"created": "1999-01-01"}).digest
    assert bundle.seal(folder, "tiny", recipe_hash="x").digest != first.digest
    (folder / "card.md").write_text("hello")
    assert bundle.seal(folder, "tiny").digest != first.digest


def test_a_flipped_bit_is_named(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"unet/diffusion_pytorch_model\.safetensors"):
        bundle.read(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"vae/config\.json is missing"):
        bundle.read(folder)


def test_without_a_manifest_there_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        bundle.read(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "unet/model.pt", "weights.pkl", "run.py", ".hidden.json", "noending"])
def test_only_inert_files_are_sealed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(InvalidRequest, match="bundle"):
        bundle.seal(folder, "tiny")


def test_links_are_not_sealed(folder: Path) -> None:
    (folder / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidRequest, match=r"link\.json"):
        bundle.seal(folder, "tiny")


EVIL = [
    "../x.json",
    "/etc/x.json",
    "a/../../x.json",
    "a\\..\\x.json",
    "bundle.json",
    "./x.json",
    "a//x.json",
    ".x.json",
    "x.pkl",
    "",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_manifest_cannot_name_files_outside(tiny_bundle: Path, name: str) -> None:
    data = json.loads((tiny_bundle / "bundle.json").read_text())
    data["files"] = {name: {"sha256": "0" * 64, "size": 0}}
    with pytest.raises(CorruptArtifact, match="files"):
        bundle.parse(json.dumps(data))


@given(st.text(max_size=30))
def test_accepted_paths_stay_inside(name: str) -> None:
    facts: dict[str, Any] = {"sha256": "0" * 64, "size": 0}
    try:
        Manifest.model_validate({**MINIMAL, "files": {name + ".json": facts}})
    except ValidationError:
        return
    root = Path("/bundle")
    assert (root / (name + ".json")).resolve().is_relative_to(root)


MINIMAL: dict[str, Any] = {
    "name": "a", "image_size": 1, "latent_channels": 1, "latent_size": 1, "text_width": 1, "max_prompt_tokens": 1, "dtype": "F16",
    "one_step": {"timestep": 999, "input_scale": 1, "latent_coefficient": 1, "output_coefficient": 1}, "files": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format_version": 2}, "format_version"),
        ({"name": "A B"}, "name"),
        ({"extra": 1}, "extra"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_unknown_or_wrong_facts_are_named(change: dict[str, Any], field: str) -> None:
    assert bundle.parse(json.dumps(MINIMAL)).name == "a"
    with pytest.raises(CorruptArtifact, match=field):
        bundle.parse(json.dumps({**MINIMAL, **change}))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: (f / "unet" / "config.json").unlink(), "unet/config.json"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "vae/config.json"),
        (lambda f: (f / "text_encoder" / "config.json").write_text("{}"), "hidden_size"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "safetensors"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler"),
    ],
)
def test_half_a_diffusers_folder_is_not_sealed(folder: Path, spoil: Any, word: str) -> None:
    (folder / "bundle.json").unlink()
    spoil(folder)
    with pytest.raises(CorruptArtifact, match=word):
        bundle.seal(folder, "tiny")
    assert not (folder / "bundle.json").exists()
