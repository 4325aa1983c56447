"""What the papers share: layers, states, losses, the language model around any mixer."""
