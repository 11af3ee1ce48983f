"""Checkpoints of a running stage, and folders of exported weights."""
