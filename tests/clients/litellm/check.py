"""Uses LiteLLM, and prints what it received: {"responses": {id: text}, "facts": {...}}."""

import json
import os
import random

import litellm
from litellm.responses.utils import ResponsesAPIRequestUtils

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


def id_of(response):
    """Return the id that the server gave a response. LiteLLM gives it one of its own, which holds it."""
    return ResponsesAPIRequestUtils.decode_responses_api_response_id(response.id)["response_id"]


places = [{"api_base": os.environ[name], "api_key": "none"} for name in ("BASE_URL", "OTHER_URL")]
options["background"] = True
stream = litellm.responses(input="Go on.", stream=True, max_output_tokens=300, **options)
created, text, last, final, resumes = None, "", -1, None, 0
while final is None:
    left = random.randint(1, 30)
    for event in stream:
        assert event.sequence_number > last
        last = event.sequence_number
        if event.type == "response.created":
            created = event.response
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type == "response.incomplete":
            final = event.response
        left -= 1
        if not left:
            break
    if final is None:
        resumes += 1
        place = places[resumes % 2]
        stream = litellm.get_responses(
            created.id, custom_llm_provider="openai", stream=True, starting_after=last, **place
        )
responses[id_of(created)], facts["resumes"] = text, resumes

response = litellm.responses(input="Go on.", max_output_tokens=4000, **options)
for event in litellm.get_responses(response.id, stream=True, **places[1]):
    if event.type == "response.output_text.delta":
        break
ended = litellm.cancel_responses(response.id, **places[1])
facts["cancelled"] = ended.status
responses[id_of(response)] = "".join(part.text for item in ended.output for part in item.content)
print(json.dumps({"responses": responses, "facts": facts}))
