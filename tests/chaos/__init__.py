"""Every part of a running server killed and paused under load, and what callers saw of it. `python -m tests.chaos --help`."""
