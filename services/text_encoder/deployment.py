"""The text encoder as a Ray Serve deployment."""

from services.fabric.replica import StageReplica
from services.text_encoder.service import DESCRIPTOR, load


class TextEncoderReplica(StageReplica):
    """Loads the text encoder of one bundle and nothing else of it."""

    descriptor = DESCRIPTOR
    load = staticmethod(load)
