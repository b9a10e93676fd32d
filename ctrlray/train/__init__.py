"""Training under Ray Train and DeepSpeed."""
