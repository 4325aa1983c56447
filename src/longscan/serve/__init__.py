"""Serving a language model over HTTP, in the form that OpenAI's clients speak."""
