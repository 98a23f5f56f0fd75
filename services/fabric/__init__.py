"""What every room shares: a gRPC server inside a Serve replica, peers and how to call them, batching, limits, jobs.

Knows Ray Serve, gRPC and Redis; knows no model and no room.
"""
