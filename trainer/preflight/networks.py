"""The networks of a recipe, each traced once on its shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from sdxs.controlnet import config_for
from trainer.models import lora
from trainer.models.conditioning import Conditioning
from trainer.models.controlnets import Controlled, built, residuals
from trainer.models.features import DinoV2Encoder, FeatureEncoder, UNetEncoder, VGGEncoder
from trainer.models.students import decoder_config, feature_names, student_config
from trainer.preflight.given import Recipe, local_base
from trainer.preflight.shapes import TeacherShapes, build, controlnet_shapes, dinov2_config, teacher_shapes, weightless
from trainer.preflight.trace import Trace, trace
from trainer.recipe import ControlNetRecipe, ControlRecipe, DistillRecipe, StyleRecipe
from trainer.sections import FeatureSection, PairsSection
from trainer.stages.decoder import PatchDiscriminator

Config = Mapping[str, Any]


class Controls(NamedTuple):
    """A ControlNet on its U-Net, and how many of their parameters learn."""

    trace: Trace
    learns: int


class Networks:
    """What a recipe trains and asks, without weights."""

    def __init__(self, recipe: Recipe, teacher: TeacherShapes) -> None:
        self.recipe, self.shapes = recipe, teacher
        self.bf16 = recipe.compute.precision == "bf16"
        self._others: dict[str, Trace] = {}
        self._encoders: dict[str, Trace] = {}

    @property
    def latent_elements(self) -> int:
        """Numbers of a latent."""
        return math.prod(self.shapes.latent)

    @property
    def image_elements(self) -> int:
        """Numbers of an image."""
        side = self.shapes.latent[1] * self.shapes.factor
        return 3 * side * side

    @cached_property
    def student_config(self) -> Config:
        """Of the student, or of the bundle that learns a style where it is at hand."""
        recipe = self.recipe
        if isinstance(recipe, StyleRecipe):
            folder = local_base(recipe.base)
            return dict(UNet2DConditionModel.load_config(folder / "unet")) if folder else student_config(self.shapes.unet)
        blocks = None if isinstance(recipe, ControlNetRecipe) else recipe.student.blocks
        return student_config(self.shapes.unet, blocks)

    @cached_property
    def student(self) -> Trace:
        """The student's U-Net."""
        return self._unet(self.shapes, self.student_config)

    @cached_property
    def teacher(self) -> Trace:
        """The teacher's U-Net in the workers' precision, with the outputs that a student learns from."""
        with torch.device("meta"):
            student = build(UNet2DConditionModel, self.student_config, "student")
        return self._unet(self.shapes, self.shapes.unet, feature_names(student)[0])

    @cached_property
    def offline(self) -> Trace:
        """Who gives the offline score, and so the online model."""
        return self.teacher if self._offline_source is None else self._other(self._offline_source)

    @property
    def _offline_source(self) -> str | None:
        """Where the offline model is not the teacher."""
        recipe = self.recipe
        return recipe.offline.teacher if isinstance(recipe, DistillRecipe) and recipe.offline else None

    @cached_property
    def controlnet(self) -> Trace:
        """The teacher's ControlNet, frozen; gradients pass through it to the latent."""
        assert isinstance(self.recipe, ControlRecipe)
        config = controlnet_shapes(self.recipe.controlnet, self.shapes).config
        with weightless():
            network = built(config, "controlnet").requires_grad_(False)
            return trace(network, self._adds, bf16=self.bf16)

    def _adds(self, network: nn.Module, images: int) -> Any:
        latent_BCHW, t_B = torch.zeros(images, *self.shapes.latent, requires_grad=True), torch.zeros(images, dtype=torch.long)
        return residuals(
            network, latent_BCHW, t_B, conditioning(self.shapes, images).arguments(), torch.zeros(images, *self._image)
        )

    @cached_property
    def controlled(self) -> Controls:
        """What learns to control: a ControlNet on a frozen U-Net, the student's, or the teacher's in a run that trains the latter's."""
        config = self.shapes.unet if isinstance(self.recipe, ControlNetRecipe) else self.student_config
        with weightless():
            unet = build(UNet2DConditionModel, config, "unet").requires_grad_(False)
            learns = built(config_for(unet.config, self.shapes.factor), "unet")
            found = trace(Controlled(unet, learns), self._follows, bf16=self.bf16, backward=True)
        return Controls(found, sum(p.numel() for p in learns.parameters()))

    def _follows(self, network: nn.Module, images: int) -> Any:
        t_B, map_BCHW = torch.zeros(images, dtype=torch.long), torch.zeros(images, *self._image)
        return network(
            torch.zeros(images, *self.shapes.latent), t_B, map_BCHW, **conditioning(self.shapes, images).arguments()
        ).sample

    @property
    def up_features(self) -> int:
        """Elements of the teacher's features that belong to up blocks."""
        with torch.device("meta"):
            student = build(UNet2DConditionModel, self.student_config, "student")
        named = zip(feature_names(student)[1], self.teacher.outputs, strict=True)
        return sum(elements for name, elements in named if name.startswith("up_blocks"))

    def drawing(self, section: PairsSection) -> Trace:
        """Who draws samples."""
        return self.teacher if section.teacher is None else self._other(section.teacher)

    def told_of_guidance(self, section: PairsSection) -> bool:
        """Whether who draws takes the guidance as an input, as an LCM does, and so needs one forward for it."""
        shapes = self.shapes if section.teacher is None else teacher_shapes(section.teacher)
        return shapes.unet.get("time_cond_proj_dim") is not None

    def _other(self, source: str) -> Trace:
        """Of another teacher; of one of the same shape the teacher's own."""
        if source not in self._others:
            shapes = teacher_shapes(source)
            alike = _alike(shapes.unet, self.shapes.unet)
            self._others[source] = self.teacher if alike else self._unet(shapes, shapes.unet)
        return self._others[source]

    def encoder(self, section: FeatureSection) -> Trace:
        """f^l of a section; gradients pass through it to the latent."""
        if section.encoder not in self._encoders:
            with weightless():
                encoder = self._encoder(section).requires_grad_(False)
                self._encoders[section.encoder] = trace(encoder, self._seen, bf16=self.bf16)
        return self._encoders[section.encoder]

    def _encoder(self, section: FeatureSection) -> FeatureEncoder:
        if section.encoder == "unet":
            return UNetEncoder(build(UNet2DConditionModel, self.shapes.unet, "teacher.unet"))
        tiny: Any = build(AutoencoderTiny, self._decoder_config, "decoder.config")
        tiny.requires_grad_(False)

        def decode(latent_BCHW: Tensor) -> Tensor:
            image_BCHW: Tensor = tiny.decode(latent_BCHW).sample
            return image_BCHW

        if section.encoder == "vgg":
            return VGGEncoder(decode)
        return DinoV2Encoder(transformers.Dinov2Model(dinov2_config(section.encoder_source or "")), decode)

    @property
    def _decoder_config(self) -> Config:
        """Of the small decoder: the recipe's; else that of the base it goes on from, which where it is not at hand has the usual one."""
        if isinstance(self.recipe, DistillRecipe):
            return self.recipe.decoder.config
        assert isinstance(self.recipe, (StyleRecipe, ControlRecipe))
        folder = local_base(self.recipe.base)
        return (
            dict(AutoencoderTiny.load_config(folder / "vae"))
            if folder
            else decoder_config(self.shapes.latent[0], self.shapes.factor)
        )

    def _seen(self, network: nn.Module, images: int) -> Any:
        return network(torch.zeros(images, *self.shapes.latent, requires_grad=True), conditioning(self.shapes, images))

    @cached_property
    def kl_decoder(self) -> Trace:
        """The teacher's decoder, in float32."""
        with weightless():
            vae: Any = build(AutoencoderKL, self.shapes.vae, "teacher.vae")
            channels, side, _ = self.shapes.latent
            return trace(vae, lambda _, images: vae.decode(torch.zeros(images, channels, side, side)))

    @property
    def vae_parameters(self) -> int:
        """Of the teacher's autoencoder."""
        return self.kl_decoder.parameters

    @cached_property
    def text_parameters(self) -> int:
        """Of all text encoders."""
        with torch.device("meta"):
            networks = [transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)) for config in self.shapes.texts]
        return sum(p.numel() for network in networks for p in network.parameters())

    def _tiny(self, part: str, call: Callable[[Any, int], Any]) -> Trace:
        """A half of the tiny autoencoder. A recipe of a style trains none."""
        assert isinstance(self.recipe, DistillRecipe)
        with weightless():
            network: Any = build(AutoencoderTiny, self.recipe.decoder.config, "decoder.config")
            return trace(getattr(network, part), call, bf16=self.bf16)

    @cached_property
    def tiny_decoder(self) -> Trace:
        """The decoder that the run trains."""
        return self._tiny("decoder", lambda network, images: network(torch.zeros(images, *self.shapes.latent)))

    @cached_property
    def tiny_encoder(self) -> Trace:
        """The encoder beside it."""
        return self._tiny("encoder", lambda network, images: network(torch.zeros(images, *self._image)))

    @property
    def _image(self) -> tuple[int, int, int]:
        side = self.shapes.latent[1] * self.shapes.factor
        return 3, side, side

    @cached_property
    def discriminator(self) -> Trace:
        """Of images, beside the decoder."""
        assert isinstance(self.recipe, DistillRecipe)
        width, latent = self.recipe.decoder.discriminator_width, self.shapes.latent
        with weightless():
            judge = PatchDiscriminator(latent[0], width, self.shapes.factor.bit_length() - 1)
            return trace(
                judge, lambda network, images: network(torch.zeros(images, *self._image), torch.zeros(images, *latent))
            )

    def _unet(self, shapes: TeacherShapes, config: Config, taps: Sequence[str] = ()) -> Trace:
        with weightless():
            unet = build(UNet2DConditionModel, config, "unet")
            return trace(unet, unet_call(shapes), bf16=self.bf16, taps=taps)

    def lora(self, rank: int, of: str, targets: Sequence[str] = lora.EVERYWHERE) -> int:
        """Parameters of a LoRA on the student's U-Net, the teacher's or the offline one's."""
        offline = teacher_shapes(self._offline_source).unet if of == "offline" and self._offline_source else self.shapes.unet
        config = self.student_config if of == "student" else offline
        with torch.device("meta"):
            unet = build(UNet2DConditionModel, config, "unet")
            lora.attach(unet, rank, targets=targets)
        return sum(p.numel() for p in unet.parameters() if p.requires_grad)


def _alike(a: Config, b: Config) -> bool:
    """Whether two configurations say the same; what diffusers notes of itself does not count."""
    plain = [json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True) for config in (a, b)]
    return plain[0] == plain[1]


def conditioning(shapes: TeacherShapes, images: int) -> Conditioning:
    """What a U-Net of these shapes is told beside the timestep, without content."""
    text_BLD = torch.zeros(images, shapes.tokens, shapes.text_width)
    if not shapes.sdxl:
        return Conditioning(text_BLD)
    return Conditioning(text_BLD, torch.zeros(images, shapes.texts[-1]["projection_dim"]), torch.zeros(images, 6))


def unet_call(shapes: TeacherShapes) -> Callable[[nn.Module, int], Any]:
    """Runs a U-Net on so many latents."""

    def call(network: nn.Module, images: int) -> Any:
        t_B = torch.zeros(images, dtype=torch.long)
        return network(torch.zeros(images, *shapes.latent), t_B, **conditioning(shapes, images).arguments()).sample

    return call
