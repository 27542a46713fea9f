// A client of LlmService that knows proto/llm.proto and nothing else of this repository.
//
//   node client.js submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   node client.js watch llmjob-u-r [resume_token]
//   node client.js cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr. A watch is
// opened again after LLM_IDLE_SECONDS, by default 60, without a message: more than the gateway's GATEWAY_KEEPALIVE.
// The other calls have LLM_TIMEOUT_SECONDS, by default 30, to be answered.
//
// connection.js says how to use TLS and credentials.
'use strict';

const { setTimeout: delay } = require('node:timers/promises');
const { grpc, call, connect, parseJob, retryDelay } = require('./connection.js');

const ADDRESS = process.env.LLM_ADDRESS ?? '127.0.0.1:50051';
const IDLE_MS = Number(process.env.LLM_IDLE_SECONDS ?? 60) * 1000;
const RETRY_MS = 1000;
// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
const TRIES = 60;
const FIRST_TRIES = 5;
// All pass by themselves: a gateway that restarts or is cut off, or that just stops.
const PASSING = [grpc.status.UNAVAILABLE, grpc.status.CANCELLED];
// What gRPC makes of a stream that a proxy resets. The gateway's own errors have details.
const RESET = [grpc.status.INTERNAL, grpc.status.UNKNOWN];
const FINAL_STATES = ['SUCCEEDED', 'FAILED', 'CANCELLED', 'TIMED_OUT'].map((name) => `JOB_STATE_${name}`);

// Follows a job to its end and returns the last message: the final status and the result. A stream that breaks is
// opened again where it broke, so that `onMessage` sees every byte of the output once. Throws an error that does not pass
// by itself, or not in time.
async function watch(client, workflowId, token, onMessage) {
  let failures = 0;
  let tries = FIRST_TRIES;
  let offset = 0;
  for (;;) {
    const stream = client.StreamStatus({ workflow_id: workflowId, resume_token: token });
    let silent = false;
    const silence = setTimeout(() => {
      silent = true;
      stream.cancel();
    }, IDLE_MS);
    let last;
    try {
      for await (const message of stream) {
        silence.refresh();
        // Each stream begins with the status, which the last stream may have brought already.
        if (last || message.delta) failures = 0;
        tries = TRIES;
        offset = message.next_offset;
        token = message.resume_token || token;
        onMessage(message);
        last = message;
      }
      // Output may follow a first message with a final status.
      if (FINAL_STATES.includes(last?.status?.state) && (last.result || !last.delta)) return last;
      throw { code: grpc.status.UNAVAILABLE, details: 'the stream ended before the job did' };
    } catch (error) {
      // A job may be silent for hours: a stream that has begun and fallen silent has not failed.
      if (silent && last) {
        failures = 0;
        continue;
      }
      failures += 1;
      const asked = retryDelay(error);
      // Without RetryInfo it is a limit of gRPC's, such as a message's size.
      const full = error.code === grpc.status.RESOURCE_EXHAUSTED && asked !== undefined;
      if (full) tries = TRIES;
      const reset = RESET.includes(error.code) && !error.metadata?.get('grpc-status-details-bin').length;
      if (!(full || reset || PASSING.includes(error.code)) || failures >= tries) throw error;
      note(`${error.details}; going on at byte ${offset}`);
      await delay(asked ?? RETRY_MS);
    } finally {
      clearTimeout(silence);
    }
  }
}

let shown;
let inLine = false;

// Writes the output, and each new state.
function show({ delta, status }) {
  if (delta?.rewind) note(`the job started over: what follows replaces the output from byte ${delta.offset}`);
  if (delta) {
    process.stdout.write(delta.text);
    inLine = !delta.text.endsWith('\n');
  }
  if (status && status.state !== shown) {
    shown = status.state;
    note(shown);
  }
}

// Writes a line to stderr. On a terminal it does not continue a line of the output.
function note(line) {
  console.error(inLine ? `\n${line}` : line);
  inLine = false;
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
      const { status } = await watch(client, args[0], args[1] ?? '', show);
      if (status.error) console.error(status.error.message);
      return status.state === 'JOB_STATE_SUCCEEDED' ? 0 : 1;
    }
    case 'cancel': {
      const { status } = await call(client, 'Cancel', { workflow_id: args[0], reason: args[1] });
      console.log(status.cancel_requested ? 'cancel requested' : status.state);
      return 0;
    }
    default:
      console.error('usage: node client.js submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]');
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
