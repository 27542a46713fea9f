"""Uses langchain-openai, and prints what it received: {"responses": {id: text}, "facts": {...}}."""

import json
import os

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
print(json.dumps({"responses": responses, "facts": facts}))
