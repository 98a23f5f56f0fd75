"""The teacher pool: its actors, the client that a worker asks through, and what it costs a cluster."""
