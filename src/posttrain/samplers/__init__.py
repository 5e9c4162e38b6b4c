"""Who writes tokens: the native sampler, and the scripted one for tests."""

from __future__ import annotations

from posttrain.samplers.native import NativeSampler
from posttrain.samplers.scripted import Answer, ScriptedSampler

__all__ = ["Answer", "NativeSampler", "ScriptedSampler"]
