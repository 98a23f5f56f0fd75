"""SDXL-like bundles: facts, and the one-step pipeline against diffusers' own StableDiffusionXLPipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DEISMultistepScheduler, StableDiffusionXLPipeline

from sdxs import bundle, tensors
from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.prompts import Prompts
from sdxs.settings import Settings
from sdxs.stages import TextEncoder
from sdxs.v1 import text_encoder_pb2, unet_pb2
from services.fabric.deadline import Deadline
from services.settings import ServingSettings
from services.unet.service import load
from tests.models import tiny_sdxl
from trainer.models.families import write_tokenizer

PROMPTS = ["red apple", "thumbs up, ñ"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_sdxl(tmp_path_factory.mktemp("bundles") / "tiny-sdxl")
    bundle.seal(folder, "tiny-sdxl")
    return folder


@pytest.fixture(scope="module")
def ours(student: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(student)


def reference(folder: Path, prompts: list[str], noise_BCHW: np.ndarray, kind: str) -> np.ndarray:
    """What StableDiffusionXLPipeline makes of one step without guidance."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise_BCHW).clone()
    made = pipeline(prompts, num_inference_steps=1, guidance_scale=0.0, latents=latents, output_type=kind).images
    return np.asarray(made)


def equal(folder: Path) -> None:
    """Latents and images of both pipelines differ by less than 1e-4."""
    ours = OneStepPipeline.from_bundle(folder)
    noise_BCHW = np.stack([latent_noise(seed, ours.unet.latent_shape) for seed in range(len(PROMPTS))])
    latent_BCHW = ours.unet.denoise(noise_BCHW, ours.text_encoder.encode(PROMPTS))
    expected_BCHW = reference(folder, PROMPTS, noise_BCHW, "latent")
    assert np.abs(latent_BCHW - expected_BCHW).max() < 1e-4
    expected_BHWC = reference(folder, PROMPTS, noise_BCHW, "np")
    assert np.abs(ours.decoder.paint(latent_BCHW) - expected_BHWC).max() < 1e-4
    assert expected_BHWC.std() > 0.01  # not a blank picture


def test_equals_diffusers(student: Path) -> None:
    assert bundle.read(student).one_step.latent_coefficient == pytest.approx(14.6488, abs=1e-4)
    equal(student)


def test_equals_diffusers_with_another_scheduler_and_decoder(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "m"))
    (folder / "bundle.json").unlink()
    shutil.rmtree(folder / "scheduler")
    DEISMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    AutoencoderKL(
        latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1, sample_size=64, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, force_upcast=True,
    ).save_pretrained(folder / "vae")  # fmt: skip
    index = folder / "model_index.json"
    text = index.read_text().replace("AutoencoderTiny", "AutoencoderKL")
    index.write_text(text.replace("DDIMScheduler", "DEISMultistepScheduler"))
    equal(folder)


def test_conditioning_is_used(ours: OneStepPipeline) -> None:
    """Text, pooled embedding and sizes each change the latent: equality with diffusers above is not one of ignored inputs."""
    noise_BCHW = latent_noise(0, ours.unet.latent_shape)[None]
    prompts = ours.text_encoder.encode(PROMPTS[:1])
    assert prompts.pooled_BD is not None
    latent = ours.unet.denoise(noise_BCHW, prompts)
    assert np.abs(ours.unet.denoise(noise_BCHW, Prompts(-prompts.text_BLD, prompts.pooled_BD)) - latent).max() > 1e-3
    assert np.abs(ours.unet.denoise(noise_BCHW, Prompts(prompts.text_BLD, -prompts.pooled_BD)) - latent).max() > 1e-3
    other = type(ours.unet)(ours.unet.network, ours.manifest.model_copy(update={"image_size": 512}))
    assert np.abs(other.denoise(noise_BCHW, prompts) - latent).max() > 1e-3


