// A batch's page, which is rendered anew as the batch changes.
import { announce, enhance } from "./console.js";
import { Events, pause } from "./events.js";
import { renew } from "./refresh.js";

const batch = document.getElementById("batch");
let state = batch.dataset.state, renewing = false, again = false;

new Events(batch.dataset.stream, document.getElementById("connection"), async ({ status }) => {
  state = status.state;
  again = true;
  if (renewing) return;
  renewing = true;
  const before = batch.dataset.state;
  // The server may still show the state before.
  for (let round = 0; round < 60 && (again || batch.dataset.state !== state); round++) {
    if (!again) await pause(Math.min(250 * 2 ** round, 5000));
    again = false;
    await renew(document.querySelectorAll("[data-live]"), enhance);
  }
  renewing = false;
  if (batch.dataset.state !== before) announce(`The batch: ${document.querySelector("#batch .badge").textContent}`);
});
