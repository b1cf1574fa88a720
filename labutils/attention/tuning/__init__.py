"""Which launch configurations to try, what a compiler makes of each, and which of them a measurement prefers."""
