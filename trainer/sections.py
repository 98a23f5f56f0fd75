"""The sections of a recipe: what each stage is told. Fields without a number in the paper are chosen; reasons in docs/training.md."""

from __future__ import annotations

import itertools
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.schedule import Schedule

Precision = Literal["float32", "bf16"]
Shape = Literal["linear", "cosine", "adaptive"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimisation(Section):
    """Updates, batch and learning rate of one network.

    `batch` is the effective one, over all workers. A device takes `micro_batch` of it at a time and accumulates gradients; what is
    drawn depends on `micro_batch`, not on the number of workers. By default a worker takes its whole share at once.
    """

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    lr: float = Field(gt=0)
    warmup: int = Field(default=0, ge=0)
    cosine: bool = False
    restarts: list[int] | None = None
    ema: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup}: the rate never gets there in {self.steps} steps")
        bounds = [self.warmup, *(self.restarts or []), self.steps]
        if self.restarts and not (self.cosine and all(a < b for a, b in itertools.pairwise(bounds))):
            raise ValueError(f"restarts {self.restarts}: they need cosine = true, and ascending steps between warmup and steps")
        return self

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch}: must divide batch {self.batch}")
        return self

    def schedule(self) -> Schedule:
        """The learning-rate schedule these numbers describe."""
        return Schedule(self.steps, self.lr, self.warmup, self.cosine, restarts=tuple(self.restarts or ()))


class ComputeSection(Section):
    """How the numbers are computed. On a CPU `precision` must be float32 (bf16 is slower there and gains nothing).

    `parallel` is how several workers share a network: `ddp` keeps a copy each, `fsdp` (FSDP2) shards weights, gradients and moments.
    `embeddings`: each process keeps those of recent prompts in memory, or all are kept on each machine's `disk`, in float16.
    """

    precision: Precision = "float32"
    teacher_precision: Literal["float32", "bf16", "fp16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    embeddings: Literal["memory", "disk"] = "memory"


class DataSection(Section):
    """Prompts of one's own: a file, folder, glob or s3:// address of text, JSONL, Parquet or WebDataset shards."""

    prompts: str = Field(min_length=1)
    format: Literal["text", "jsonl", "parquet", "webdataset"] | None = None
    column: str = "caption"
    heldout: int = Field(default=256, ge=0)


class ImagesSection(Section):
    """Captioned images: a folder with captions beside the files or in metadata.jsonl, or WebDataset shards; local or s3://."""

    images: str = Field(min_length=1)
    format: Literal["folder", "webdataset"] | None = None
    column: str = "caption"
    size: int = Field(gt=0)


class AutoencoderSection(Optimisation):
    config: dict[str, Any]
    kl: float = Field(default=1e-3, ge=0)
    layout: float = Field(default=1.0, ge=0)
    colour: float = Field(default=0.5, ge=0)


class DenoiserSection(Optimisation):
    unet: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]
    vocabulary: int = Field(gt=0)
    max_tokens: int = Field(gt=2)
    views: int = Field(gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)


class LoraSection(Section):
    """A style LoRA in PEFT or diffusers format: file or folder, and how strongly it is applied."""

    path: str = Field(min_length=1)
    scale: float = Field(default=1.0, gt=0)


class OfflineSection(Section):
    """The model that gives the offline score (eq. 11) where it is not the teacher itself; it shares its latents and text encoder."""

    teacher: str | None = None
    lora: LoraSection | None = None


class StudentSection(Section):
    """Which blocks stay. `sdxs`: no attention at the top level. `cross-attention`: cross-attention there, as in the published "0.9".
    `vega`: SDXL's, as Segmind Vega. By default `vega` for an SDXL teacher and `sdxs` for any other."""

    blocks: Literal["sdxs", "cross-attention", "vega"] | None = None


class PairsSection(Section):
    """Teacher samples: count, solver steps and guidance of psi(x_phi(eps)). `teacher`: a few-step model, if another draws them; SD-Turbo
    and its kind want `euler` with guidance 1, an LCM `lcm`."""

    count: int = Field(gt=0)
    steps: int = Field(default=25, gt=0)
    guidance: float = Field(default=3.0, ge=1)
    solver: Literal["ddim", "dpm", "euler", "lcm"] = "ddim"
    teacher: str | None = None

    @model_validator(mode="after")
    def _few(self) -> Self:
        if self.solver == "lcm" and self.steps > 50:
            raise ValueError(f"steps {self.steps}: an LCM knows 50 timesteps, and is made for 1 to 8")
        return self


