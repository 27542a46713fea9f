"""Uses LlamaIndex, and prints what it received: {"responses": {id: text}, "facts": {...}}."""

import json
import os

from llama_index.core.llms import ChatMessage
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
print(json.dumps({"responses": responses, "facts": facts}))
