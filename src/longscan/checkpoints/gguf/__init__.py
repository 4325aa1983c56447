"""GGUF both ways, with a parser that checks a file before any library touches it."""