class ControlledSection(PairsSection):
    """Samples of the teacher with its ControlNet, under maps of its plain samples that are bent by up to `warp` (`trainer.warps`); a small
    ControlNet then learns from these alone."""

    warp: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _own(self) -> Self:
        if self.teacher is not None:
            raise ValueError(f"teacher {self.teacher}: the ControlNet's own teacher draws these; remove it")
        return self


class DecoderSection(Optimisation):
    """Eq. 5. `pixel_weight` adds a full-resolution L1, `encoder_weight` trains the tiny encoder that image-to-image needs."""

    config: dict[str, Any]
    gan_weight: float = Field(default=0.1, ge=0)
    gan_start: int = Field(default=0, ge=0)
    pixel_weight: float = Field(default=0.0, ge=0)
    encoder_weight: float = Field(default=0.0, ge=0)
    discriminator_lr: float = Field(default=3e-4, gt=0)
    discriminator_width: int = Field(default=32, gt=0)


class ShrinkSection(Optimisation):
    """Eqs. 6-8. `images`: distil on real images instead of the teacher's samples."""

    feature_weight: float = Field(default=1.0, ge=0)
    images: ImagesSection | None = None


class SampleImagesSection(Section):
    """The teacher's samples as images, for control images to be extracted from. JPEG takes a tenth of the room at 512 pixels."""

    format: Literal["png", "jpeg"] = "png"


class ControlNetSection(Optimisation):
    """A ControlNet for the multi-step teacher (arXiv:2302.05543), on captioned images: `views` of a world's, or `images`.

    `caption_dropout`: that share of the captions is empty, so that it learns to see in the map what the image shows. `warp`: a world's
    views are bent so much (trainer.warps): where a caption has one picture, only then does the map say more than it.
    """

    caption_dropout: float = Field(default=0.5, ge=0, lt=1)
    views: int = Field(default=4096, gt=0)
    warp: float = Field(default=0.0, ge=0)
    images: ImagesSection | None = None


class StraightenSection(Optimisation):
    """LCM fine-tuning of the teacher's U-Net (arXiv:2310.04378): straighter paths from noise to sample for the pairs drawn after it.

    It learns on `samples` of the teacher. `grid` is the number of DDIM timesteps a consistency step joins, `lora_rank` trains an LCM-LoRA
    instead of the whole network, `target_ema` is the decay of the network that gives the targets.
    """

    samples: PairsSection
    guidance: float = Field(default=3.0, ge=1)
    grid: int = Field(default=50, gt=1)
    huber: float = Field(default=1e-3, gt=0)
    lora_rank: int | None = Field(default=None, gt=0)
    target_ema: float = Field(default=0.95, ge=0, lt=1)


class FeatureSection(Optimisation):
    """Stages that look at f^l, features of generated images. `unet`: the latent itself and each down block of the teacher's U-Net;
    `vgg`, `dinov2`: layers of an image network, on the decoded latents. `encoder_source` is its local folder or hub id."""

    encoder: Literal["unet", "vgg", "dinov2"] = "unet"
    encoder_source: str | None = None

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        if (self.encoder_source is None) != (self.encoder == "unet"):
            raise ValueError(f"encoder_source {self.encoder_source!r}: vgg and dinov2 need a folder or hub id, unet takes none")
        return self


class MatchingSection(FeatureSection):
    """The feature matching of eq. 10. `feature_weights` are w_l. `student_input`: plain noise, or the target diffused to t = 999.

    `fresh_noise` is the share of the noise's variance that is drawn anew: a ControlNet learns better where only the control image can say
    what is where.
    """

    feature_weights: tuple[float, ...]
    latent_l2: float = Field(default=0.0, ge=0)
    student_input: Literal["noise", "diffused"] = "noise"
    fresh_noise: float = Field(default=0.0, ge=0, le=1)


