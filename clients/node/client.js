// A client of LlmService that knows proto/llm.proto and nothing else of this repository.
//
//   node client.js submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   node client.js watch llmjob-u-r [output_offset]
//   node client.js cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr. A watch is
// opened again after LLM_IDLE_SECONDS, by default 60, without a message: more than the gateway's GATEWAY_KEEPALIVE.
// The other calls have LLM_TIMEOUT_SECONDS, by default 30, to be answered.
//
// LLM_CREDENTIAL is an API key or a token. LLM_CA is the PEM file of the gateway's CA, without which there is no TLS.
// LLM_CERT and LLM_KEY are the PEM files of a client certificate.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const { setTimeout: delay } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const ROOT = path.join(__dirname, '..', '..');
const ADDRESS = process.env.LLM_ADDRESS ?? '127.0.0.1:50051';
const IDLE_MS = Number(process.env.LLM_IDLE_SECONDS ?? 60) * 1000;
const TIMEOUT_MS = Number(process.env.LLM_TIMEOUT_SECONDS ?? 30) * 1000;
const RETRY_MS = 1000;
// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
const TRIES = 60;
const FIRST_TRIES = 5;
// All pass by themselves: a gateway that restarts or is cut off, or that just stops.
const PASSING = [grpc.status.UNAVAILABLE, grpc.status.CANCELLED];
// What gRPC makes of a stream that a proxy resets. The gateway's own errors have details.
const RESET = [grpc.status.INTERNAL, grpc.status.UNKNOWN];
const FINAL_STATES = ['SUCCEEDED', 'FAILED', 'CANCELLED', 'TIMED_OUT'].map((name) => `JOB_STATE_${name}`);
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

// Follows a job to its end and returns the last message: the final status and the result. A stream that breaks is
// opened again where it broke, so that `onMessage` sees every byte of the output once. Throws an error that does not pass
// by itself, or not in time.
async function watch(client, workflowId, offset, onMessage) {
  let failures = 0;
  let tries = FIRST_TRIES;
  let token = '';
  let known;
  for (;;) {
    const stream = client.StreamStatus({ workflow_id: workflowId, output_offset: offset, resume_token: token });
    const silence = setTimeout(() => stream.cancel(), IDLE_MS);
    try {
      let first = true;
      let last;
      for await (last of stream) {
        silence.refresh();
        ({ next_offset: offset, resume_token: token } = last);
        const status = JSON.stringify(last.status);
        // Each stream begins with the status, which may be the one that the last stream has brought.
        if (!first || last.delta || status !== known) failures = 0;
        if (last.status) known = status;
        first = false;
        tries = TRIES;
        onMessage(last);
      }
      // Output may follow a first message with a final status.
      if (FINAL_STATES.includes(last?.status?.state) && (last.result || !last.delta)) return last;
      throw { code: grpc.status.UNAVAILABLE, details: 'the stream ended before the job did' };
    } catch (error) {
      const asked = retryDelay(error);
      failures += 1;
      // Without RetryInfo it is a limit of gRPC's, such as a message's size.
      const limited = error.code === grpc.status.RESOURCE_EXHAUSTED && asked !== undefined;
      if (limited) tries = TRIES;
      const reset = RESET.includes(error.code) && !error.metadata?.get('grpc-status-details-bin').length;
      if (!(limited || reset || PASSING.includes(error.code)) || failures >= tries) throw error;
      console.error(`${error.details}; going on at byte ${offset}`);
      await delay(asked ?? RETRY_MS);
    } finally {
      clearTimeout(silence);
    }
  }
}

function show({ delta, status }) {
  if (delta?.rewind) console.error(`the job started over: what follows replaces the output from byte ${delta.offset}`);
  if (delta) process.stdout.write(delta.text);
  if (status) console.error(status.state, status.progress ? `${Math.round(status.progress.percent)} %` : '');
}

async function main([command, ...args]) {
  const client = connect(ADDRESS);
  switch (command) {
    case 'submit': {
      const { workflow_id } = await call(client, 'Submit', { job: parseJob(args[0]) });
      console.log(workflow_id);
      return 0;
    }
    case 'watch': {
      const { status } = await watch(client, args[0], Number(args[1] ?? 0), show);
      if (status.error) console.error(status.error.message);
      return status.state === 'JOB_STATE_SUCCEEDED' ? 0 : 1;
    }
    case 'cancel': {
      const { status } = await call(client, 'Cancel', { workflow_id: args[0], reason: args[1] });
      console.log(status.cancel_requested ? 'cancel requested' : status.state);
      return 0;
    }
    default:
      console.error('usage: node client.js submit JOB_AS_JSON | watch WORKFLOW_ID [OFFSET] | cancel WORKFLOW_ID [REASON]');
      return 2;
  }
}

main(process.argv.slice(2)).then(
  (status) => {
    process.exitCode = status;
  },
  (error) => {
    // grpc-js fills code and details in; anything else is a mistake in the arguments.
    console.error(error.code === undefined ? error.message : `${grpc.status[error.code]}: ${error.details}`);
    if (error.code === grpc.status.UNAVAILABLE) {
      console.error(`Does a gateway listen at ${ADDRESS}? LLM_ADDRESS names another address.`);
    }
    process.exitCode = 1;
  },
);
