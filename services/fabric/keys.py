"""Where in the store of artifacts things are."""

RESULTS = "results/"
"""<job>/<image>.<ending>; of a batch <job>/<request>/<image>.<ending>."""
INPUTS = "inputs/"
"""<sha256 of the file>: images that steer."""
SCHEME = "sdxs-input:"
"""And the sha256: the name of one of these in requests."""
