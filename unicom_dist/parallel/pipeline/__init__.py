"""Pipeline parallelism: schedules as data, what they send, a simulator, the split of the layers, and the runtime."""
