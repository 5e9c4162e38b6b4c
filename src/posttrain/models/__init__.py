"""Language models: loading, saving, the owned forward pass, LoRA and extra heads."""

from __future__ import annotations
