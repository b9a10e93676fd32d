"""The one vLLM engine class and its hosts."""
