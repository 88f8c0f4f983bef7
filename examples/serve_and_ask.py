"""Start the HTTP server, and ask it with OpenAI's own client (pip install openai)."""

import re
import subprocess
import sys
from pathlib import Path

import openai

serve = Path(__file__).parents[1] / "scripts" / "serve.py"
server = subprocess.Popen([sys.executable, serve, "--model", "demo", "--port", "0"], stderr=subprocess.PIPE, text=True)
try:
    assert server.stderr is not None
    said = ""  # its first words name the address; they come when the model is loaded
    while (address := re.search(r"Serving \S+ on (\S+/v1);", said)) is None:
        line = server.stderr.readline()
        if not line:
            sys.exit(f"the server did not start:\n{said}")
        said += line
    client = openai.OpenAI(base_url=address[1], api_key="none", max_retries=5)  # retries: when all slots are taken
    for chunk in client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Say 'Test'."}], temperature=0, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print("\nmodels:", ", ".join(model.id for model in client.models.list()))
finally:
    server.terminate()
    server.communicate()
print("the server ended with exit code", server.returncode)
