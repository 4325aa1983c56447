"""Everything that is read to train, evaluate or compress: text, pairs, labels, signals."""
