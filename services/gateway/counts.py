"""What a gateway's sessions have done, as plain numbers."""

from collections import Counter
from dataclasses import dataclass, field

from sdxs.v1 import stream_pb2


@dataclass
class Counts:
    """Of all sessions since the start; `answered` is by what became of a frame: image, error, or the reason it was dropped for."""

    frames: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    refused: int = 0

    def note(self, response: stream_pb2.StreamResponse) -> None:
        """Count the answer to a frame."""
        kind = response.WhichOneof("kind")
        if kind == "dropped":
            name = stream_pb2.DropReason.Name(response.dropped.reason)
            self.answered[name.removeprefix("DROP_REASON_").lower()] += 1
        elif kind == "image" or (kind == "error" and response.error.frame_id):
            self.answered[kind] += 1
