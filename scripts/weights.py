"""Look at, check, convert, plan and make checkpoints: `llama-slots weights`, from a checkout."""

import sys

from llama_slots.command import run

if __name__ == "__main__":
    sys.exit(run("weights", sys.argv[1:], "python scripts/weights.py"))
