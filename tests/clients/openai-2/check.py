"""Uses version 2 of OpenAI's client, and prints what it received: {"responses": {id: text}, "facts": {...}}."""

import json
import os
import random

from openai import OpenAI

MODEL = os.environ["MODEL"]
clients = [OpenAI(base_url=os.environ[name], api_key="none") for name in ("BASE_URL", "OTHER_URL")]
client = clients[0]
responses, facts = {}, {}

stream = client.responses.create(model=MODEL, input="Go on.", background=True, stream=True, max_output_tokens=300)
id_, text, last, final, resumes = "", "", -1, None, 0
while final is None:
    left = random.randint(1, 30)
    for event in stream:
        assert event.sequence_number > last
        last = event.sequence_number
        if event.type == "response.created":
            id_ = event.response.id
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type == "response.incomplete":
            final = event.response
        left -= 1
        if not left:
            break
    stream.close()
    if final is None:
        resumes += 1
        stream = clients[resumes % 2].responses.retrieve(id_, stream=True, starting_after=last)
assert final.output_text == text
responses[id_], facts["resumes"] = text, resumes

response = client.responses.create(model=MODEL, input="Go on.", background=True, max_output_tokens=4000)
ended = client.responses.cancel(response.id)
responses[response.id], facts["cancelled"] = ended.output_text, ended.status

chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Go on."}], max_tokens=20)
responses[chat.id], facts["tokens"] = chat.choices[0].message.content, chat.usage.completion_tokens
completion = client.completions.create(model=MODEL, prompt="Go on.", max_tokens=20)
responses[completion.id] = completion.choices[0].text
client.responses.delete(id_)
del responses[id_]
print(json.dumps({"responses": responses, "facts": facts}))
