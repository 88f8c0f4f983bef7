"""`llama-slots weights`: reading, checking, converting and planning checkpoints."""
