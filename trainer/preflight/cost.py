"""What a recipe costs before it runs: memory of a device, FLOPs, and bytes to the teacher pool, stage by stage.

Counted on the actual shapes. A backward pass counts the forward pass once for the inputs' gradients and once for the weights'; a
network that is frozen or learns a LoRA has only the first. A ControlNet's is counted as it runs, for gradients reach only the up half of
its U-Net. Not counted: text encoders' FLOPs (embeddings are kept), real images' encoding, optimiser steps, discriminator heads, and the
workspace of single kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trainer.cluster import Cluster
from trainer.models.lora import ATTENTION
from trainer.placement import Deal
from trainer.plan import Step, steps
from trainer.preflight.given import Recipe
from trainer.preflight.learning import NOTHING, Learning, Scores, online, rows, through
from trainer.preflight.networks import Networks
from trainer.preflight.trace import Trace
from trainer.recipe import ControlRecipe
from trainer.sections import (
    ControlNetSection,
    DecoderSection,
    DiffInstructSection,
    FinishSection,
    Optimisation,
    PairsSection,
    SampleImagesSection,
    StraightenSection,
    StyleSection,
    WarmupSection,
)  # fmt: skip

TYPES = {"float32": 4, "bf16": 2, "fp16": 2}
WIRE = 2  # bytes of a number between worker and pool
FILE = {"png": 1.0, "jpeg": 0.1}  # bytes of a pixel's colour in an image's file: at most, and about


CONTROLLED = ("controlled", "control_shrink", "control_diff_instruct")
"""Steps that ask a teacher with its ControlNet."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in one stage. `activations` without and with checkpointing."""

    weights: int = 0
    gradients: int = 0
    moments: int = 0
    average: int = 0
    frozen: int = 0
    teacher: int = 0
    activations: int = 0
    checkpointed: int = 0

    def total(self, checkpointing: bool) -> int:
        """All parts together."""
        state = self.weights + self.gradients + self.moments + self.average + self.frozen + self.teacher
        return state + (self.checkpointed if checkpointing else self.activations)


@dataclass(frozen=True)
class StageCost:
    """One stage. `worker_flops` and all below are of one image; a step has `batch` of them, a device takes `micro` at a time.

    Drawn stages have one step, whose batch is all images. `memory` is a worker's, of drawn stages a teacher's.
    """

    name: str
    steps: int
    batch: int
    micro: int
    memory: Memory
    worker_flops: float = 0.0
    teacher_flops: float = 0.0
    teacher_forwards: int = 0
    sent: int = 0
    received: int = 0
    stored: int = 0

    @property
    def flops(self) -> float:
        """Of the whole stage."""
        return self.steps * self.batch * (self.worker_flops + self.teacher_flops)


def costs(recipe: Recipe, cluster: Cluster, networks: Networks) -> list[StageCost]:
    """Every step of a recipe."""
    return [StageCosts(recipe, cluster, networks).of(step) for step in steps(recipe)]


