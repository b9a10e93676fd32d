"""ctrlray: dialled chat models, from prompts to a served dial, on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
