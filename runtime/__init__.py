"""How a process of the suite lives: start, connection to Temporal, gRPC serving, shutdown."""
