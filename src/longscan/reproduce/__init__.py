"""Published experiments on this machine: one file per table or figure of a paper."""
