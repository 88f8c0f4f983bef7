"""An answer word by word, and how fast it came."""

import time

import api

with api.Client(model="demo") as client:
    started = time.perf_counter()
    times = []
    for chunk in client.chat.completions.create(
        messages=[{"role": "user", "content": "What is a slot?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            if choice.delta.content:
                times.append(time.perf_counter() - started)
                print(choice.delta.content, end="", flush=True)
        if chunk.usage:
            print(f"\nfirst text after {times[0]:.3f} s, {chunk.usage.completion_tokens} tokens in {times[-1]:.3f} s")
