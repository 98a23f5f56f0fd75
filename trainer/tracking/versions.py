"""What a run ran with: libraries, source, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("sdxs", "torch", "diffusers", "transformers", "peft", "ray", "numpy")


def versions() -> dict[str, Any]:
    """Versions of what computes, the source's revision where there is one, and the machine of the driver."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {name: _version(name) for name in PACKAGES}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda}
    return {"python": platform.python_version(), **found, "source": source(), "machine": machine}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def source() -> str | None:
    """`git describe` of this source tree; None where it is not one."""
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
