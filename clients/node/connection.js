// A connection to the gateway, and what its messages are: from proto/llm.proto, read as the program starts.
//
// LLM_CREDENTIAL is an API key or a token. LLM_CA is the PEM file of the gateway's CA, without which there is no TLS.
// LLM_CERT and LLM_KEY are the PEM files of a client certificate.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const ROOT = path.join(__dirname, '..', '..');
const TIMEOUT_MS = Number(process.env.LLM_TIMEOUT_SECONDS ?? 30) * 1000;
const PROTO = loader.loadSync(['llm.proto', 'google/rpc/error_details.proto'], {
  includeDirs: [path.join(ROOT, 'proto'), path.join(ROOT, 'third_party', 'googleapis')],
  keepCase: true,
  enums: String,
  // Offsets and token counts are far below 2^53.
  longs: Number,
  defaults: true,
});

function connect(address) {
  const { LlmService } = grpc.loadPackageDefinition(PROTO).llm.v1;
  return new LlmService(address, channelCredentials(process.env), {
    'grpc.keepalive_time_ms': 30000,
    interceptors: [withCredential(process.env.LLM_CREDENTIAL)],
  });
}

function channelCredentials({ LLM_CA: ca, LLM_CERT: cert, LLM_KEY: key }) {
  if (!ca) return grpc.credentials.createInsecure();
  const [roots, privateKey, chain] = [ca, key, cert].map((file) => (file ? fs.readFileSync(file) : null));
  return grpc.credentials.createSsl(roots, privateKey, chain);
}

// Returns the interceptor that sends a credential with every call.
function withCredential(credential) {
  return (options, nextCall) =>
    new grpc.InterceptingCall(nextCall(options), {
      start(metadata, listener, next) {
        if (credential) metadata.set('authorization', `Bearer ${credential}`);
        next(metadata, listener);
      },
    });
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    const deadline = Date.now() + TIMEOUT_MS;
    client[method](request, { deadline }, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

// Returns the job that the JSON describes. Throws an error that names what is wrong: proto-loader would drop a field that
// it does not know.
function parseJob(text) {
  let job;
  try {
    job = JSON.parse(text);
  } catch (error) {
    throw new Error(`the job is no JSON: ${error.message}`);
  }
  requireKnown(job, 'llm.v1.JobRequest', 'job');
  return job;
}

function requireKnown(value, message, place) {
  const fields = PROTO[message]?.type.field;
  if (!fields || value === null || typeof value !== 'object') return;
  for (const [name, inner] of Object.entries(value)) {
    const field = fields.find((known) => known.name === name);
    if (!field) throw new Error(`${place} has no field ${name}; it has ${fields.map((known) => known.name).join(', ')}`);
    const type = field.typeName.includes('.') ? field.typeName : `llm.v1.${field.typeName}`;
    for (const item of [inner].flat()) requireKnown(item, type, `${place}.${name}`);
  }
}

// Returns the delay in milliseconds that the gateway asks for by RetryInfo, undefined when it asks for none.
function retryDelay(error) {
  const [packed] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!packed) return undefined;
  const { details } = PROTO['google.rpc.Status'].deserialize(packed);
  const info = details.find(({ type_url }) => type_url.endsWith('/google.rpc.RetryInfo'));
  if (!info) return undefined;
  const { retry_delay } = PROTO['google.rpc.RetryInfo'].deserialize(info.value);
  return retry_delay ? retry_delay.seconds * 1000 + retry_delay.nanos / 1e6 : 0;
}

module.exports = { grpc, call, connect, parseJob, retryDelay };
