"""Imitation and rewards together."""
