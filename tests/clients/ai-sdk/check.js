// Uses Vercel's AI SDK as a program would, and prints what it received: {"responses": {id: text}, "facts": {...}}.
//
// It streams responses in the background only where a `fetch` of the program's own asks for it, and can neither retrieve
// nor cancel one. So it also prints {"broken_off": {id: text so far}, "open": [id]}: responses for another client to
// continue, and to cancel.
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

const inBackground = (url, options) =>
  fetch(url, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), background: true }) });
const background = createOpenAI({ baseURL, apiKey: "none", fetch: inBackground }).responses(MODEL);

async function breakOff(maxOutputTokens) {
  const breaking = new AbortController();
  const { fullStream } = streamText({
    model: background, prompt: "Go on.", maxOutputTokens, abortSignal: breaking.signal, includeRawChunks: true,
    onError: ({ error }) => { throw error; },
  });
  let left = 1 + Math.floor(Math.random() * 30), id, text = "";
  for await (const part of fullStream) {
    if (part.type === "raw" && left-- === 0) breaking.abort();
    if (part.type === "raw" && part.rawValue.type === "response.created") id = part.rawValue.response.id;
    if (part.type === "text-delta") text += part.text;
  }
  return [id, text];
}

console.log(JSON.stringify({
  responses, facts, broken_off: Object.fromEntries([await breakOff(300)]), open: [(await breakOff(4000))[0]],
}));
