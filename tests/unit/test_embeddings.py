"""Embeddings kept by caption: equal to encoding anew, whatever is in the cache; bounded in memory; found again on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdxs.errors import InvalidRequest
from trainer.models import embeddings
from trainer.models.conditioning import Conditioning
from trainer.models.embeddings import EmbeddingCache
from trainer.sources import teacher_folder
from trainer.teacher import Teacher

L, D = 5, 8
ROW_BYTES = L * D * 2


class Encoder:
    """Noise seeded by the caption; SDXL's parts too, if asked for. Notes the batches it was given."""

    def __init__(self, pooled: bool = False, scale: float = 1.0) -> None:
        self.pooled, self.scale, self.batches = pooled, scale, list[list[str]]()

    def __call__(self, captions: list[str]) -> Conditioning:
        self.batches.append(captions)
        rows = [torch.randn(L + 1, D, generator=torch.Generator().manual_seed(hash(c) & 0xFFFF)) for c in captions]
        rows_BND = torch.stack(rows) * self.scale
        sizes_B6 = torch.tensor([[4095.0, 1025, 0, 0, 1024, 1024]] * len(captions))
        return Conditioning(rows_BND[:, 1:], *((rows_BND[:, 0], sizes_B6) if self.pooled else ()))


def test_rows_come_in_order_and_each_is_encoded_once() -> None:
    encode = Encoder(pooled=True)
    cache = EmbeddingCache(encode, "clip", batch=3)
    captions = ["b", "a", "b", "c", "d"]
    found, fresh = cache.encode(captions), Encoder(pooled=True)(captions)
    assert encode.batches == [["b", "a", "c"], ["d", "", ""]]
    assert found.pooled_BD is not None and fresh.pooled_BD is not None and found.text_BLD.dtype == torch.float32
    torch.testing.assert_close(found.text_BLD, fresh.text_BLD.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(found.pooled_BD, fresh.pooled_BD.half().float(), rtol=0, atol=0)
    assert found.time_ids_B6 is not None and found.time_ids_B6[0, 0] == 4095
    cache.encode(["a", "d"])
    assert (len(encode.batches), cache.hits, cache.misses) == (2, 3, 4)


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    encode = Encoder()
    cache = EmbeddingCache(encode, "clip", max_bytes=3 * ROW_BYTES, batch=1)
    for caption in "abcad":
        cache.encode([caption])
    assert cache.bytes == 3 * ROW_BYTES
    before = len(encode.batches)
    cache.encode(["a"]), cache.encode(["c"])
    assert len(encode.batches) == before
    cache.encode(["b"])
    assert len(encode.batches) == before + 1


def test_more_in_one_call_than_memory_holds() -> None:
    cache = EmbeddingCache(Encoder(), "clip", max_bytes=ROW_BYTES, batch=2)
    captions = [str(i) for i in range(9)]
    torch.testing.assert_close(cache.encode(captions).text_BLD, Encoder()(captions).text_BLD.half().float(), rtol=0, atol=0)
    assert cache.bytes <= ROW_BYTES


def test_found_on_disk_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 4)
    first = EmbeddingCache(Encoder(pooled=True), "clip", tmp_path, max_bytes=ROW_BYTES)
    captions = [str(i) for i in range(10)]
    expected = first.encode(captions)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert torch.equal(first.encode(captions).text_BLD, expected.text_BLD) and first.misses == 10
    first.flush()
    encode = Encoder()
    again = EmbeddingCache(encode, "clip", tmp_path).encode(captions[::-1])
    assert again.pooled_BD is not None and expected.pooled_BD is not None and not encode.batches
    assert torch.equal(again.text_BLD, expected.text_BLD.flip(0)) and torch.equal(again.pooled_BD, expected.pooled_BD.flip(0))
    EmbeddingCache(encode, "another encoder", tmp_path).encode(["0"])
    assert len(encode.batches) == 1


def test_what_waits_for_company_is_written_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may end without notice: what it computed half a minute ago is not lost with it."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    cache = EmbeddingCache(Encoder(), "clip", tmp_path)
    cache.encode(["a"])
    assert not list(tmp_path.rglob("*.safetensors"))
    now += embeddings.SHARD_S
    cache.encode(["a"])
    encode = Encoder()
    EmbeddingCache(encode, "clip", tmp_path).encode(["a"])
    assert not encode.batches


def test_values_beyond_float16_are_refused_and_bfloat16_takes_them() -> None:
    with pytest.raises(InvalidRequest, match="float16"):
        EmbeddingCache(Encoder(scale=1e5), "clip").encode(["a"])
    assert EmbeddingCache(Encoder(scale=1e5), "clip", kept=torch.bfloat16).encode(["a"]).text_BLD.abs().max() > 65504


def test_what_is_returned_does_not_depend_on_what_is_cached() -> None:
    """Bit for bit, with a real text encoder: alone, in any company, and after eviction. And float16 changes a U-Net's output little."""
    teacher = Teacher(teacher_folder("scenes-teacher"))

    encode = teacher.text.compute
    captions = ["a red circle", "a blue square above a red circle", "a green triangle", "two"]
    whole = EmbeddingCache(encode, "clip").encode(captions)
    cache = EmbeddingCache(encode, "clip", max_bytes=0)
    for i in (3, 0, 2, 1):
        assert torch.equal(cache.encode([captions[i]]).text_BLD[0], whole.text_BLD[i])
    exact, generator = encode(captions).text_BLD, torch.Generator().manual_seed(0)
    size, channels = teacher.unet.config.sample_size, teacher.unet.config.in_channels
    x_BCHW, t_B = torch.randn(4, channels, size, size, generator=generator), torch.tensor([999, 500, 100, 10])
    with torch.no_grad():
        outputs = [teacher.unet(x_BCHW, t_B, text).sample for text in (exact, whole.text_BLD)]
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert error < 5e-4, error
