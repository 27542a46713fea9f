// A stream of a page, which goes on when its front dies, and rests while nobody looks at the page.
const OPEN_AGAIN = 1000, MAX_WAIT = 15000;

export class Events {
  // `take` gets each event, and whether it is the last one. `connection` shows how the stream stands.
  constructor(path, connection, take) {
    this.path = path;
    this.connection = connection;
    this.take = take;
    this.last = "";
    this.wait = OPEN_AGAIN;
    this.ended = false;
    // A browser has six connections to a server. Pages that nobody looks at leave theirs, and continue later.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.leaveSoon() : this.come()));
    this.open();
  }

  leaveSoon() {
    this.leaving = setTimeout(() => {
      this.source?.close();
      this.source = null;
    }, 10000);
  }

  come() {
    clearTimeout(this.leaving);
    if (!this.ended && !this.source) this.open();
  }

  open() {
    const place = this.last ? `?last_event_id=${encodeURIComponent(this.last)}` : "";
    const source = (this.source = new EventSource(this.path + place));
    source.addEventListener("open", () => {
      this.connection.textContent = "live";
      this.wait = OPEN_AGAIN;
    });
    source.addEventListener("update", (event) => this.receive(event));
    source.addEventListener("end", (event) => {
      this.ended = true;
      source.close();
      this.connection.textContent = "";
      this.receive(event);
    });
    source.addEventListener("problem", (event) => {
      const { status, detail } = JSON.parse(event.data);
      source.close();
      this.connection.textContent = detail;
      // The credential has expired. The session may hold a new one, or the page leads to signing in.
      if (status === 401) this.refused();
      else this.ended = true;
    });
    source.addEventListener("error", () => {
      if (this.ended) return;
      this.connection.textContent = "connecting again…";
      // A broken connection is opened again by the browser, with Last-Event-ID. A refused one is not.
      if (source.readyState === EventSource.CLOSED) this.refused();
    });
  }

  receive(event) {
    if (event.lastEventId) this.last = event.lastEventId;
    this.take(JSON.parse(event.data), this.ended);
  }

  async refused() {
    this.source = null;
    await pause(this.wait);
    this.wait = Math.min(2 * this.wait, MAX_WAIT);
    let answer = null;
    try {
      answer = await fetch(location.href, { headers: { "X-Requested-With": "fetch" }, cache: "no-store" });
    } catch {
      // The front is away.
    }
    // What the page shows was deleted, or the session is over: the page says so.
    if (answer && (answer.redirected || [401, 403, 404].includes(answer.status))) return location.reload();
    if (!this.source && !document.hidden) this.open();
  }
}

export function pause(milliseconds) {
  return new Promise((done) => setTimeout(done, milliseconds));
}
