"""What a recipe costs before it runs: memory of a device, FLOPs, and bytes to the teacher pool, stage by stage.

Counted on the actual shapes. A backward pass counts the forward pass once for the inputs' gradients and once for the weights'; a
network that is frozen or learns a LoRA has only the first. Not counted: text encoders' FLOPs (embeddings are kept), optimiser
steps, discriminator heads, and the workspace of single kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainer.cluster import Cluster
from trainer.models.lora import ATTENTION
from trainer.placement import Deal
from trainer.plan import Step, steps
from trainer.preflight.given import Recipe
from trainer.preflight.networks import Networks
from trainer.preflight.trace import Trace
from trainer.sections import (
    DecoderSection,
    DiffInstructSection,
    FinishSection,
    Optimisation,
    PairsSection,
    StraightenSection,
    StyleSection,
    WarmupSection,
)  # fmt: skip

TYPES = {"float32": 4, "bf16": 2, "fp16": 2}
WIRE = 2  # bytes of a number between worker and pool


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


@dataclass(frozen=True)
class _Learning:
    """A network that learns: which part of its parameters, with a moving average or not, moments of how many bytes a parameter, and
    whether its blocks are computed again for the backward pass."""

    trace: Trace
    learns: int
    average: bool = False
    moments: float = 8.0
    again: bool = False

    @property
    def step(self) -> float:
        """FLOPs of a forward and a backward pass."""
        return self.trace.flops + self.backward

    @property
    def backward(self) -> float:
        """FLOPs of a backward pass."""
        return self.trace.backward(self.learns == self.trace.parameters) + (self.trace.repeated if self.again else 0.0)


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
        found: dict[str, Callable[[str, Any], StageCost]] = {
            "straighten": self._straighten, "decoder": self._decoder, "unet": self._unet, "warmup": self._warmup,
            "diff_instruct": self._diff_instruct, "style": self._diff_instruct, "finish": self._finish,
        }  # fmt: skip
        return found[step.name](step.name, section)

    def _drawn(self, name: str, section: PairsSection) -> StageCost:
        """Teacher samples: `steps` guided forwards each."""
        forwards = section.steps * (1 if self.networks.told_of_guidance(section) else _rows(section.guidance))
        teacher = self.networks.drawing(section)
        return StageCost(
            name, steps=1, batch=section.count, micro=32, memory=Memory(teacher=self._teacher_bytes(teacher)),
            teacher_flops=forwards * teacher.flops, teacher_forwards=forwards, sent=4 * self.latent, received=WIRE * self.latent,
            stored=section.count * (WIRE * self.latent + 8),
        )  # fmt: skip

    def _straighten(self, name: str, section: StraightenSection) -> StageCost:
        unet = self.networks.teacher
        learning = self._learning(
            unet, section, self.networks.lora(section.lora_rank, "teacher") if section.lora_rank else None
        )
        rows = _rows(section.guidance)
        memory = self._memory([learning], section, frozen=unet.parameters, kept=unet.saved)
        return self._stage(
            name, section, memory,
            worker_flops=learning.step + unet.flops, teacher_flops=rows * unet.flops, teacher_forwards=rows,
            sent=WIRE * self.latent, received=WIRE * self.latent,
        )  # fmt: skip

    def _decoder(self, name: str, section: DecoderSection) -> StageCost:
        """Eq. 5: the generator's pass through the discriminator has no weights to learn, its own takes real and generated images."""
        nets = self.networks
        tiny, judge, encode = nets.tiny_decoder, nets.discriminator, nets.tiny_encoder
        gan = section.gan_weight > 0
        learning = [self._learning(tiny, section), _Learning(judge, judge.parameters)]
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
        student, encoder = self.networks.student, self.networks.encoder(section)
        learning = self._learning(student, section)
        memory = self._memory(
            [learning], section, frozen=encoder.parameters,
            kept=lambda n, c: student.saved(n, c) + encoder.saved(n, False),
        )  # fmt: skip
        return self._stage(name, section, memory, worker_flops=learning.step + _through(encoder) + encoder.flops)

    def _finish(self, name: str, section: FinishSection) -> StageCost:
        """A LoRA; the encoder sees a sample for the heads and for eq. 10, a target for it, and both for the heads' own step."""
        student, encoder = self.networks.student, self.networks.encoder(section)
        learning = self._learning(student, section, self.networks.lora(section.lora_rank, "student"))
        memory = self._memory(
            [learning], section, frozen=encoder.parameters, kept=lambda n, c: student.saved(n, c) + 2 * encoder.saved(n, False)
        )
        return self._stage(name, section, memory, worker_flops=learning.step + 2 * _through(encoder) + 3 * encoder.flops)

    def _diff_instruct(self, name: str, section: DiffInstructSection) -> StageCost:
        """Eqs. 11-12: `online_ratio` updates of the online model, its estimate, and the student's own update."""
        nets, several = self.networks, self._deal(section).rounds > 1
        rank = section.rank if isinstance(section, StyleSection) else None
        mine = self._learning(nets.student, section, nets.lora(rank, "student", ATTENTION) if rank else None)
        theirs = _online(section, nets, self.recipe.compute.activation_checkpointing)
        requests = 0 if section.sid else 3 if section.decoupled else 1
        forwards = requests if section.decoupled or section.sid else _rows(section.guidance)
        memory = self._memory(
            [mine, theirs], section, frozen=_frozen(section, nets), kept=partial(_scores_kept, section, nets, several)
        )
        return self._stage(
            name, section, memory, worker_flops=_scores_flops(section, nets, mine, theirs, several),
            teacher_flops=forwards * nets.offline.flops, teacher_forwards=forwards,
            sent=requests * WIRE * self.latent, received=requests * WIRE * self.latent,
        )  # fmt: skip

    def _learning(self, trace: Trace, section: Optimisation, learns: int | None = None) -> _Learning:
        again = self.recipe.compute.activation_checkpointing
        return _Learning(trace, trace.parameters if learns is None else learns, section.ema is not None, again=again)

    def _deal(self, section: Optimisation) -> Deal:
        return Deal.of(section, 0, self.cluster.most_workers)

    def _teacher_bytes(self, teacher: Trace) -> int:
        """A teacher with its text encoders and autoencoder, which compute in float32."""
        rest = 4 * (self.networks.text_parameters + self.networks.vae_parameters)
        return TYPES[self.recipe.compute.teacher_precision] * teacher.parameters + rest

    def _memory(
        self, learning: list[_Learning], section: Optimisation, *, kept: Callable[[int, bool], int], frozen: int = 0
    ) -> Memory:
        """Of a worker: its share of what learns, everything else whole."""
        shards = self.cluster.most_workers if self.recipe.compute.parallel == "fsdp" else 1
        micro = self._deal(section).size
        return Memory(
            weights=sum(4 * one.trace.parameters for one in learning) // shards,
            gradients=sum(4 * one.learns for one in learning) // shards,
            moments=int(sum(one.moments * one.learns for one in learning)) // shards,
            average=sum(4 * one.trace.parameters for one in learning if one.average) // shards,
            frozen=4 * (frozen + self.networks.text_parameters),
            activations=kept(micro, False),
            checkpointed=kept(micro, True),
        )

    def _stage(self, name: str, section: Optimisation, memory: Memory, **numbers: Any) -> StageCost:
        """With a teacher inside the worker, where there is no pool."""
        if self.cluster.teachers == 0 and numbers.get("teacher_flops"):
            inside = self._teacher_bytes(self.networks.offline if name in ("diff_instruct", "style") else self.networks.teacher)
            memory = replace(memory, teacher=inside)
        return StageCost(name, section.steps, section.batch, self._deal(section).size, memory, **numbers)


