"""Before a run: what can be wrong with a recipe, what it costs, and a small rehearsal of it (`sdxs train --dry-run`)."""
