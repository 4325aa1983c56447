"""Models at work: generate, translate, classify, embed, remember."""
