"""What is told of a run while it goes on and kept after it: progress bars, curves, sample grids, the run folder."""
