"""Samples of many shards: read as one tensor, and mapped into memory instead of copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.joined import Joined
from trainer.pairs import Pairs
from trainer.triplets import SampleImages, file_of

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)
SHARDS, ROWS, SHAPE = 6, 1024, (4, 32, 32)  # 48 MB
BYTES = SHARDS * ROWS * 4 * 32 * 32 * 2


@given(sizes=SIZES, data=st.data())
def test_joined_rows_are_those_of_the_whole(sizes: list[int], data: st.DataObject) -> None:
    parts = [torch.randn(size, 2, 3) for size in sizes]
    joined, whole = Joined.of(Joined(parts[:1]), *parts[1:]), torch.cat(parts)
    assert (joined.shape, len(joined), joined.dtype) == (whole.shape, len(whole), whole.dtype)
    rows = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8))
    begin, end = (data.draw(st.integers(0, len(whole))) for _ in range(2))
    assert torch.equal(joined[torch.tensor(rows, dtype=torch.long)], whole[rows])
    assert torch.equal(joined[rows], whole[rows])
    assert torch.equal(joined[begin:end], whole[begin:end])
    assert torch.equal(joined[len(whole) - 1], whole[-1])
    for outside in ([len(whole)], [-1]):
        with pytest.raises(IndexError, match=f"of {len(whole)}"):
            joined[outside]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose row i is i everywhere."""
    made = tmp_path_factory.mktemp("pairs")
    for shard in range(SHARDS):
        rows = torch.arange(shard * ROWS, (shard + 1) * ROWS)
        latent = (rows / 8).half().view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
        captions = {"captions": json.dumps([str(row) for row in rows.tolist()])}
        save_file({"latent": latent, "seed": rows}, made / f"shard-{shard:05}.safetensors", captions)
    return made


def memory(name: str) -> int:
    """Bytes of this process, by the kernel's count."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def grown(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What it gives, and by how much it raised the peak, and the memory that this process shares with no other."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, own = memory("VmRSS"), memory("RssAnon")
    found = work()
    return found, memory("VmHWM") - before, memory("RssAnon") - own


def test_loaded_pairs_take_no_memory_of_their_own(folder: Path) -> None:
    pairs, peak, own = grown(lambda: Pairs.load(folder) + Pairs.load(folder))
    assert len(pairs.captions) == 2 * SHARDS * ROWS
    assert peak < BYTES / 4 and own < BYTES / 8
    drawn, _, own = grown(lambda: [pairs.draw(16, torch.Generator().manual_seed(i)) for i in range(8)][-1])
    assert own < BYTES / 8
    noise_BCHW, latent_BCHW, captions = drawn
    values = (torch.tensor([int(caption) for caption in captions]) / 8).half().float()
    assert torch.equal(latent_BCHW, values.view(-1, 1, 1, 1).expand(16, *SHAPE))
    assert noise_BCHW.shape == latent_BCHW.shape
    whole, peak, _ = grown(lambda: pairs.latent_NCHW[:])
    assert whole.nbytes == 2 * BYTES and peak > BYTES  # what these numbers are when everything is copied


def test_loaded_images_take_no_memory_of_their_own(tmp_path: Path) -> None:
    """Noise, which no format makes small; of an image's number in its first pixel."""
    rng, rows = np.random.default_rng(0), 150
    for shard in range(2):
        images = rng.integers(0, 256, (rows, 128, 128, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(rows) + shard
        files = [file_of(image, "png") for image in images]
        ends = torch.tensor(np.cumsum([len(file) for file in files]))
        save_file({"data": torch.from_numpy(np.concatenate(files)), "end": ends}, tmp_path / f"shard-{shard:05}.safetensors")
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    images, peak, own = grown(lambda: SampleImages.load(tmp_path))
    assert stored > 14e6 and peak < stored / 4 and own < stored / 8
    found = images.take(torch.tensor([0, 149, 150, 299]))
    assert found[:, 0, 0, 0].tolist() == [0, 149, 1, 150] and len(images) == 300
