// A job's page: its text as it comes, and the rest of the page as the job changes.
import { announce, enhance } from "./console.js";
import { Events, pause } from "./events.js";
import { refresh, renew } from "./refresh.js";
import { duration } from "./times.js";

const output = document.getElementById("output");
const SHOW_EVERY = 60;

// The text that is held, and its size: deltas have offsets in UTF-8 bytes. It is shown a few times a second, because a
// browser lays out all of it each time.
class Output {
  constructor(element) {
    this.element = element;
    this.node = document.createTextNode("");
    this.text = "";
    this.size = 0;
    this.encoder = new TextEncoder();
    this.waiting = 0;
  }

  add({ offset = 0, text = "" }) {
    const place = Number(offset);
    if (place < this.size) this.cut(place);
    this.text += text;
    this.size += this.encoder.encode(text).length;
    this.waiting ||= setTimeout(() => this.show(), SHOW_EVERY);
  }

  cut(place) {
    const bytes = this.encoder.encode(this.text).subarray(0, place);
    this.text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
    this.size = place;
  }

  replace(text) {
    this.text = text;
    this.size = this.encoder.encode(text).length;
    this.show();
  }

  show() {
    clearTimeout(this.waiting);
    this.waiting = 0;
    const { element, node, text } = this;
    const follows = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
    // What a reader has selected stays selected where text is only added.
    if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
    else node.data = text;
    // Until then the text that the server has rendered is there.
    if (node.parentNode === null) element.replaceChildren(node);
    if (follows) element.scrollTop = element.scrollHeight;
  }
}

// Reads text aloud to screen readers by sentences, not by tokens.
class Speaker {
  constructor(held) {
    this.held = held;
    this.said = 0;
    setInterval(() => this.speak(), 4000);
  }

  speak() {
    const { text } = this.held;
    this.said = Math.min(this.said, text.length);
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => text.lastIndexOf(mark)));
    if (end < this.said) return;
    announce(text.slice(this.said, end + 1).slice(-600));
    this.said = end + 1;
  }
}

class Job {
  constructor() {
    this.held = new Output(output);
    this.renewing = false;
    new Speaker(this.held);
    this.events = new Events(output.dataset.stream, document.getElementById("connection"), (message, ended) => {
      this.take(message);
      if (!ended) return;
      this.held.show();
      this.renew();
    });
  }

  take(message) {
    if (message.delta) {
      this.held.add(message.delta);
      if (message.delta.rewind) document.getElementById("rewound").hidden = false;
    }
    if (message.result && !message.output_omitted) this.held.replace(message.result.output);
    if (message.status) this.show(message.status);
  }

  show(status) {
    this.status = status;
    const { progress } = status;
    if (progress) {
      set("tokens", Number(progress.output_tokens).toLocaleString("en").replaceAll(",", "\u202f"));
      const seconds = (Date.parse(progress.updated_at) - Date.parse(status.first_token_time)) / 1000;
      const tokens = Number(progress.output_tokens) - 1;
      if (seconds > 0 && tokens > 0) set("rate", (tokens / seconds).toFixed(1));
      const bar = document.querySelector("progress");
      if (bar) bar.value = progress.percent;
    }
    if (status.first_token_time) set("first", between(status.create_time, status.first_token_time));
    const queue = document.getElementById("queue");
    if (queue && status.queue && status.state === "JOB_STATE_QUEUED") {
      const { backlog, estimated_wait: estimate } = status.queue;
      const jobs = Number(backlog) === 1 ? "job waits" : "jobs wait";
      queue.textContent = `About ${backlog} ${jobs} for this model, this one included${estimate ? `; about ${duration(parseFloat(estimate))} to wait` : ""}.`;
    }
    if (!this.shown()) this.renew();
  }

  // Whether the page shows the state that the stream has told.
  shown() {
    const { state, attempt, cancel } = document.getElementById("job").dataset;
    const { status } = this;
    return !status || (state === status.state && attempt === String(status.attempt) && cancel === String(status.cancel_requested));
  }

  async renew() {
    if (this.renewing) return;
    this.renewing = true;
    const before = document.getElementById("job").dataset.state;
    for (let round = 0; round < 60; round++) {
      if ((await renew(document.querySelectorAll("[data-live]"), enhance)) && this.shown()) break;
      await pause(Math.min(250 * 2 ** round, 5000));
    }
    this.renewing = false;
    for (const part of document.querySelectorAll("[data-refresh]")) refresh(part, enhance);
    if (document.getElementById("job").dataset.state !== before) announce(`The job: ${document.querySelector("#job .badge").textContent}`);
  }
}

function set(fact, value) {
  const element = document.querySelector(`[data-fact="${fact}"]`);
  if (element) element.textContent = value;
}

function between(start, end) {
  return duration((Date.parse(end) - Date.parse(start)) / 1000);
}

// Time passes while a job is open.
function showDuration() {
  const created = document.querySelector("#job time");
  const element = document.querySelector('[data-fact="duration"]');
  if (job && !job.events.ended && created && element) element.textContent = duration((Date.now() - Date.parse(created.dateTime)) / 1000);
}

const job = output.dataset.stream ? new Job() : null;
setInterval(showDuration, 1000);
