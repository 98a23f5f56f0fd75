"""The command line: results, refusals, exit codes, and never a traceback."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxs import bundle, cli, images
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from tests import published


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_STORE_URL", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))


def sdxs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `sdxs ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sdxs", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_generate_writes_the_pipelines_image(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "apple.png"
    assert (
        sdxs(monkeypatch, "generate", "red apple", "-o", str(output), "--model", str(tiny_bundle), "--seed", "7", "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["files"] == [str(output)]
    data = output.read_bytes()
    expected = OneStepPipeline.from_bundle(tiny_bundle)("red apple", seed=7)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(expected))
    receipt = json.loads(images.receipt_text(data))
    assert receipt == {"prompt": "red apple", "seed": 7, "model": "tiny", "digest": bundle.read(tiny_bundle).digest}


def test_several_images_are_numbered(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_bundle.parent)
    assert sdxs(monkeypatch, "generate", "a", "-o", str(tmp_path / "a.jpg"), "--model", f"./{tiny_bundle.name}", "-n", "3") == 0
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["a-0.jpg", "a-1.jpg", "a-2.jpg"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "a", "-o", "a.gif"], 2, "output: got 'a.gif'"),
        (["generate", "a", "-o", "a.png", "--model", "nope"], 3, "model 'nope' is not known"),
        (["generate", "a", "-o", "a.png", "--seed", "-1"], 2, "seed: got -1"),
        (["generate", "a", "-o", "a.png", "-n", "17"], 2, "-n"),
        (["generate", "a", "-o", "/proc/none/a.png", "--model", "TINY"], 2, "output"),
        (["generate", "", "-o", "a.png", "--model", "TINY"], 2, "prompt"),
        (["generate", "a", "-o", "a.png", "--server", "127.0.0.1:1"], 6, "sdxs: "),
        (["genrate"], 2, "did you mean 'generate'"),
        (["models", "show", "sha256:" + "0" * 64], 3, "not in the store"),
        (["models", "promote", "tiny", "sha256:12"], 2, "digest"),
        (["models", "rollback", "tiny"], 5, "no earlier bundle"),
        (["models", "publish", "/nowhere"], 3, "there is no folder '/nowhere'"),
        (["serve", "--port", "99999"], 2, "'--port': Input should be less than or equal to 65535"),
        (["serve", "--port", "0"], 2, "'--port': Input should be greater than or equal to 1"),
        (["eval", "emoji", "--images", "0"], 2, "'--images': Input should be greater than or equal to 2"),
        (["train", "scenes", "--workers", "0"], 2, "workers: got '0', allowed: a number, or FEWEST:MOST"),
        (["train", "scenes", "--workers", "4:2"], 2, "workers: got '4:2', allowed: a number, or FEWEST:MOST"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, words: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert sdxs(monkeypatch, *(str(tiny_bundle) if word == "TINY" else word for word in arguments)) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "8500", "::1", "host:http"])
@pytest.mark.parametrize("arguments", [[], ["--port", "8500"]])
def test_a_gateway_address_without_a_port_is_refused(
    address: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDXS_GATEWAY_ADDRESS", address)
    assert sdxs(monkeypatch, "serve", *arguments) == 2
    allowed = "host:port, with a port from 1 to 65535"
    assert capsys.readouterr().err == f"sdxs: SDXS_GATEWAY_ADDRESS: got {address!r}, allowed: {allowed}\n"


@pytest.mark.parametrize("address", ["localhost:1", "0.0.0.0:65535", "[::1]:8500", ":8500"])
def test_gateway_addresses(address: str) -> None:
    assert Settings(gateway_address=address).gateway_address == address


def test_a_bundles_life(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [Path(shutil.copytree(tiny_bundle, tmp_path / f"v{i}")) for i in range(2)]
    digests = []
    for i, folder in enumerate(folders):
        (folder / "card.md").write_text(str(i))
        digests.append(bundle.seal(folder, "tiny", metrics={"top5": i / 2}, lineage={"teacher": "none"}).digest)
        assert sdxs(monkeypatch, "models", "publish", str(folder)) == 0
        assert sdxs(monkeypatch, "models", "promote", "tiny", digests[i]) == 0
    capsys.readouterr()
    sdxs(monkeypatch, "models", "list", "--json")
    listed = [entry for entry in json.loads(capsys.readouterr().out) if entry["where"] == "store"]
    assert [(entry["name"], entry["pointer"], entry["digest"]) for entry in listed] == [("tiny", "prod", digests[1])]
    assert sdxs(monkeypatch, "models", "rollback", "tiny") == 0
    capsys.readouterr()
    sdxs(monkeypatch, "models", "show", "tiny", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["digest"], shown["metrics"], shown["image_size"]) == (digests[0], {"top5": 0.0}, 32)
    sdxs(monkeypatch, "models", "show", "tiny")
    text = capsys.readouterr().out
    assert "32 x 32 pixels" in text
    assert digests[0][-12:] in text.replace("\n", "").replace(" ", "")
    sdxs(monkeypatch, "models", "list")
    assert digests[0][:19] in capsys.readouterr().out


def test_a_plain_folder_is_published_as_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a path or without a slash, with its own name or another; nothing is written into it."""
    folder = published.dreamshaper(tmp_path / "dream")
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    digests = []
    for argument in ("dream", "./dream", str(folder), "./dream?vae=vae_large&name=large"):
        capsys.readouterr()
        assert sdxs(monkeypatch, "models", "publish", argument) == 0
        digests.append(capsys.readouterr().out.strip())
    assert len(set(digests[:3])) == 1 and digests[3] != digests[0]
    assert sorted(folder.rglob("*")) == before
    for name, digest in (("dream", digests[0]), ("large", digests[3])):
        assert sdxs(monkeypatch, "models", "promote", name, digest) == 0
    sdxs(monkeypatch, "models", "show", "large", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "large"


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from sdxs.cli import main
main()
"""


def test_a_missing_extra_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", "red apple", "-o", str(tmp_path / "a.png"), "--model", str(tiny_bundle)]
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 5
    assert ended.stderr == 'sdxs: generate needs torch, which is not installed: pip install "sdxs[model]"\n'


def test_an_address_without_a_port_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SDXS_GATEWAY_ADDRESS", "localhost")
    assert sdxs(monkeypatch, "serve") == 2
    assert "SDXS_GATEWAY_ADDRESS: got 'localhost'" in capfd.readouterr().err
