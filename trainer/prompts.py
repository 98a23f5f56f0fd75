"""Which prompts a recipe trains on: those of a world, or of a data set of one's own."""

from __future__ import annotations

from sdxs.settings import Settings
from trainer.data.prompts import fetch_prompts, open_prompts
from trainer.data.source import Captions, NoPrompts, PromptSource, WorldPrompts
from trainer.recipe import ControlNetRecipe, RunRecipe
from trainer.worlds.base import get_world


def open_source(recipe: RunRecipe, settings: Settings) -> PromptSource:
    """The prompts of a recipe; a data set is read now if it was not before. Before any actor takes the cluster's CPUs, as Ray Data
    needs a free one.

    Raises:
        NotFound, InvalidRequest: as `open_prompts`, with the file and row.
    """
    if recipe.data is not None:
        return open_prompts(recipe.data, settings)
    if isinstance(recipe, ControlNetRecipe) and recipe.world is None:
        return NoPrompts()
    assert recipe.world is not None
    return WorldPrompts(get_world(recipe.world))


def fetch_source(recipe: RunRecipe, digest: str, settings: Settings) -> PromptSource:
    """The same on a worker, by its digest."""
    return open_source(recipe, settings) if recipe.data is None else fetch_prompts(digest, settings)


class SplitCaptions:
    """A source by its splits, as the evaluation chooses from it."""

    def __init__(self, source: PromptSource) -> None:
        self.source = source

    def captions(self, split: str) -> Captions:
        """The prompts of "train" or "heldout", read as they are asked for."""
        return Captions(self.source, "train" if split == "train" else "heldout")


def prompt_source(recipe: RunRecipe, settings: Settings) -> SplitCaptions:
    """The prompts that a recipe's bundle is evaluated on. Raises as `open_source`."""
    return SplitCaptions(open_source(recipe, settings))
