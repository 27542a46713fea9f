"""Uses langchain-openai, and prints what it received: {"responses": {id: text}, "facts": {...}}.

It creates responses in the background and streams them, and can neither retrieve nor cancel one. So it also prints
{"broken_off": {id: text so far}, "open": [id]}: responses for another client to continue, and to cancel.
"""

import json
import os
import random

from langchain_openai import ChatOpenAI

options = {"model": os.environ["MODEL"], "base_url": os.environ["BASE_URL"], "api_key": "none", "max_tokens": 20}
responses, facts = {}, {"tokens": {}}
for name, model in {
    "chat": ChatOpenAI(**options, stream_usage=True, seed=7),
    "responses": ChatOpenAI(**options, use_responses_api=True),
}.items():
    whole = model.invoke("Go on.")
    responses[whole.response_metadata["id"]] = whole.text
    total = None
    for chunk in model.stream("Go on."):
        total = chunk if total is None else total + chunk
    if (id_ := total.response_metadata.get("id")) is not None:
        responses[id_] = total.text
    else:
        # The stream of a chat completion does not show its id. Its text is that of the same seed.
        facts["streamed"] = total.text == whole.text
    facts["tokens"][name] = [message.usage_metadata["output_tokens"] for message in (whole, total)]


def break_off(max_tokens):
    """Return the id of a response in the background, and the text up to where its stream was left."""
    model = ChatOpenAI(**{**options, "max_tokens": max_tokens}, use_responses_api=True, extra_body={"background": True})
    id_, text, stream = "", "", model.stream("Go on.")
    for _ in range(random.randint(1, 30)):
        chunk = next(stream)
        id_ = id_ or chunk.response_metadata["id"]
        text += chunk.text
    stream.close()
    return id_, text


print(
    json.dumps(
        {
            "responses": responses,
            "facts": facts,
            "broken_off": dict([break_off(300)]),
            "open": [break_off(4000)[0]],
        }
    )
)
