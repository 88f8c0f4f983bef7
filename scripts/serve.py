"""Serve models over HTTP: `llama-slots serve`, from a checkout."""

import sys

from llama_slots.command import run

if __name__ == "__main__":
    sys.exit(run("serve", sys.argv[1:], "python scripts/serve.py"))
