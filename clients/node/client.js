// A client of LlmService that knows proto/llm.proto and nothing else of this repository.
//
//   node client.js submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   node client.js watch llmjob-u-r [output_offset]
//   node client.js cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
'use strict';

const path = require('node:path');
const { setTimeout: delay } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const ROOT = path.join(__dirname, '..', '..');
const ADDRESS = process.env.LLM_ADDRESS ?? '127.0.0.1:50051';
const RETRY_MS = 1000;
// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
const TRIES = 60;
const FIRST_TRIES = 5;
// All pass by themselves: a gateway that restarts or is cut off, that serves its limit of streams, that just stops.
const PASSING = [grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED, grpc.status.CANCELLED];

function connect(address) {
  const definition = loader.loadSync('llm.proto', {
    includeDirs: [path.join(ROOT, 'proto'), path.join(ROOT, 'third_party', 'googleapis')],
    keepCase: true,
    enums: String,
    // Offsets and token counts are far below 2^53.
    longs: Number,
    defaults: true,
  });
  const { LlmService } = grpc.loadPackageDefinition(definition).llm.v1;
  return new LlmService(address, grpc.credentials.createInsecure(), { 'grpc.keepalive_time_ms': 30000 });
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

// Follows a job to its end and returns the last message: the final status and the result. A stream that breaks is
// opened again where it broke, so that `onMessage` sees every byte of the output once. Throws an error that does not pass
// by itself, or not in time.
async function watch(client, workflowId, offset, onMessage) {
  let failures = 0;
  let tries = FIRST_TRIES;
  let token = '';
  for (;;) {
    try {
      let last;
      const place = { output_offset: offset, resume_token: token };
      for await (last of client.StreamStatus({ workflow_id: workflowId, ...place })) {
        ({ next_offset: offset, resume_token: token } = last);
        failures = 0;
        tries = TRIES;
        onMessage(last);
      }
      return last;
    } catch (error) {
      failures += 1;
      if (error.code === grpc.status.RESOURCE_EXHAUSTED) tries = TRIES;
      if (!PASSING.includes(error.code) || failures === tries) throw error;
      console.error(`${error.details}; going on at byte ${offset}`);
      await delay(RETRY_MS);
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
      const { workflow_id } = await call(client, 'Submit', { job: JSON.parse(args[0]) });
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
    console.error(error.code === undefined ? error : `${grpc.status[error.code]}: ${error.details}`);
    if (error.code === grpc.status.UNAVAILABLE) {
      console.error(`Does a gateway listen at ${ADDRESS}? LLM_ADDRESS names another address.`);
    }
    process.exitCode = 1;
  },
);
