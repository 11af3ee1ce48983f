"""Ranks, engines and everything that communicates between them. The only package that imports DeepSpeed."""
