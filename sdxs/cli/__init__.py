"""The command line `sdxs`. Subcommands plug in through the entry-point group `sdxs.commands`, so the library imports nothing above it."""

from __future__ import annotations

import sys
from importlib import metadata

import click
import typer

from sdxs.errors import SdxsError

GROUP = "sdxs.commands"
ORDER = ("demo", "generate", "serve", "models", "train", "eval", "bench")
EXTRAS = {"serve": "serve", "train": "train", "eval": "train", "demo": "serve,train", "bench": "serve,train"}
HELP = """Distil a diffusion teacher into a one-step student, serve it, ask it for images.

\b
  sdxs generate "red apple" -o apple.png     one image, in this process
  sdxs serve                                 the same over gRPC, as replicas on Ray Serve
  sdxs train emoji                           distil your own
  sdxs COMMAND --help                        each command teaches by example
"""


class _Commands(click.Group):
    """Loads a subcommand only when it is asked for: `sdxs generate` must not wait for ray."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return [name for name in ORDER if name in _entry_points()]

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        entry = _entry_points().get(name)
        if entry is None:
            return None
        try:
            loaded = entry.load()
        except ImportError as error:
            return _missing(name, error)
        command = typer.main.get_command(loaded) if isinstance(loaded, typer.Typer) else loaded
        command.name = name
        return command  # type: ignore[no-any-return]

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line each, without importing any of them."""
        lines = {
            "demo": "Everything once: distil, publish, serve, ask for images, report.",
            "generate": "Text to an image file, in this process or from a server.",
            "serve": "Serve a bundle over gRPC until stopped.",
            "models": "List, show, promote and roll back bundles.",
            "train": "Run a recipe on Ray Train.",
            "eval": "Score a bundle against its teacher.",
            "bench": "Measure latency and throughput.",
        }
        with formatter.section("Commands"):
            formatter.write_dl([(name, lines[name]) for name in ORDER])


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def _missing(name: str, error: ImportError) -> click.Command:
    """A command that says what to install."""

    @click.command(name=name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def explain() -> None:
        extra = EXTRAS.get(name, "serve")
        click.echo(f'sdxs {name} needs more than the client ({error}). Install it: pip install "sdxs[{extra}]"', err=True)
        sys.exit(5)

    return explain


app = _Commands(name="sdxs", help=HELP, no_args_is_help=True)


def main() -> None:
    """Run the command line; every error of ours is a sentence and an exit code, never a traceback."""
    try:
        app(standalone_mode=False)
    except SdxsError as error:
        click.echo(f"sdxs: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("sdxs: interrupted", err=True)
        sys.exit(130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
