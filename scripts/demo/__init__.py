"""What scripts/train_demo.py learns from. Not installed."""
