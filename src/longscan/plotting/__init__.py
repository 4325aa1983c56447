"""Figures. matplotlib is an extra and is imported only when something is drawn."""
