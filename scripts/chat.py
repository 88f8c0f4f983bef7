"""Talk to a model in a terminal: `llama-slots chat`, from a checkout."""

import sys

from llama_slots.command import run

if __name__ == "__main__":
    sys.exit(run("chat", sys.argv[1:], "python scripts/chat.py"))
