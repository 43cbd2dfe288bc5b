"""Train language models on text full of personal data without memorizing it, and measure what they memorized."""

__version__ = "0.1.0"
