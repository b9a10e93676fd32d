"""Serving a dialled model: an OpenAI-compatible ingress with an operator's policy, in front of Ray Serve's vLLM servers."""
