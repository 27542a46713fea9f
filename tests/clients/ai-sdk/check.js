// Uses Vercel's AI SDK as a program would, and prints what it received: {"responses": {id: text}, "facts": {...}}.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const { BASE_URL: baseURL, MODEL } = process.env;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "durable-llm", baseURL, apiKey: "none", includeUsage: true });
const responses = {};
const facts = { tokens: {} };
const models = {
  responses: openai.responses(MODEL),
  chat: openai.chat(MODEL),
  completion: openai.completion(MODEL),
  compatible: compatible(MODEL),
};

for (const [name, model] of Object.entries(models)) {
  const whole = await generateText({ model, prompt: "Go on.", maxOutputTokens: 20 });
  responses[whole.response.id] = whole.text;
  const stream = streamText({ model, prompt: "Go on.", maxOutputTokens: 20, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  responses[(await stream.response).id] = text;
  facts.tokens[name] = [whole.usage.outputTokens, (await stream.usage).outputTokens];
}

const leaving = new AbortController();
const aborted = streamText({
  model: models.chat, prompt: "Go on.", maxOutputTokens: 4000, abortSignal: leaving.signal, onError: () => {},
});
for await (const part of aborted.fullStream) {
  if (part.type === "text-delta") leaving.abort();
}
facts.aborted = true;
console.log(JSON.stringify({ responses, facts }));
