"""Pairs of answers, one better than the other."""
