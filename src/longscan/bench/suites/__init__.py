"""What is measured: a file lists cases and contenders."""