class StageCosts:
    """The formulas of each stage, in forward passes of its networks."""

    def __init__(self, recipe: Recipe, cluster: Cluster, networks: Networks) -> None:
        self.recipe, self.cluster, self.networks = recipe, cluster, networks
        self.latent = networks.latent_elements

    def of(self, step: Step) -> StageCost:
        """The cost of one step."""
        section = step.section
        if isinstance(section, PairsSection):
            return self._drawn(step.name, section)
        if isinstance(section, SampleImagesSection):
            return self._images(step, section)
        found: dict[str, Callable[[str, Any], StageCost]] = {
            "straighten": self._straighten, "decoder": self._decoder, "unet": self._unet, "warmup": self._warmup,
            "diff_instruct": self._diff_instruct, "style": self._diff_instruct, "finish": self._finish,
            "controlnet": self._controlnet, "control_shrink": self._control_shrink, "control_warmup": self._warmup,
            "control_diff_instruct": self._diff_instruct,
        }  # fmt: skip
        return found[step.name](step.name, section)

    def _drawn(self, name: str, section: PairsSection) -> StageCost:
        """Teacher samples: `steps` guided forwards each."""
        forwards = section.steps * (1 if self.networks.told_of_guidance(section) else rows(section.guidance))
        teacher = self.networks.drawing(section)
        memory = Memory(teacher=self._teacher_bytes(teacher) + self._controlnet_bytes(name))
        beside, map_bytes = self._beside(name)
        return StageCost(
            name, steps=1, batch=section.count, micro=32, memory=memory, teacher_flops=forwards * (teacher.flops + beside.flops),
            teacher_forwards=forwards, sent=4 * self.latent + map_bytes, received=WIRE * self.latent,
            stored=section.count * (WIRE * self.latent + 8),
        )  # fmt: skip

    def _beside(self, name: str) -> tuple[Trace, int]:
        """The ControlNet of who is asked in a step, and the bytes of a map for it."""
        return (self.networks.controlnet, self.networks.image_elements) if name in CONTROLLED else (NOTHING, 0)

    def _controlnet_bytes(self, name: str) -> int:
        """Of its weights."""
        return TYPES[self.recipe.compute.teacher_precision] * self._beside(name)[0].parameters

    def _images(self, step: Step, section: SampleImagesSection) -> StageCost:
        """The pairs that a step reads, decoded by the teacher."""
        nets = self.networks
        read = [other.section for other in steps(self.recipe) if other.name in step.reads]
        count = sum(pairs.count for pairs in read if isinstance(pairs, PairsSection))
        return StageCost(
            step.name, steps=1, batch=count, micro=32, memory=Memory(teacher=self._teacher_bytes(nets.teacher)),
            teacher_flops=nets.kl_decoder.flops, sent=WIRE * self.latent, received=WIRE * nets.image_elements,
            stored=int(count * FILE[section.format] * nets.image_elements),
        )  # fmt: skip

    def _controlnet(self, name: str, section: ControlNetSection) -> StageCost:
        """A ControlNet on the teacher's U-Net; nobody is asked."""
        learning = self._controlled(section)
        return self._stage(
            name, section, self._memory([learning], section, kept=learning.trace.saved), worker_flops=learning.step
        )

    def _control_shrink(self, name: str, section: Optimisation) -> StageCost:
        """As eqs. 6-8, teacher and student each with its ControlNet; only features of the up blocks come back."""
        nets, learning = self.networks, self._controlled(section)
        memory, (beside, map_bytes) = self._memory([learning], section, kept=learning.trace.saved), self._beside(name)
        return self._stage(
            name, section, memory, worker_flops=learning.step, teacher_flops=nets.teacher.flops + beside.flops,
            teacher_forwards=1, sent=WIRE * self.latent + map_bytes, received=WIRE * (self.latent + nets.up_features),
        )  # fmt: skip

    def _controlled(self, section: Optimisation) -> Learning:
        """The ControlNet that the recipe trains, with its frozen U-Net."""
        found = self.networks.controlled
        return self._learning(found.trace, section, found.learns)

    def _straighten(self, name: str, section: StraightenSection) -> StageCost:
        unet = self.networks.teacher
        learning = self._learning(
            unet, section, self.networks.lora(section.lora_rank, "teacher") if section.lora_rank else None
        )
        forwards = rows(section.guidance)
        memory = self._memory([learning], section, frozen=unet.parameters, kept=unet.saved)
        return self._stage(
            name, section, memory,
            worker_flops=learning.step + unet.flops, teacher_flops=forwards * unet.flops, teacher_forwards=forwards,
            sent=WIRE * self.latent, received=WIRE * self.latent,
        )  # fmt: skip

    def _decoder(self, name: str, section: DecoderSection) -> StageCost:
        """Eq. 5: the generator's pass through the discriminator has no weights to learn, its own takes real and generated images."""
        nets = self.networks
        tiny, judge, encode = nets.tiny_decoder, nets.discriminator, nets.tiny_encoder
        gan = section.gan_weight > 0
        learning = [self._learning(tiny, section), Learning(judge, judge.parameters)]
        flops = 3 * tiny.flops + (3 * encode.flops if section.encoder_weight else 0) + (8 * judge.flops if gan else 0)

        def kept(images: int, checkpointing: bool) -> int:
            coder = tiny.saved(images, False) + (encode.saved(images, False) if section.encoder_weight else 0)
            return coder + (judge.saved(images, checkpointing) if gan else 0)

        memory = self._memory(learning, section, frozen=encode.parameters, kept=kept)
        return self._stage(
            name, section, memory, worker_flops=flops, teacher_flops=nets.kl_decoder.flops, teacher_forwards=0,
            sent=WIRE * self.latent, received=WIRE * nets.image_elements,
        )  # fmt: skip

    def _unet(self, name: str, section: Optimisation) -> StageCost:
        """Eqs. 6-8: one forward of the teacher for each of the student; features come back with its output."""
        student, teacher = self.networks.student, self.networks.teacher
        learning = self._learning(student, section)
        memory = self._memory([learning], section, kept=student.saved)
        features = sum(teacher.outputs)
        return self._stage(
            name, section, memory, worker_flops=learning.step, teacher_flops=teacher.flops, teacher_forwards=1,
            sent=WIRE * self.latent, received=WIRE * (self.latent + features),
        )  # fmt: skip

    def _warmup(self, name: str, section: WarmupSection) -> StageCost:
        """Eq. 10: features of the student's sample with gradients, of the teacher's without."""
        encoder, controlled = self.networks.encoder(section), isinstance(self.recipe, ControlRecipe)
        learning = self._controlled(section) if controlled else self._learning(self.networks.student, section)
        memory = self._memory(
            [learning], section, frozen=encoder.parameters,
            kept=lambda n, c: learning.trace.saved(n, c) + encoder.saved(n, False),
        )  # fmt: skip
        return self._stage(name, section, memory, worker_flops=learning.step + through(encoder) + encoder.flops)

    def _finish(self, name: str, section: FinishSection) -> StageCost:
        """A LoRA; the encoder sees a sample for the heads and for eq. 10, a target for it, and both for the heads' own step."""
        student, encoder = self.networks.student, self.networks.encoder(section)
        learning = self._learning(student, section, self.networks.lora(section.lora_rank, "student"))
        memory = self._memory(
            [learning], section, frozen=encoder.parameters, kept=lambda n, c: student.saved(n, c) + 2 * encoder.saved(n, False)
        )
        return self._stage(name, section, memory, worker_flops=learning.step + 2 * through(encoder) + 3 * encoder.flops)

    def _diff_instruct(self, name: str, section: DiffInstructSection) -> StageCost:
        """Eqs. 11-12: `online_ratio` updates of the online model, its estimate, and the student's own update."""
        nets, several = self.networks, self._deal(section).rounds > 1
        mine, theirs = self._generating(section), online(section, nets, self.recipe.compute.activation_checkpointing)
        requests = 0 if section.sid else 3 if section.decoupled else 1
        forwards = requests if section.decoupled or section.sid else rows(section.guidance)
        beside, map_bytes = self._beside(name)
        scores = Scores(section, nets, mine, theirs, beside, several)
        memory = self._memory([mine, theirs], section, frozen=scores.frozen, kept=scores.kept)
        return self._stage(
            name, section, memory, worker_flops=scores.flops,
            teacher_flops=forwards * (nets.offline.flops + beside.flops), teacher_forwards=forwards,
            sent=requests * (WIRE * self.latent + map_bytes), received=requests * WIRE * self.latent,
        )  # fmt: skip

    def _generating(self, section: DiffInstructSection) -> Learning:
        """What generates in one step and learns: the student, a LoRA on it, or its ControlNet."""
        if isinstance(self.recipe, ControlRecipe):
            return self._controlled(section)
        rank = section.rank if isinstance(section, StyleSection) else None
        return self._learning(self.networks.student, section, self.networks.lora(rank, "student", ATTENTION) if rank else None)

    def _learning(self, trace: Trace, section: Optimisation, learns: int | None = None) -> Learning:
        again = self.recipe.compute.activation_checkpointing
        return Learning(trace, trace.parameters if learns is None else learns, section.ema is not None, again=again)

    def _deal(self, section: Optimisation) -> Deal:
        return Deal.of(section, 0, self.cluster.most_workers)

    def _teacher_bytes(self, teacher: Trace) -> int:
        """A teacher with its text encoders and autoencoder, which compute in float32."""
        rest = 4 * (self.networks.text_parameters + self.networks.vae_parameters)
        return TYPES[self.recipe.compute.teacher_precision] * teacher.parameters + rest

    def _memory(
        self, learning: list[Learning], section: Optimisation, *, kept: Callable[[int, bool], int], frozen: int = 0
    ) -> Memory:
        """Of a worker: its share of what learns, everything else whole."""
        shards = self.cluster.most_workers if self.recipe.compute.parallel == "fsdp" else 1
        micro = self._deal(section).size
        return Memory(
            weights=sum(4 * one.trace.parameters for one in learning) // shards,
            gradients=sum(4 * one.learns for one in learning) // shards,
            moments=int(sum(one.moments * one.learns for one in learning)) // shards,
            average=sum(4 * one.learns for one in learning if one.average) // shards,
            frozen=4 * (frozen + self.networks.text_parameters),
            activations=kept(micro, False),
            checkpointed=kept(micro, True),
        )

    def _stage(self, name: str, section: Optimisation, memory: Memory, **numbers: Any) -> StageCost:
        """With a teacher inside the worker, where there is no pool."""
        if self.cluster.teachers == 0 and numbers.get("teacher_flops"):
            nets = self.networks
            inside = self._teacher_bytes(nets.offline if name in ("diff_instruct", "style") else nets.teacher)
            memory = replace(memory, teacher=inside + self._controlnet_bytes(name))
        return StageCost(name, section.steps, section.batch, self._deal(section).size, memory, **numbers)
