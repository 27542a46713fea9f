// The page of a batch or a pipeline, which is rendered again when its stream brings a change.
import { announce, enhance } from "./console.js";
import { Events, pause } from "./events.js";
import { renew } from "./refresh.js";

const item = document.querySelector("[data-stream]");
let state = item.dataset.state, renewing = false, again = false;

new Events(item.dataset.stream, document.getElementById("connection"), async ({ status }) => {
  // A message of a pipeline may have its steps alone.
  if (status) state = status.state;
  again = true;
  if (renewing) return;
  renewing = true;
  const before = item.dataset.state;
  // The server may still show the state before.
  for (let round = 0; round < 60 && (again || item.dataset.state !== state); round++) {
    if (!again) await pause(Math.min(250 * 2 ** round, 5000));
    again = false;
    await renew(document.querySelectorAll("[data-live]"), enhance);
  }
  renewing = false;
  if (item.dataset.state !== before) announce(`The ${item.id}: ${item.querySelector(".badge").textContent}`);
});
