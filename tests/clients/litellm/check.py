"""Uses LiteLLM, and prints what it received: {"responses": {id: text}, "facts": {...}}."""

import json
import os

import litellm

litellm.telemetry = False
options = {"model": f"openai/{os.environ['MODEL']}", "api_base": os.environ["BASE_URL"], "api_key": "none"}
messages = [{"role": "user", "content": "Go on."}]
responses, facts = {}, {}
whole = litellm.completion(messages=messages, max_tokens=20, **options)
responses[whole.id], facts["tokens"] = whole.choices[0].message.content, whole.usage.completion_tokens
id_, text = "", ""
for chunk in litellm.completion(messages=messages, max_tokens=20, stream=True, **options):
    id_ = id_ or chunk.id
    text += chunk.choices[0].delta.content or ""
responses[id_] = text
response = litellm.responses(input="Go on.", max_output_tokens=20, **options)
facts["responses"] = ["".join(part.text for item in response.output for part in item.content), response.status]
print(json.dumps({"responses": responses, "facts": facts}))
