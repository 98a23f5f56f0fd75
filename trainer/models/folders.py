"""What a folder of networks needs besides the networks: diffusers' model index, float16 weights, a scheduler of one step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from sdxs import bundle
from sdxs.onestep import probe_folder

ABSENT = [None, None]


def is_sdxl(folder: Path) -> bool:
    """Whether the U-Net of the folder takes SDXL's added conditioning. Raises CorruptArtifact without a U-Net."""
    return bundle.read_config(folder, "unet/config.json").get("addition_embed_type") == "text_time"


def conditioning_folders(folder: Path) -> tuple[str, ...]:
    """Folders that turn a prompt into what the U-Net is conditioned on: a bundle takes them over from its teacher."""
    one = ("tokenizer", "text_encoder")
    return (*one, "tokenizer_2", "text_encoder_2") if is_sdxl(folder) else one


def write_model_index(folder: Path) -> None:
    """`model_index.json`, with which diffusers' StableDiffusionPipeline or, for SDXL, StableDiffusionXLPipeline loads the folder.

    Raises:
        CorruptArtifact: a network's or the scheduler's configuration is missing.
    """
    files = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}
    index: dict[str, Any] = {
        name: ["diffusers", bundle.read_config(folder, f"{name}/{file}")["_class_name"]] for name, file in files.items()
    }
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder": ["transformers", "CLIPTextModel"]}
    index |= _sdxl_parts() if is_sdxl(folder) else _sd_parts()
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def _sd_parts() -> dict[str, Any]:
    """Of the index, what SD 1.x and 2.x have."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ABSENT,
        "feature_extractor": ABSENT,
        "requires_safety_checker": False,
    }


def _sdxl_parts() -> dict[str, Any]:
    """Of the index, what SDXL has."""
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "image_encoder": ABSENT,
        "feature_extractor": ABSENT,
        "force_zeros_for_empty_prompt": True,
    }


def write_one_step_scheduler(teacher: Path, folder: Path) -> None:
    """`scheduler/` of a one-step bundle: the teacher's own, if its single step starts at the last timestep; else DDIM with trailing
    timesteps, whose one step from unit noise is the x0 that training forms. SD's and SDXL's own schedulers space timesteps from the clean
    end, so that one step of theirs starts at t = 1.

    Raises:
        CorruptArtifact, InvalidRequest: the teacher has no scheduler of diffusers, or one whose step is not linear.
    """
    config = bundle.read_config(teacher, "scheduler/scheduler_config.json")
    if probe_folder(teacher).timestep == config.get("num_train_timesteps", 1000) - 1:
        shutil.copytree(teacher / "scheduler", folder / "scheduler", dirs_exist_ok=True)
        return
    kept = {name: config[name] for name in _NOISE if name in config}
    scheduler = DDIMScheduler(**kept, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.save_pretrained(folder / "scheduler")


_NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Which noise the teacher was trained on and what it predicts."""


def slim(folder: Path) -> None:
    """As a folder of networks ships: weights in float16, configurations without the path they were once loaded from."""
    for path in folder.rglob("*.safetensors"):
        tensors = {
            name: value.half().contiguous() if value.is_floating_point() else value for name, value in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
