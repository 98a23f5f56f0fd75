"""The control room: which bundles are to be served, and the applications they run as."""
