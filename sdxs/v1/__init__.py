"""Generated from `protos/sdxs/v1` by `make protos`. Do not edit."""
