"""Networks by hub id: what is downloaded, which revision, and what is said when it cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from sdxs.errors import InvalidRequest, NotFound
from tests.hub import FakeHub, cached
from tests.models import tiny_teacher
from trainer.models.conditioning import Conditioning
from trainer.models.features import VGGEncoder, check_encoder, load_encoder
from trainer.sources import controlnet_folder, load_network, teacher_folder

NAME = "owner/teacher"
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "plain")


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def published(plain: Path, folder: Path) -> Path:
    """As model hubs have it: the weights in four forms, other networks, pictures, and a checkpoint that holds everything."""
    shutil.copytree(plain, folder)
    for path in weights_of(folder):
        for form in (".fp16.safetensors", ".non_ema.safetensors", ".bin", ".fp16.bin"):
            path.with_suffix(form).write_bytes(b"another form")
    (folder / "safety_checker").mkdir()
    for name in ("v1-5-pruned.safetensors", "picture.png", "safety_checker/model.safetensors", "unet/model.msgpack"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """`main` of everything, `half` with fp16 weights alone, `mixed` where only the autoencoder has no plain ones."""
    whole = published(plain, tmp_path / "published")
    half, mixed = (Path(shutil.copytree(whole, tmp_path / name)) for name in ("half", "mixed"))
    for folder, networks in ((half, NETWORKS), (mixed, ("vae",))):
        for path in weights_of(folder):
            if path.name.count(".") == 1 and path.parent.name in networks:
                path.rename(path.with_suffix(".fp16.safetensors"))
    repositories = {(NAME, "main"): whole, (NAME, "half"): half, (NAME, "mixed"): mixed}
    made = FakeHub(repositories, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def forms(hub: FakeHub) -> dict[str, set[str]]:
    """Of each network, the endings of the weights that were downloaded."""
    parts = [path.split("/") for path in hub.fetched if path.count("/") == 1]
    found = [(part, name.partition(".")[2]) for part, name in parts if part in NETWORKS]
    return {part: {ending for other, ending in found if other == part and ending != "json"} for part in NETWORKS}


def test_only_plain_weights_of_a_teachers_own_parts_are_downloaded(hub: FakeHub, plain: Path) -> None:
    folder = teacher_folder(NAME)
    assert forms(hub) == {part: {"safetensors"} for part in NETWORKS}
    expected = {path.relative_to(plain).as_posix() for path in plain.rglob("*") if path.is_file()}
    assert set(hub.fetched) == expected
    assert all((folder / path).read_bytes() == (plain / path).read_bytes() for path in expected)
    hub.fetched.clear()
    assert teacher_folder(NAME) == folder and not hub.fetched  # once


@pytest.mark.parametrize(("revision", "halves"), [("half", NETWORKS), ("mixed", ("vae",))])
def test_a_network_without_plain_weights_comes_in_the_form_it_has(
    hub: FakeHub, plain: Path, revision: str, halves: tuple[str, ...]
) -> None:
    folder = teacher_folder(f"{NAME}@{revision}")
    for part, found in forms(hub).items():
        assert "fp16.safetensors" in found if part in halves else found == {"safetensors"}
        assert not any(ending.endswith("bin") for ending in found)
    [found_unet, expected] = (load_network(UNet2DConditionModel, path / "unet").state_dict() for path in (folder, plain))
    assert all(torch.equal(found_unet[name], value) for name, value in expected.items())


def test_a_hub_that_is_away_serves_what_was_downloaded_before(hub: FakeHub) -> None:
    before = teacher_folder(NAME)
    hub.reachable = False
    assert teacher_folder(NAME) == before
    with pytest.raises(NotFound, match=r"teacher 'owner/teacher@half': no such folder, not downloaded yet, and the hub"):
        teacher_folder(f"{NAME}@half")


def test_a_controlnet_is_downloaded_in_one_form(tmp_path: Path, hub: FakeHub) -> None:
    folder = tmp_path / "controlnet"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "picture.png"):
        (folder / name).write_bytes(b"")
    hub.repositories["owner/edges", "main"] = folder
    controlnet_folder("owner/edges")
    assert hub.fetched == ["config.json", "diffusion_pytorch_model.safetensors"]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    hub.repositories["owner/edges", "half"] = folder
    hub.fetched.clear()
    assert ControlNetModel.load_config(controlnet_folder("owner/edges@half"))["_class_name"] == "ControlNetModel"
    assert hub.fetched == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's own cache, empty, and no hub to be reached."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_the_librarys_own_cache_is_found_offline_by_name_and_revision(cache: Path, plain: Path, tmp_path: Path) -> None:
    other = tiny_teacher(tmp_path / "other", seed=5)
    cached(cache, NAME, "main", plain)
    cached(cache, NAME, "next", other)
    for source, expected in ((NAME, plain), (f"{NAME}@main", plain), (f"{NAME}@next", other)):
        unet = Path("unet", "diffusion_pytorch_model.safetensors")
        assert (teacher_folder(source) / unet).read_bytes() == (expected / unet).read_bytes()
    for absent in (f"{NAME}@gone", "owner/other"):
        with pytest.raises(NotFound, match=f"teacher '{absent}': no such folder, not downloaded yet, and the hub"):
            teacher_folder(absent)


def decode(latent_BCHW: Tensor) -> Tensor:
    return latent_BCHW.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def encoder_folder(kind: str, folder: Path) -> Path:
    """Of random weights, in the files that the real one comes in."""
    torch.manual_seed(4)
    folder.mkdir()
    if kind == "vgg":
        state = VGGEncoder(decode).features.state_dict()
        save_file({f"features.{name}": value for name, value in state.items()}, folder / "model.safetensors")
    else:
        size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
        Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["vgg", "dinov2"])
def test_an_image_encoder_of_the_hub_is_the_one_of_its_files(cache: Path, tmp_path: Path, kind: str) -> None:
    """By the library's own cache, as after a download. One that is not there is refused before anything starts, and by its field."""
    with pytest.raises(InvalidRequest, match="encoder_source: got 'owner/encoder'"):
        check_encoder(kind, "owner/encoder")
    folder = encoder_folder(kind, tmp_path / "encoder")
    cached(cache, "owner/encoder", "main", folder)
    check_encoder(kind, "owner/encoder")
    latent = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = [
        load_encoder(kind, source, tmp_path, decode)(latent, Conditioning(torch.zeros(1, 5, 16)))
        for source in ("owner/encoder", str(folder))
    ]
    assert len(maps[0]) == {"vgg": 5, "dinov2": 4}[kind]
    assert all(torch.equal(found, expected) for found, expected in zip(*maps, strict=True))
    other = encoder_folder("dinov2" if kind == "vgg" else "vgg", tmp_path / "other")
    cached(cache, "owner/other", "main", other)
    with pytest.raises(InvalidRequest, match="encoder_source: got 'owner/other'"):
        check_encoder(kind, "owner/other")
