"""Distillation of multi-step teachers into one-step bundles, on Ray Train."""

import os

# Ray reads it once, when it is first imported, and many modules here import Ray; `trainer.session` adds the token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