def _through(trace: Trace) -> float:
    """FLOPs of a frozen network that gradients pass through."""
    return trace.flops + trace.backward(weights=False)


def _online(section: DiffInstructSection, nets: Networks, again: bool) -> _Learning:
    """The online model: the offline model's shape, all of it or a LoRA, moments of 32 or 8 bits."""
    rank, trace = section.online_lora_rank, nets.offline
    learns = nets.lora(rank, "offline", ATTENTION) if rank else trace.parameters
    return _Learning(trace, learns, moments=2.0 if section.online_optimizer == "adamw8bit" else 8.0, again=again)


def _frozen(section: DiffInstructSection, nets: Networks) -> int:
    """Parameters: the encoder where features are matched, and under SiD an offline model in the worker."""
    encoder = nets.encoder(section).parameters if max(section.lambda_fm) > 0 else 0
    return encoder + (nets.offline.parameters if section.sid else 0)


def _scores_flops(section: DiffInstructSection, nets: Networks, mine: _Learning, theirs: _Learning, several: bool) -> float:
    """Of one image. Several micro-batches a step are generated twice: their graphs would not fit side by side."""
    ratio, encoder = section.online_ratio, nets.encoder(section)
    generated = mine.step + nets.student.flops * (ratio - 1 + (1 if several else 0))
    learnt = ratio * theirs.step * (2 if section.latent_gan else 1)
    estimate = _through(nets.offline) * (1 + _rows(section.guidance)) if section.sid else nets.offline.flops
    realism = _through(nets.offline) if section.latent_gan else 0
    matching = _through(encoder) + encoder.flops if max(section.lambda_fm) > 0 else 0
    return generated + learnt + estimate + realism + matching


def _scores_kept(section: DiffInstructSection, nets: Networks, several: bool, images: int, checkpointing: bool) -> int:
    """At the fuller of two moments: the online model's update beside the student's waiting graph, or the student's own."""
    student, encoder = nets.student.saved(images, checkpointing), nets.encoder(section).saved(images, False)
    through = (1 if section.latent_gan else 0) + (1 + _rows(section.guidance) if section.sid else 0)
    learning = nets.offline.saved(images * (2 if section.latent_gan else 1), checkpointing) + (0 if several else student)
    moving = student + (encoder if max(section.lambda_fm) > 0 else 0) + through * nets.offline.saved(images, checkpointing)
    return max(learning, moving)


def _rows(guidance: float) -> int:
    """Forwards of a guided output: with classifier-free guidance the unconditional one too."""
    return 1 if guidance == 1 else 2
