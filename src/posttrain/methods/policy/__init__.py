"""The policy's own answers, scored by rewards."""
