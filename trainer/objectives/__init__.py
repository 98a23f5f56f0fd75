"""One small pure function per equation: tensors in, scalar or gradient out; no network, no randomness, no logging inside."""
