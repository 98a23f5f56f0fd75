"""`sdxs train`: a recipe of either kind, from its file to its result. The composition root of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from sdxs import bundle, registry
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import teacher_stages
from trainer.artifacts import open_artifacts
from trainer.assemble import check_replaceable
from trainer.card import add_card
from trainer.distill import Distillation
from trainer.folders import slim, write_model_index
from trainer.launch import Cluster
from trainer.loop import run_local
from trainer.preflight import check
from trainer.progress import Bars
from trainer.recipe import AnyRecipe, TeacherRecipe
from trainer.scoring import compare_recipe
from trainer.session import ray_session
from trainer.sinks import sinks
from trainer.tracking import Tracker, told


def run_recipe(recipe: AnyRecipe, output: Path, cluster: Cluster, file: str) -> None:
    """Check a recipe, read from `file`, run it to the end and say where the result is."""
    console = Console()
    if isinstance(recipe, TeacherRecipe):
        train_teacher(recipe, output)
        console.print(f"teacher{f' and judge of {recipe.world}' if recipe.world else ''}: {output}")
        return
    settings = Settings()
    check_replaceable(output)
    check(recipe, cluster, settings, file)
    run_folder = output.with_name(f"{output.name}.run")
    tracker = Tracker(run_folder, open_artifacts(settings), sinks(run_folder))
    with ray_session(), Bars(console) as bars:
        distillation = Distillation(recipe, settings, cluster, told(tracker, bars))
        digests = {step.name: step.digest for step in distillation.plan()}
        with tracker.run(recipe, digests):
            result = distillation.run(output)
    assert result.bundle is not None
    with console.status("evaluating") as status:
        comparison = compare_recipe(result.bundle, bundle.read(result.bundle), recipe, settings)
        rows = comparison.timed(comparison.scores(status.update))
    judge = comparison.judge
    add_card(result.bundle, recipe, rows, judge.accuracy if judge else None, comparison.notes())
    manifest = registry.publish(result.bundle, open_store(settings))
    console.print(f"bundle: {output}\nrun: {run_folder / 'index.html'}\npublished as {manifest.digest}")
    console.print(f"point a name at it:  sdxs models promote {manifest.name} {manifest.digest}")


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
