"""Longskip: what long skip connections, and how they are scaled, do to diffusion backbones."""

__version__ = "0.1.0"
