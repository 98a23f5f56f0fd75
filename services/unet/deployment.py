"""The U-Net as a Ray Serve deployment."""

from services.fabric.replica import StageReplica
from services.unet.service import DESCRIPTOR, load


class UNetReplica(StageReplica):
    """Loads the U-Net of one bundle and nothing else of it."""

    descriptor = DESCRIPTOR
    load = staticmethod(load)
