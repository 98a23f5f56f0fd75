"""A teacher from its recipe: its stages one after the other, and the folder that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from sdxs.errors import InvalidRequest
from trainer import teacher_stages
from trainer.loop import run_local
from trainer.models.folders import slim, write_model_index
from trainer.recipe import TeacherRecipe


def train_teacher(recipe: TeacherRecipe, output: Path) -> None:
    """Judge, autoencoder and denoiser, one after the other in this process; each resumes from its last checkpoint.

    Plain processes, not Ray: a teacher is given in a distillation, and this one is small.

    Raises:
        InvalidRequest: `output` holds a run of another recipe, which would go on under this one's name.
    """
    output.mkdir(parents=True, exist_ok=True)
    begun, mine = output / "runs" / "recipe.json", recipe.model_dump_json(indent=1) + "\n"
    if begun.exists() and begun.read_text(encoding="utf8") != mine:
        raise InvalidRequest("output", str(output), f"a new folder: {begun} is of another recipe")
    begun.parent.mkdir(exist_ok=True)
    begun.write_text(mine, encoding="utf8")
    for name in teacher_stages.order(recipe):
        run_folder = output / "runs" / name
        run_local(teacher_stages.build(recipe, name, output), run_folder)
        for result in run_folder.iterdir():
            if result.is_dir():
                shutil.copytree(result, output / result.name, dirs_exist_ok=True)
    package_teacher(recipe, output, output / "teacher")


CARD = """# {name}

A small text-to-image diffusion model of {from} in diffusers format: {size:.1f} MB in float16. It exists to be distilled:
a teacher for the demo and the tests, not a product.

- **Data**: {data}
- **Networks**: {parameters}
- **Training**: `sdxs train {name}`; the recipe is `recipe.json`, the loss curves `training.jsonl`.
- **Limits**: it knows its captions and recombines their words; other words are spelt letter by letter and mean nothing to it.
  {limits}
- **Licence**: {licence}
"""
WORLDS = {
    "emoji": {
        "data": "848 Noto Color Emoji renders, 64x64 pixels, under their Unicode names; 85 compositions held out of training.",
        "limits": "Small details (faces of people, lettering) are soft.",
        "licence": "Apache-2.0, as the artwork it learnt from; see NOTICE.",
    },
    "scenes": {
        "data": "720 captions of one coloured shape, drawn by code, 32x32 pixels; 72 held out of training.",
        "limits": "Small shapes are soft: its autoencoder rounds the corners of stars and crosses.",
        "licence": "Apache-2.0.",
    },
}


def _described(recipe: TeacherRecipe) -> dict[str, str]:
    """What a teacher's card says of its data."""
    if recipe.world is not None:
        return {"from": f"the `{recipe.world}` world", **WORLDS[recipe.world]}
    assert recipe.images is not None
    data = f"captioned images of {recipe.images.size} pixels from `{recipe.images.images}`."
    return {"from": "images of its owner", "data": data, "limits": "", "licence": "that of its images."}


def package_teacher(recipe: TeacherRecipe, run: Path, target: Path) -> None:
    """The finished teacher as it ships: float16 weights, recipe, loss curves and card, loadable by StableDiffusionPipeline."""
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(run / name, target / name, dirs_exist_ok=True)
    slim(target)
    write_model_index(target)
    (target / "recipe.json").write_text(recipe.model_dump_json(indent=1) + "\n")
    curves = []
    for stage in teacher_stages.order(recipe):
        log = run / "runs" / stage / "log.jsonl"
        if log.exists():
            curves += [json.dumps({"stage": stage, **json.loads(line)}) for line in log.read_text().splitlines()]
    (target / "training.jsonl").write_text("\n".join(curves) + "\n")
    counts = {p.parent.name: sum(t.numel() for t in load_file(p).values()) for p in sorted(target.rglob("*.safetensors"))}
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors")) / 1e6
    text = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items())
    card = CARD.format(name=recipe.name, size=size, parameters=text, **_described(recipe))
    (target / "README.md").write_text(card)
