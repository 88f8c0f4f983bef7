"""Many questions at once in one event loop. The engine computes them together; the answers come back in order."""

import asyncio
import time

import api

QUESTIONS = ["What is a slot?", "Who are you?", "What is 2 plus 3?", "Say 'Test'.", "What is a seed?"] * 4


async def main() -> None:
    async with api.AsyncClient(model="demo", slots=8) as client:

        async def ask(question: str) -> str:
            answer = await client.chat.completions.create(
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=40,
                wait=True,  # for one of the 8 slots
            )
            return answer.choices[0].message.content or ""

        started = time.perf_counter()
        answers = await asyncio.gather(*map(ask, QUESTIONS))
        taken = time.perf_counter() - started
        for question, answer in list(zip(QUESTIONS, answers, strict=True))[:5]:
            print(f"{question:28} {answer}")
        stats = client.stats()
        print(f"{len(answers)} answers, {stats.generated_tokens} tokens in {taken:.2f} s and {stats.steps} steps")


asyncio.run(main())
