"""Every command's --help works as a program of its own, and teaches by example."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["sdxs.commands"])


def help_of(*words: str) -> str:
    """What `sdxs WORDS --help` prints; it must end well and say nothing on stderr."""
    program = Path(sys.executable).with_name("sdxs")
    result = subprocess.run([program, *words, "--help"], capture_output=True, text=True, check=False, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


SUBCOMMANDS = {
    "models": ["list", "show", "publish", "promote", "rollback"],
    "loras": ["list", "show", "publish", "promote", "rollback"],
    "data": ["check", "show"],
    "artifacts": ["list", "show", "sweep", "upload"],
    "jobs": ["list", "show", "watch", "cancel", "dead list", "dead show", "dead replay"],
}
CALLS = [f"{command} {word}".strip() for command in COMMANDS for word in SUBCOMMANDS.get(command, [""])]


@pytest.mark.parametrize("call", CALLS)
def test_help_teaches_by_example(call: str) -> None:
    examples = [line for line in help_of(*call.split()).splitlines() if f"sdxs {call}" in line and "Usage:" not in line]
    assert examples


def test_all_commands_are_listed() -> None:
    listed = [line.split()[0] for line in help_of().partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(listed) == COMMANDS
