"""The one-step pipeline with ControlNets against diffusers' own, on the same random weights, noise and maps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)

from sdxs import Control, bundle, controlnet
from sdxs.control import extract
from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.stages import Decoder
from tests.models import tiny_controlnet, tiny_folder, tiny_sdxl, tiny_unet

CROSS = "UNetMidBlock2DCrossAttn"
PROMPT, SEED = "red apple", 3


def png(image_HWC: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", image_HWC[..., ::-1])[1])


MAPS = [np.random.default_rng(seed).integers(0, 256, (48, 20, 3), dtype=np.uint8) for seed in range(2)]
"""Of another size than the model's."""


def with_controlnets(folder: Path) -> Path:
    """Two of the student kind, one with a mid stage as published, one whose residuals are means of their maps."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for seed, (name, mid, options) in enumerate(
        [("edge", None, {}), ("sketch", None, {}), ("published", CROSS, {}), ("pooled", None, {"global_pool_conditions": True})]
    ):
        tiny_controlnet(unet, folder / "controlnet" / name, seed, mid, **options)
    for name in ("edge", "sketch"):
        (folder / "controlnet" / name / "control_types.json").write_text(f'["{name}"]')
    bundle.seal(folder, "controlled")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_controlnets(tiny_folder(tmp_path_factory.mktemp("bundles") / "controlled"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> OneStepPipeline:
    return recorded(folder)


class Recorder(Decoder):
    """A decoder that keeps what it was given."""

    latent_BCHW: np.ndarray

    def decode(self, latent_BCHW: np.ndarray) -> np.ndarray:
        self.latent_BCHW = latent_BCHW
        return super().decode(latent_BCHW)


def recorded(folder: Path) -> OneStepPipeline:
    pipeline = OneStepPipeline.from_bundle(folder)
    pipeline.decoder.__class__ = Recorder
    return pipeline


def latent(pipeline: OneStepPipeline, controls: list[Control]) -> np.ndarray:
    pipeline(PROMPT, SEED, controls=controls)
    assert isinstance(pipeline.decoder, Recorder)
    kept: np.ndarray = pipeline.decoder.latent_BCHW[0]
    return kept


def reference(
    kind: Any, folder: Path, controls: list[Control], shape: tuple[int, int, int], output: str = "latent"
) -> np.ndarray:
    """What diffusers makes of one step without guidance, from the same noise."""
    networks = [controlnet.load(folder / "controlnet" / each.controlnet) for each in controls]
    pipeline = kind.from_pretrained(
        folder, controlnet=networks if len(networks) > 1 else networks[0], torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    maps = [PIL.Image.fromarray(MAPS[i]) for i in range(len(controls))]
    scales = [each.scale for each in controls]
    size = pipeline.unet.config.sample_size * 8
    assert isinstance(pipeline.controlnet, MultiControlNetModel) == (len(controls) > 1)
    made = pipeline(
        PROMPT, image=maps if len(maps) > 1 else maps[0], height=size, width=size, num_inference_steps=1, guidance_scale=0.0,
        latents=torch.from_numpy(latent_noise(SEED, shape))[None].clone(),
        controlnet_conditioning_scale=scales if len(scales) > 1 else scales[0],
        guess_mode=controls[0].guess, output_type=output,
    )  # fmt: skip
    image: np.ndarray = np.asarray(made.images)[0]
    return image


def control(i: int, name: str, scale: float = 1.0, *, guess: bool = False) -> Control:
    return Control(png(MAPS[i]), controlnet=name, scale=scale, guess=guess, preprocessed=True)


def pixels(pipeline: OneStepPipeline, controls: list[Control]) -> np.ndarray:
    return np.asarray(pipeline(PROMPT, SEED, controls=controls)[0]).astype(float)


CASES = {
    "one": [control(0, "edge")],
    "half as strong": [control(0, "edge", 0.5)],
    "stronger": [control(0, "edge", 1.7)],
    "guess": [control(0, "edge", guess=True)],
    "guess, stronger": [control(0, "edge", 1.5, guess=True)],
    "with a mid stage": [control(0, "published", 0.8)],
    "with a mid stage, guess": [control(0, "published", guess=True)],
    "means": [control(0, "pooled", 0.8)],
    "means, guess": [control(0, "pooled", guess=True)],
    "two": [control(0, "edge", 0.7), control(1, "sketch", 1.2)],
    "two, guess": [control(0, "edge", 0.7, guess=True), control(1, "sketch", 1.2, guess=True)],
    "two, one with a mid stage": [control(0, "published", 0.9), control(1, "edge", 0.4)],
    "the same twice": [control(0, "edge", 0.5), control(1, "edge", 0.5)],
}


def equal(kind: Any, folder: Path, ours: OneStepPipeline, asked: list[Control]) -> None:
    """Latents differ by less than 1e-3, and by much more without the controls."""
    found = latent(ours, asked)
    assert np.abs(found - reference(kind, folder, asked, ours.unet.latent_shape)).max() < 1e-3
    assert np.abs(found - latent(ours, [])).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(folder: Path, ours: OneStepPipeline, name: str) -> None:
    equal(StableDiffusionControlNetPipeline, folder, ours, CASES[name])


def test_equals_diffusers_in_pixels(folder: Path, ours: OneStepPipeline) -> None:
    theirs = reference(StableDiffusionControlNetPipeline, folder, CASES["two"], ours.unet.latent_shape, "np")
    assert np.abs(pixels(ours, CASES["two"]) - theirs * 255).max() <= 0.5 + 0.255  # 1e-3 of the range, and rounding
    assert np.abs(pixels(ours, CASES["two"]) - pixels(ours, [])).max() >= 2


def test_every_case_is_another_image(ours: OneStepPipeline) -> None:
    found = np.stack([latent(ours, asked) for asked in CASES.values()])
    apart = np.abs(found[:, None] - found[None]).max(axis=(2, 3, 4))
    assert (apart + np.eye(len(found)) > 0.01).sum() == len(found) ** 2 - 2  # in guess mode means count the same


def test_equals_diffusers_with_a_scheduler_that_scales_its_input(tmp_path: Path) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    folder = with_controlnets(tiny_folder(tmp_path / "m", scheduler))
    equal(StableDiffusionControlNetPipeline, folder, recorded(folder), CASES["two"])


def test_equals_diffusers_for_sdxl(tmp_path: Path) -> None:
    folder = tiny_sdxl(tmp_path / "m")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for seed, name in enumerate(("edge", "sketch")):
        tiny_controlnet(unet, folder / "controlnet" / name, seed)
    ours = recorded(folder)
    assert ours.manifest.controlnets == {"edge": (), "sketch": ()}
    for asked in ([control(0, "edge", 0.8)], [control(0, "edge", 0.8, guess=True), control(1, "sketch", 0.3, guess=True)]):
        equal(StableDiffusionXLControlNetPipeline, folder, ours, asked)


def test_a_controlnet_beside_the_networks_is_diffusers_own_layout(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tiny_controlnet(tiny_unet(), folder / "controlnet", 0, CROSS)
    ours = OneStepPipeline.from_bundle(folder)
    assert ours.manifest.controlnets == {"controlnet": ()} and isinstance(
        ControlNetModel.from_pretrained(folder, subfolder="controlnet"), ControlNetModel
    )
    assert np.abs(pixels(ours, [control(0, "controlnet")]) - pixels(ours, [])).max() > 0


def test_scale_0_is_no_control(ours: OneStepPipeline) -> None:
    np.testing.assert_array_equal(pixels(ours, [control(0, "edge", 0)]), pixels(ours, []))


def test_a_type_picks_its_controlnet_and_preprocessor(ours: OneStepPipeline) -> None:
    """The map made by hand and sent as such gives the same image."""
    for kind in ("edge", "sketch"):
        by_hand = Control(png(extract(MAPS[0], kind, 32)), controlnet=kind, preprocessed=True)
        asked = Control(png(MAPS[0]), kind)
        np.testing.assert_array_equal(pixels(ours, [asked]), pixels(ours, [by_hand]))
        assert ours.named([asked]) == [replace(asked, controlnet=kind)]
    other = Control(png(MAPS[0]), "edge", controlnet="published")  # says of no type: takes any
    assert ours.named([other]) == [other]
    assert ours.named([Control(png(MAPS[0]), "colour")])[0].controlnet == "pooled"  # the first, by name, that takes any


def test_images_of_a_request_are_computed_alone(ours: OneStepPipeline) -> None:
    asked = CASES["two"]
    three = ours(PROMPT, SEED, 3, asked)
    for i, image in enumerate(three):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(ours(PROMPT, SEED + i, controls=asked)[0]))


def test_a_batch_of_controls_is_as_each_alone(ours: OneStepPipeline) -> None:
    controlnets = ours.controlnets
    assert controlnets is not None
    noise_BCHW = np.stack([latent_noise(seed, ours.unet.latent_shape) for seed in range(3)])
    text = ours.text_encoder.encode(["a", "b", "c"])
    maps_BHWC = np.random.default_rng(5).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    asked = [control(0, "edge", 0.5), control(0, "edge", 2, guess=True), control(0, "edge", 0)]
    weights_BR = np.stack([controlnets.weights(each) for each in asked])
    together = controlnets.residuals(noise_BCHW, text, maps_BHWC, "edge", weights_BR)
    np.testing.assert_allclose(weights_BR[1], 2 * np.logspace(-1, 0, 5), rtol=1e-6)  # 4 down residuals and the mid one
    for i, row in enumerate(together.rows()):
        alone = controlnets.residuals(
            noise_BCHW[i : i + 1], text.rows()[i], maps_BHWC[i : i + 1], "edge", weights_BR[i : i + 1]
        )
        for one, other in zip(row.parts, alone.parts, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert not together.rows()[2].parts[0].any() and together.rows()[0].parts[0].any()


IMAGE = png(MAPS[0])


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        (Control(b"", "edge"), "controls[1].image", "0 bytes"),
        (Control(b"GIF89a", "edge"), "controls[1].image", "no such image"),
        (Control(IMAGE, "crayon"), "controls[1].type", "one of edge, sketch"),
        (Control(IMAGE, "sketch", controlnet="edge"), "controls[1].type", "one that ControlNet edge knows: edge"),
        (
            Control(IMAGE, "edge", controlnet="depth"),
            "controls[1].controlnet",
            r"edge \(edge\); pooled \(any type\); published",
        ),
        (Control(IMAGE), "controls[1].type", "a type, or the name of a ControlNet"),
        (Control(IMAGE, controlnet="edge"), "controls[1].type", "or preprocessed, with the map itself"),
        (Control(IMAGE, "edge", scale=2.1), "controls[1].scale", "0 to 2"),
        (Control(IMAGE, "edge", scale=-0.1), "controls[1].scale", "0 to 2"),
        (Control(IMAGE, "edge", scale=float("nan")), "controls[1].scale", "0 to 2"),
    ],
)
def test_a_bad_control_names_the_part_at_fault(ours: OneStepPipeline, asked: Control, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        ours(PROMPT, controls=[control(0, "edge"), asked])
    assert caught.value.field == field


def test_a_model_without_controlnets_says_so(tiny_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"controls\[0\]: got 'edge', allowed: none: this model has no ControlNet"):
        OneStepPipeline.from_bundle(tiny_bundle)(PROMPT, controls=[Control(IMAGE, "edge")])


def test_the_manifest_says_which_there_are(folder: Path, tmp_path: Path) -> None:
    manifest = bundle.read(folder)
    assert manifest.controlnets == {"edge": ("edge",), "pooled": (), "published": (), "sketch": ("sketch",)}
    assert bundle.parse(manifest.model_dump_json()).digest == manifest.digest
    assert manifest.digest != manifest.model_copy(update={"controlnets": {}}).digest
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    (copy / "bundle.json").unlink()
    for text in ('{"edge": 1}', "[1]", '"edge"'):
        (copy / "controlnet" / "edge" / "control_types.json").write_text(text)
        with pytest.raises(CorruptArtifact, match=r"control_types\.json of ControlNet 'edge' is not a list of names"):
            bundle.seal(copy, "m")


def test_manifests_without_controlnets_are_as_they_were(tiny_bundle: Path) -> None:
    assert "controlnets" not in (tiny_bundle / "bundle.json").read_text()
    assert "controlnets" not in bundle.read(tiny_bundle).model_dump()
