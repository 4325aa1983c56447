"""What every room builds on: configuration, files, progress, threads and signals, optional packages."""
