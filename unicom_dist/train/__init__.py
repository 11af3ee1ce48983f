"""Training: the loop, the stages it runs, and how ranks are started and stopped."""
