"""Pretrain models that read and draw images."""

__version__ = "0.1.0"
