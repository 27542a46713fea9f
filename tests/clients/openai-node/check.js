// Uses OpenAI's client as a program would, and prints what it received: {"responses": {id: text}, "facts": {...}}.
import OpenAI from "openai";

const { BASE_URL, OTHER_URL, MODEL: model } = process.env;
const clients = [BASE_URL, OTHER_URL].map((baseURL) => new OpenAI({ baseURL, apiKey: "none" }));
const [client] = clients;
const responses = {};
const facts = {};

async function brokenOff() {
  let id, text = "", last, final, resumes = 0;
  const read = async (stream) => {
    let left = 1 + Math.floor(Math.random() * 30);
    for await (const event of stream) {
      if (last !== undefined && event.sequence_number <= last) throw new Error(`event ${event.sequence_number} came twice`);
      last = event.sequence_number;
      if (event.type === "response.created") id = event.response.id;
      if (event.type === "response.output_text.delta") text += event.delta;
      if (["response.completed", "response.incomplete"].includes(event.type)) final = event.response;
      if (event.type === "error") throw new Error(event.message);
      if (--left === 0) break; // ends the connection
    }
  };
  await read(await client.responses.create({ model, input: "Go on.", background: true, stream: true, max_output_tokens: 300 }));
  while (!final) {
    resumes++;
    await read(await clients[resumes % 2].responses.retrieve(id, { stream: true, starting_after: last }));
  }
  if (final.output_text !== undefined && final.output_text !== "" && final.output_text !== text) throw new Error("the texts differ");
  responses[id] = text;
  facts.resumes = resumes;
}

async function cancelled() {
  const response = await client.responses.create({ model, input: "Go on.", background: true, max_output_tokens: 4000 });
  const stream = await client.responses.retrieve(response.id, { stream: true });
  for await (const event of stream) if (event.type === "response.output_text.delta") break;
  const ended = await client.responses.cancel(response.id);
  facts.cancelled = ended.status;
  responses[response.id] = ended.output_text;
}

async function completions() {
  const messages = [{ role: "user", content: "Go on." }];
  const stream = await client.chat.completions.create({
    model, messages, max_completion_tokens: 20, stream: true, stream_options: { include_usage: true },
  });
  let text = "", id;
  for await (const chunk of stream) {
    id = chunk.id;
    text += chunk.choices[0]?.delta.content ?? "";
    if (chunk.usage) facts.streamedTokens = chunk.usage.completion_tokens;
  }
  responses[id] = text;
  const whole = await client.chat.completions.create({ model, messages, max_tokens: 20 });
  responses[whole.id] = whole.choices[0].message.content;
  facts.tokens = whole.usage.completion_tokens;
  const completion = await client.completions.create({ model, prompt: "Go on.", max_tokens: 20 });
  responses[completion.id] = completion.choices[0].text;
}

async function others() {
  facts.models = [];
  for await (const found of client.models.list()) facts.models.push(found.id);
  try {
    await client.responses.create({ model, input: "Hi", tools: [{ type: "web_search" }] });
  } catch (error) {
    facts.refused = [error.constructor.name, error.param];
  }
  const response = await client.responses.create({ model, input: "Hi", max_output_tokens: 3 });
  responses[response.id] = response.output_text;
  const items = await client.responses.inputItems.list(response.id);
  facts.input = items.data.map((item) => item.content[0].text);
}

await brokenOff();
await cancelled();
await completions();
await others();
console.log(JSON.stringify({ responses, facts }));
