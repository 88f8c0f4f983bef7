"""The demo checkpoint: package data that scripts/train_demo.py writes. Nothing to import."""
