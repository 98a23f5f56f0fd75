"""The image decoder as a Ray Serve deployment."""

from services.decoder.service import DESCRIPTOR, load
from services.fabric.replica import StageReplica


class DecoderReplica(StageReplica):
    """Loads the image decoder of one bundle and nothing else of it."""

    descriptor = DESCRIPTOR
    load = staticmethod(load)
