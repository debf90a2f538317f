"""The rules of point-in-time recovery: pure, synchronous; no I/O, clock or logging."""
