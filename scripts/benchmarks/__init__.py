"""The subjects of scripts/bench.py, a module each, and what they share. Not installed."""
