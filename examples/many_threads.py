"""Threads that share one client and its slots. Who finds no slot free is told at once, and may wait and try again."""

import time
from concurrent.futures import ThreadPoolExecutor

import api

client = api.Client(model="demo", slots=3)
refused = []


def ask(number: int) -> str:
    while True:
        try:
            answer = client.chat.completions.create(
                messages=[{"role": "user", "content": f"What is {number} plus 2?"}], temperature=0, max_tokens=30
            )
            return f"{number} plus 2: {answer.choices[0].message.content}"
        except api.RateLimitError as error:  # code "rate_limit_exceeded"; create(wait=True) stands in line instead
            refused.append(number)
            time.sleep(min(error.retry_after, 0.05))


with ThreadPoolExecutor(8) as threads:
    for line in threads.map(ask, range(1, 9)):
        print(line)
print(f"3 slots, 8 threads: {len(refused)} times no slot was free; now {client.stats().slots_in_use} are taken")
client.close()
