"""The contract itself: stubs match the protos, the protos are well-formed and break nobody."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RELEASED = "protos/released.binpb"
BUF = Path(sys.executable).with_name("buf")


def test_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos/sdxs/v1").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *outputs, *protos], cwd=ROOT, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "sdxs/v1").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "sdxs/v1").glob("*_pb2*")}
    assert made == kept, "run `make protos`"


@pytest.mark.parametrize(
    "check", [["lint"], ["format", "--exit-code", "-d"], ["breaking", "--against", "protos/released.binpb"]]
)
def test_buf_finds_nothing(check: list[str]) -> None:
    done = subprocess.run([BUF, *check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_breaking_changes_are_noticed(tmp_path: Path) -> None:
    """The check itself: another number for a field that clients send must not pass."""
    (tmp_path / "sdxs/v1").mkdir(parents=True)
    for proto in (ROOT / "protos/sdxs/v1").glob("*.proto"):
        text = proto.read_text().replace("string prompt = 1;", "string prompt = 100;")
        (tmp_path / "sdxs/v1" / proto.name).write_text(text)
    against = ["--against", str(ROOT / RELEASED)]
    done = subprocess.run([BUF, "breaking", *against], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 100
    assert 'field "1" with name "prompt"' in done.stdout
