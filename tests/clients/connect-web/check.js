// Calls the gateway as a page does, through Envoy, and prints what it received:
// {"id": workflow id, "output": text, "resumes": how often it came back, "cancelled": state, "refused": {code, details}}.
//
// PROTOCOL is grpc-web or connect, BASE_URL Envoy's address, DESCRIPTORS the file of `protoc -o` for llm.proto.
import { readFileSync } from "node:fs";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";

const { PROTOCOL, BASE_URL: baseUrl, DESCRIPTORS, CREDENTIAL } = process.env;
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(DESCRIPTORS)));
const states = Object.fromEntries(registry.getEnum("llm.v1.JobState").values.map(({ name, number }) => [number, name]));
const authorize = (next) => (request) => {
  request.header.set("authorization", `Bearer ${CREDENTIAL}`);
  return next(request);
};
const options = { baseUrl, interceptors: [authorize], useBinaryFormat: true };
const transport = PROTOCOL === "connect" ? createConnectTransport(options) : createGrpcWebTransport(options);
const client = createClient(registry.getService("llm.v1.LlmService"), transport);

// Reads the job to its end, breaks each stream off after a few messages, and returns its output and its last status.
async function watch(workflowId) {
  let resumeToken = "", output = "", status;
  for (let resumes = 0; ; resumes++) {
    let left = 1 + Math.floor(Math.random() * 8);
    for await (const message of client.streamStatus({ workflowId, resumeToken })) {
      if (message.delta?.rewind) throw new Error("the job has started over");
      output += message.delta?.text ?? "";
      resumeToken = message.resumeToken || resumeToken;
      status = message.status ?? status;
      if (message.result) return { output, resumes, status };
      if (--left === 0) break; // ends the call
    }
  }
}

async function refusal(job) {
  try {
    await client.submit({ job });
  } catch (error) {
    const { code, details } = ConnectError.from(error);
    return { code, details: details.map(({ type }) => type).sort() };
  }
}

const job = { userId: "page", model: "docstrings", prompt: "Go on." };
const submitted = await client.submit({ job: { ...job, requestId: PROTOCOL, params: { maxTokens: 300 } } });
const { output, resumes, status } = await watch(submitted.workflowId);

const long = await client.submit({ job: { ...job, requestId: `${PROTOCOL}-long`, params: { maxTokens: 4000 } } });
for await (const message of client.streamStatus({ workflowId: long.workflowId })) if (message.delta) break;
await client.cancel({ workflowId: long.workflowId, reason: "closed" });
const cancelled = await watch(long.workflowId);

console.log(JSON.stringify({
  id: submitted.workflowId, output, resumes, state: states[status.state],
  cancelled: states[cancelled.status.state], refused: await refusal({ ...job, priority: 9 }),
}));
