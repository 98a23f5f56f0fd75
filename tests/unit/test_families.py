"""Random teachers of the real families: complete, loadable, as large as the published ones; and what a folder needs besides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.onestep import probe_folder
from trainer.models.families import FAMILIES, set_image_size, write_teacher, write_tokenizer
from trainer.models.folders import conditioning_folders, is_sdxl, slim, write_model_index, write_one_step_scheduler


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_teacher(name, tmp_path_factory.mktemp("teachers") / name) for name in FAMILIES}


@pytest.mark.parametrize(("name", "kind"), [("sd15", ""), ("sd21", ""), ("sdxl", "XL")])
def test_diffusers_paints_with_them(teachers: dict[str, Path], name: str, kind: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teachers[name])
    assert type(pipeline).__name__ == f"StableDiffusion{kind}Pipeline"
    pipeline.set_progress_bar_config(disable=True)
    image_BHWC = pipeline("a red cat, naïve!", num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert image_BHWC.shape == (1, 64, 64, 3)
    assert image_BHWC.std() > 0.01


def test_small_ones_are_small(tmp_path: Path) -> None:
    folder = write_teacher("sdxl", tmp_path)
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 1_000_000


def test_latents_of_16_channels(tmp_path: Path) -> None:
    folder = write_teacher("sd21", tmp_path, latent_channels=16)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("cat", num_inference_steps=1, output_type="latent").images.shape == (1, 16, 8, 8)
    assert pipeline.vae.config.shift_factor is None


def test_weights_follow_from_the_seed_alone(tmp_path: Path) -> None:
    def weights(folder: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        write_teacher("sd15", tmp_path / folder, seed=seed, dtype=dtype)
        return load_file(tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors")

    before = torch.random.get_rng_state()
    one, torch_state = weights("a", 1), torch.random.get_rng_state()
    assert torch.equal(before, torch_state)
    torch.rand(3)
    again, other = weights("b", 1), weights("c", 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    half = weights("d", 1, torch.bfloat16)
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    stored = load_file(tmp_path / "d" / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "encoders", "vae"),
    [("sd15", [123_060_480], 83_653_863), ("sd21", [340_387_840], 83_653_863), ("sdxl", [123_060_480, 694_659_840], 83_653_863)],
)  # fmt: skip
def test_real_widths(name: str, encoders: list[int], vae: int) -> None:
    """Published sizes: CLIP ViT-L/14 123.06M, ViT-H/14 less a layer 340.39M, bigG/14 694.66M; autoencoder 83.65M."""
    family = FAMILIES[name]
    with torch.device("meta"):
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        found = [
            kind(CLIPTextConfig(**config, vocab_size=49408)) for kind, config in zip(kinds, family.text_encoders, strict=False)
        ]
        autoencoder = AutoencoderKL.from_config(family.vae)
    assert [count(network) for network in found] == encoders
    assert count(autoencoder) == vae
    assert count(autoencoder.decoder) == 49_490_179
    assert family.unet["cross_attention_dim"] == sum(config["hidden_size"] for config in family.text_encoders)


def test_small_teachers_are_of_the_same_make(teachers: dict[str, Path]) -> None:
    for name, folder in teachers.items():
        config = UNet2DConditionModel.load_config(folder / "unet")
        for setting in ("down_block_types", "up_block_types", "mid_block_type", "layers_per_block", "addition_embed_type"):
            assert config.get(setting) == json.loads(json.dumps(FAMILIES[name].unet.get(setting))), setting
        assert len(config["block_out_channels"]) == len(FAMILIES[name].unet["block_out_channels"])


def test_another_image_size(tmp_path: Path) -> None:
    folder = write_teacher("sd15", tmp_path)
    set_image_size(folder, 128)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("cat", num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)
    with pytest.raises(InvalidRequest, match="a multiple of 64"):
        set_image_size(folder, 96)


def test_unknown_families_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="family: got 'sd3', allowed: sd15 or sd21 or sdxl"):
        write_teacher("sd3", tmp_path)


def test_the_tokenizer_reads_anything(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "!")
    ids = tokenizer("Cat, ñ!", padding="max_length", max_length=14)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<|startoftext|>", "c", "a", "t</w>", ",</w>", "Ã", "±</w>", "!", "<|endoftext|>", *"!!!!!"]
    assert (tokenizer.model_max_length, len(tokenizer), tokenizer.pad_token_id) == (77, 514, 0)


def test_an_index_needs_its_networks(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=r"unet/config\.json"):
        write_model_index(tmp_path)


def test_what_a_bundle_takes_over(teachers: dict[str, Path]) -> None:
    assert not is_sdxl(teachers["sd21"])
    assert conditioning_folders(teachers["sd21"]) == ("tokenizer", "text_encoder")
    assert conditioning_folders(teachers["sdxl"]) == ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_starts_from_noise(teachers: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert probe_folder(teachers[name]).timestep == 1  # why a bundle needs another
    write_one_step_scheduler(teachers[name], tmp_path)
    constants = probe_folder(tmp_path)
    assert constants.timestep == 999
    alpha_bar = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
    np.testing.assert_allclose(
        [constants.latent_coefficient, constants.output_coefficient, constants.input_scale],
        [alpha_bar**-0.5, -sigma, 1.0],  # x0 = (z - sigma_T eps) / alpha_T, as training forms it
        rtol=1e-5,
    )


def test_a_scheduler_that_starts_from_noise_is_kept(tiny_bundle: Path, tmp_path: Path) -> None:
    write_one_step_scheduler(tiny_bundle, tmp_path)
    assert (tmp_path / "scheduler/scheduler_config.json").read_text() == (
        tiny_bundle / "scheduler/scheduler_config.json"
    ).read_text()


def test_slim_halves_what_is_stored(tmp_path: Path) -> None:
    folder = write_teacher("sdxl", tmp_path)
    before = load_file(folder / "text_encoder_2" / "model.safetensors")
    slim(folder)
    after = load_file(folder / "text_encoder_2" / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], value.half() if value.is_floating_point() else value)
    assert all("_name_or_path" not in path.read_text() for path in folder.rglob("config.json"))
