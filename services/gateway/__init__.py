"""The gRPC API of the suite, and the worker that runs its workflows."""
