"""What every process of the suite shares: start, connection to Temporal, gRPC serving, shutdown."""
