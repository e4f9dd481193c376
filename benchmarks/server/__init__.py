"""What a served bundle stands: load, hostile requests, killed workers, overload. Traffic to loopback only."""