class WarmupSection(MatchingSection):
    """Eq. 10."""


class ControlShrinkSection(Optimisation):
    """The student's ControlNet learns from the teacher's, both on their own U-Nets: output and the features of the up blocks."""

    feature_weight: float = Field(default=1.0, ge=0)


class LatentGanSection(Section):
    """DMD2's classifier on the online model's features (arXiv:2405.14867): real are diffused teacher samples, fake the student's."""

    weight: float = Field(default=1e-3, gt=0)
    classifier_weight: float = Field(default=1e-2, gt=0)


class DecoupledSection(Section):
    """Decoupled DMD (arXiv:2511.22677): its own re-noise draw, in these bounds of t / T, for the guidance augmentation."""

    t_low: float = Field(default=0.02, ge=0, lt=1)
    t_high: float = Field(default=0.98, gt=0, le=1)


class SidSection(Section):
    """Score identity distillation (arXiv:2404.04057, 2505.12674) in place of eq. 11; may collapse."""

    alpha: float = Field(default=1.0, gt=0)


class DiffInstructSection(MatchingSection):
    """Eqs. 11-12. Pairs of numbers are (start, end) of a schedule: `schedule` moves alpha and lambda_FM by step (linear, cosine), or
    `adaptive`ly, as the gap between online and offline model closes from `overlap`[0] to `overlap`[1] of the widest it was.

    `online_*` describe the online model: all weights or a LoRA of `online_lora_rank`, AdamW with moments of 32 or 8 bits.
    """

    online_lr: float = Field(gt=0)
    online_ratio: int = Field(default=1, gt=0)
    online_lora_rank: int | None = Field(default=None, gt=0)
    online_optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    guidance: float = Field(default=1.75, ge=1)
    schedule_shape: Shape = "linear"
    overlap: tuple[float, float] = (1.0, 0.5)
    alpha: tuple[float, float] = (1.0, 0.8)
    lambda_fm: tuple[float, float] = (1.0, 0.2)
    t_min: float = Field(default=0.02, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.99)
    latent_gan: LatentGanSection | None = None
    decoupled: DecoupledSection | None = None
    sid: SidSection | None = None

    @model_validator(mode="after")
    def _shares(self) -> Self:
        high, low = self.overlap
        if not 1 >= high > low >= 0:
            raise ValueError(f"overlap {self.overlap}: shares of the widest gap, the first above the second")
        return self

    @model_validator(mode="after")
    def _one_objective(self) -> Self:
        if self.decoupled is not None and self.sid is not None:
            raise ValueError("decoupled and sid are different objectives: name one")
        return self


class FinishSection(MatchingSection):
    """The GAN finish on a LoRA of an extremely low rank. Projected-GAN heads (as in StyleGAN-T, ADD) on the features of `encoder`; real are
    the teacher's samples. `anchor` weighs eq. 10's distance to them beside the `gan_weight` of the heads: a heavy one undoes what
    Diff-Instruct did."""

    lora_rank: int = Field(default=1, gt=0)
    gan_weight: float = Field(default=1.0, gt=0)
    anchor: float = Field(default=0.1, ge=0)
    discriminator_lr: float = Field(default=2e-3, gt=0)
    discriminator_width: int = Field(default=64, gt=0)


class StyleSection(DiffInstructSection):
    """Style transfer: Diff-Instruct of a LoRA on a finished student, against an offline model that carries the style's LoRA."""

    rank: int = Field(default=16, gt=0)
    lora_alpha: float | None = Field(default=None, gt=0)


class EvaluationSection(Section):
    """How many images of each split; the teacher's steps and guidance; of how many prompts, and images under one, diversity is taken.

    `warp`: control images are scored a second time, on images bent so much (`trainer.warps`): where a caption has one picture, only those
    say what the caption does not.
    """

    train_images: int = Field(gt=0)
    heldout_images: int = Field(gt=0)
    teacher_steps: int = 25
    teacher_guidance: float = 3.0
    diversity_prompts: int = Field(default=8, ge=0)
    diversity_images: int = Field(default=4, ge=2)
    warp: float = Field(default=0.0, ge=0)
