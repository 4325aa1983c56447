"""Who is measured: longscan, its peers, and the machine's ceilings."""
