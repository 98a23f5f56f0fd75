"""Facts as metadata: ASCII, within S3's 2 KB, the same again when they are read."""

from hypothesis import given
from hypothesis import strategies as st

from sdxs.store.metadata import decode, encode
from sdxs.v1 import gateway_pb2, stage_pb2
from services.worker.facts import metadata_of

S3_LIMIT = 2048
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4096)


@given(texts, st.integers(0, 2**63 - 1))
def test_any_prompt_fits(prompt: str, seed: int) -> None:
    facts = {"prompt": prompt, "seed": str(seed), "model-digest": "sha256:" + "0" * 64}
    metadata = encode(facts, long="prompt")
    sent = {**metadata, "sha256": "0" * 64}
    assert sum(len(f"x-amz-meta-{name}{value}".encode()) for name, value in sent.items()) <= S3_LIMIT
    assert all(value.isascii() and value.isprintable() and " " not in value for value in metadata.values())
    back = decode(metadata)
    length = back.pop("prompt-characters", None)
    assert back["seed"] == str(seed)
    if length is None:
        assert back["prompt"] == prompt
    else:
        assert int(length) == len(prompt)
        assert prompt.startswith(back["prompt"])


def test_as_much_is_kept_as_fits() -> None:
    short = encode({"prompt": "a" * 1000}, long="prompt")
    assert short == {"prompt": "a" * 1000}
    cut = encode({"prompt": "ä" * 1000}, long="prompt")
    assert cut["prompt-characters"] == "1000"
    size = sum(len(f"x-amz-meta-{name}{value}") for name, value in cut.items())
    assert 1948 - 6 < size <= 1948


def test_facts_of_an_image() -> None:
    stages = [
        stage_pb2.StageTime(stage="unet", compute_seconds=0.0123),
        stage_pb2.StageTime(stage="decoder", compute_seconds=0.5),
    ]
    receipt = gateway_pb2.Receipt(
        prompt="red apple", seeds=[7, 8], model="tiny", model_digest="sha256:1", seconds=0.6, stages=stages, job_queue_seconds=2
    )
    facts = decode(metadata_of("job", 1, receipt))
    assert facts.pop("created").endswith("+00:00")
    assert facts == {
        "prompt": "red apple",
        "seed": "8",
        "model": "tiny",
        "model-digest": "sha256:1",
        "job": "job",
        "seconds": "0.6000",
        "queue-seconds": "2.000",
        "stage-seconds": "unet=0.0123,decoder=0.5000",
    }
