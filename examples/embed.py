"""One answer from the demo checkpoint, in this process."""

import api

answer = api.ChatCompletion.create(
    model="demo",
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Say 'Test'."},
    ],
    temperature=0,
)
print(answer.choices[0].message.content)
print(answer.usage)
