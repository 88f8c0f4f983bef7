"""The commands of `llama-slots`. In a checkout, scripts/serve.py, chat.py and weights.py run the same code."""
