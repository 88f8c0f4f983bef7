"""Which continuation does the model find likelier? Nothing is generated; only the log-probabilities are read.

Two ways to the same numbers: the OpenAI spelling (echo, logprobs, max_tokens=0) and the engine's own.
"""

import api
import llama

PROMPT = "[INST] What is a slot? [/INST]"
ENDINGS = (" A slot is a place for one request", " A slot is a kind of cheese", " request one for place a is slot A")

with api.Client(model="demo") as client:
    for ending in ENDINGS:
        scored = client.completions.create(prompt=PROMPT + ending, max_tokens=0, echo=True, logprobs=0)
        tokens = scored.choices[0].logprobs
        of_ending = [
            logprob
            for offset, logprob in zip(tokens.text_offset, tokens.token_logprobs, strict=True)
            if offset >= len(PROMPT) and logprob is not None
        ]
        print(f"{sum(of_ending):8.2f} in {len(of_ending):2} tokens  {ending}")

with llama.Engine("demo", progress=False) as engine:
    params = llama.SamplingParams(max_tokens=0, prompt_logprobs=0)
    done = engine.generate([PROMPT + ENDINGS[0]], params)[0]
    assert done.prompt_logprobs is not None
    print(f"{sum(entry.logprob for entry in done.prompt_logprobs):8.2f} for the prompt and its ending together")
