"""Uses LlamaIndex, and prints what it received: {"responses": {id: text}, "facts": {...}}.

It creates responses in the background and streams them, and can neither retrieve nor cancel one. So it also prints
{"broken_off": {id: text so far}, "open": [id]}: responses for another client to continue, and to cancel.
"""

import json
import os
import random

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike

responses, facts = {}, {}
model = OpenAILike(
    model=os.environ["MODEL"],
    api_base=os.environ["BASE_URL"],
    api_key="none",
    is_chat_model=True,
    max_tokens=20,
    context_window=8192,
)
messages = [ChatMessage(role="user", content="Go on.")]
whole = model.chat(messages)
responses[whole.raw.id], facts["tokens"] = whole.message.content, whole.raw.usage.completion_tokens
*_, last = model.stream_chat(messages)
responses[last.raw.id] = last.message.content


def break_off(max_tokens):
    """Return the id of a response in the background, and the text up to where its stream was left."""
    model = OpenAIResponses(
        model=os.environ["MODEL"],
        api_base=os.environ["BASE_URL"],
        api_key="none",
        max_output_tokens=max_tokens,
        context_window=8192,
        store=True,
        additional_kwargs={"background": True},
    )
    id_, text, stream = "", "", model.stream_chat(messages)
    for _ in range(random.randint(1, 30)):
        chunk = next(stream)
        if chunk.raw.type == "response.created":
            id_ = chunk.raw.response.id
        text += chunk.delta or ""
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