def test_the_encoding_is_both_encoders(ours: OneStepPipeline) -> None:
    prompts = ours.text_encoder.encode(PROMPTS)
    parts, pooled = [], None
    for tokenizer, network in ours.text_encoder.encoders:
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = [network(row[None], output_hidden_states=True) for row in ids]
        parts.append(np.concatenate([one.hidden_states[1].numpy() for one in states]))  # of 3: embeddings, layer 1, layer 2
        pooled = np.concatenate([one[0].numpy() for one in states])
    assert prompts.text_BLD.shape == (2, 77, 16 + 24)
    assert prompts.pooled_BD is not None and pooled is not None
    np.testing.assert_allclose(prompts.text_BLD, np.concatenate(parts, axis=-1), atol=1e-5)
    np.testing.assert_allclose(prompts.pooled_BD, pooled, atol=1e-5)
    one, two = prompts.rows()
    again = Prompts.stack([one, two])
    np.testing.assert_array_equal(again.text_BLD, prompts.text_BLD)
    assert again.pooled_BD is not None and two.pooled_BD is not None
    np.testing.assert_array_equal(again.pooled_BD, prompts.pooled_BD)
    np.testing.assert_array_equal(two.pooled_BD, prompts.pooled_BD[1:])


def test_the_facts(student: Path) -> None:
    manifest = bundle.read(student)
    assert (manifest.text_width, manifest.pooled_width, manifest.max_prompt_tokens) == (40, 20, 77)
    assert (manifest.image_size, manifest.latent_shape) == (64, (4, 8, 8))
    assert json.loads((student / "bundle.json").read_text())["pooled_width"] == 20


def test_other_manifests_are_as_they_were(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "bundle.json").read_text()
    assert "pooled_width" not in text
    manifest = bundle.parse(text)
    assert manifest.pooled_width == 0
    assert manifest.model_copy(update={"pooled_width": 1}).digest != manifest.digest
    assert "pooled_width" not in manifest.model_dump()


def test_the_shipped_bundle_keeps_its_digest() -> None:
    import hashlib

    import sdxs

    text = (Path(sdxs.__file__).parent / "bundles" / "emoji" / "bundle.json").read_text()
    data = json.loads(text)
    del data["created"]
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    assert bundle.parse(text).digest == "sha256:" + hashlib.sha256(canonical).hexdigest()


def test_half_of_the_text_encoders_is_not_enough(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "m"))
    (folder / "bundle.json").unlink()
    write_tokenizer(folder / "tokenizer_2", "!", length=70)
    with pytest.raises(CorruptArtifact, match="77 and 70 tokens"):
        bundle.seal(folder, "m")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(CorruptArtifact, match=r"text_encoder_2/config\.json is missing"):
        bundle.seal(folder, "m")


def test_the_text_encoder_loads_its_own_folders_alone(student: Path, tmp_path: Path, ours: OneStepPipeline) -> None:
    for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
        shutil.copytree(student / name, tmp_path / name)
    alone, together = TextEncoder.from_bundle(tmp_path, Settings()).encode(PROMPTS[:1]), ours.text_encoder.encode(PROMPTS[:1])
    assert alone.pooled_BD is not None and together.pooled_BD is not None
    np.testing.assert_array_equal(alone.pooled_BD, together.pooled_BD)
    with pytest.raises(InvalidRequest, match="at most 77 tokens"):
        ours.text_encoder.check("a" * 76)


async def test_the_unet_room_refuses_what_does_not_fit(student: Path) -> None:
    room = load(student, "ours", ServingSettings())
    text, narrow = tensors.encode(np.zeros((77, 40), np.float32)), tensors.encode(np.zeros(19, np.float32))
    cases = [
        (text_encoder_pb2.EncodeResponse(text=text, model_digest="ours"), "text.pooled"),
        (text_encoder_pb2.EncodeResponse(text=text, pooled=narrow, model_digest="ours"), "text.pooled.shape"),
    ]
    for encoded, field in cases:
        with pytest.raises(InvalidRequest) as caught:
            await room.denoise(unet_pb2.DenoiseRequest(text=encoded, seeds=[1]), Deadline())
        assert caught.value.field == field
    await room.warm()
    room.close()
