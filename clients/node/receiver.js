// A receiver of webhooks: verifies what comes by the library of Standard Webhooks, drops repeats, prints each event once.
//
//   WEBHOOK_SECRET=whsec_... node receiver.js [port]
//
// Events go to stdout, a line of JSON each; what is refused, and where it listens, to stderr.
'use strict';

const http = require('node:http');
const { Webhook } = require('standardwebhooks');

const MAX_BYTES = 1024 * 1024;

const webhook = new Webhook(process.env.WEBHOOK_SECRET ?? '');
// A real receiver keeps these where they outlive it, together with what it does about an event.
const seen = new Set();

async function body(request) {
  const chunks = [];
  let size = 0;
  for await (const chunk of request) {
    size += chunk.length;
    if (size > MAX_BYTES) throw new Error('too large');
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}

const server = http.createServer(async (request, response) => {
  try {
    // The text as it came: JSON that was parsed and written again has another signature.
    const event = webhook.verify(await body(request), request.headers);
    if (!seen.has(event.id)) {
      seen.add(event.id);
      console.log(JSON.stringify(event));
    }
    response.writeHead(204).end();
  } catch (error) {
    console.error(`refused: ${error.message}`);
    response.writeHead(400).end();
  }
});
server.listen(Number(process.argv[2] ?? 0), '127.0.0.1', () => console.error(`port ${server.address().port}`));
