"""Benchmarks against TRL and transformers: same model, data and mathematics, in one process, in paired rounds."""
