"""The command line `sdxs`. Subcommands plug in through the entry-point group `sdxs.commands`: the library imports nothing above it.

A subcommand's module is loaded only when it is asked for: `sdxs generate` must not wait for ray.
"""

from __future__ import annotations

import difflib
import sys
from importlib import metadata

from sdxs.errors import InvalidRequest, PreconditionFailed, SdxsError

GROUP = "sdxs.commands"
COMMANDS = {
    "demo": "Everything once: distil, publish, serve, ask for images, report.",
    "generate": "Text to an image file, in this process or from a server.",
    "serve": "Serve a bundle over gRPC until stopped.",
    "jobs": "List, show, watch and cancel jobs of a server; replay dead ones.",
    "artifacts": "List, show and sweep images of jobs and images that steer; upload some.",
    "models": "List, show, publish, promote and roll back bundles.",
    "loras": "Publish, list and show LoRAs; move their names.",
    "train": "Run a recipe on Ray Train.",
    "eval": "Score a bundle beside its teacher.",
    "data": "Check a set of prompts or captioned images, row by row.",
    "bench": "Measure the latency of a bundle's stages.",
}
EXTRAS = {
    "serve": "serve",
    "train": "train",
    "eval": "train",
    "demo": "serve,train",
    "bench": "train",
    "data": "train",
    "generate": "model",
    "loras": "model",
}
HELP = """Usage: sdxs COMMAND [ARGS]...

Distil a diffusion teacher into a one-step student, serve it, ask it for images.

  sdxs generate "red apple" -o apple.png     one image, in this process
  sdxs serve                                 the same over gRPC, as replicas on Ray Serve
  sdxs train emoji                           distil your own
  sdxs COMMAND --help                        each command teaches by example

Commands:
"""


def overview() -> str:
    """The help page of `sdxs` itself."""
    return HELP + "".join(f"  {name:10} {line}\n" for name, line in COMMANDS.items())


def run(name: str, arguments: list[str]) -> None:
    """Load and run one subcommand.

    Raises:
        InvalidRequest: there is no such command.
        PreconditionFailed: it needs packages that are not installed; says which extra brings them.
    """
    entries = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    if name not in entries:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidRequest("command", name, ", ".join(COMMANDS) + hint)
    try:
        command = entries[name].load()
        command(arguments, prog_name=f"sdxs {name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("sdxs", "services", "trainer"):
            raise
        raise PreconditionFailed(
            f'{name} needs {error.name}, which is not installed: pip install "sdxs[{EXTRAS.get(name, "serve")}]"'
        ) from error


def main() -> None:
    """Run the command line; every error of ours is a sentence and an exit code, never a traceback."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return
    try:
        if arguments[0] == "--version":
            sys.stdout.write(f"sdxs {metadata.version('sdxs')}\n")
            return
        run(arguments[0], arguments[1:])
    except SdxsError as error:
        sys.stderr.write(f"sdxs: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("sdxs: interrupted\n")
        sys.exit(130)
