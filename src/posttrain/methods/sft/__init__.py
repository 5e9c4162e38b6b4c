"""Imitation: a value per demonstrated token."""
