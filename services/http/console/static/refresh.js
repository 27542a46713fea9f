// A part of a page that shows what the server renders now. Only what has changed is replaced, so that focus, selection and
// the place of scrolling stay.
const running = new WeakSet();
const MAX_WAIT = 30000, GROWTH = 1.5;

// Refreshes a part as often as its data-refresh says, in milliseconds, for as long as it has one. The wait grows up to 30 s
// while nothing changes or the server does not answer.
export function refresh(part, enhance) {
  if (running.has(part)) return;
  running.add(part);
  const shortest = () => Number(part.dataset.refresh);
  let waiting = 0, wait = shortest(), updating = false;
  const again = () => {
    clearTimeout(waiting);
    if (part.dataset.refresh && !document.hidden) waiting = setTimeout(update, wait);
  };
  const update = async () => {
    if (updating || !part.dataset.refresh) return;
    updating = true;
    const found = await renew([part], enhance);
    updating = false;
    wait = found?.changed ? shortest() : Math.min(GROWTH * wait, MAX_WAIT);
    if (part.dataset.refresh) return again();
    running.delete(part);
    document.removeEventListener("visibilitychange", onVisibility);
  };
  const onVisibility = () => {
    clearTimeout(waiting);
    if (document.hidden) return;
    wait = shortest();
    update();
  };
  document.addEventListener("visibilitychange", onVisibility);
  again();
}

// Renders the page again at the server and takes over the parts. Returns whether they have changed; null when no page could
// be had, which the page then says.
export async function renew(parts, enhance) {
  const found = await fetchPage();
  document.getElementById("stale").hidden = found !== null;
  if (found === null) return null;
  enhance(found);
  document.title = found.title;
  // Relative times are no change.
  enhance(document);
  const focused = document.activeElement;
  let changed = false;
  for (const part of parts) {
    const fresh = found.getElementById(part.id);
    if (fresh && take(part, fresh)) changed = true;
  }
  // An element that was moved has lost it.
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  return { changed };
}

async function fetchPage() {
  try {
    const answer = await fetch(location.href, { headers: { "X-Requested-With": "fetch" }, cache: "no-store" });
    // The session is over: the page leads to signing in.
    if (answer.status === 401 || answer.redirected) location.reload();
    if (!answer.ok || answer.redirected) return null;
    return new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch {
    // The front is away. The next round finds it again.
    return null;
  }
}

// Makes an element equal to another one. Returns whether it has changed.
function take(old, fresh) {
  if (old.isEqualNode(fresh) || old.dataset?.keep !== undefined) return false;
  const same = old.nodeName === fresh.nodeName && old.nodeType === Node.ELEMENT_NODE;
  if (!same || old.dataset.key !== fresh.dataset.key) {
    old.replaceWith(document.adoptNode(fresh));
    return true;
  }
  let changed = false;
  // What a person has opened stays open.
  for (const { name } of [...old.attributes]) {
    if (fresh.hasAttribute(name) || name === "open") continue;
    old.removeAttribute(name);
    changed = true;
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) === value) continue;
    old.setAttribute(name, value);
    changed = true;
  }
  // A row that has moved is the same row.
  const byKey = new Map();
  for (const child of old.children) if (child.dataset.key) byKey.set(child.dataset.key, child);
  let place = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const known = child.dataset?.key && byKey.get(child.dataset.key);
    if (known && known !== place) {
      old.insertBefore(known, place);
      changed = true;
    }
    const counterpart = known || place;
    if (!counterpart) {
      old.append(document.adoptNode(child));
      changed = true;
      continue;
    }
    if (!known && counterpart.dataset?.key && counterpart.dataset.key !== child.dataset?.key) {
      old.insertBefore(document.adoptNode(child), place);
      changed = true;
      continue;
    }
    place = counterpart.nextSibling;
    if (take(counterpart, child)) changed = true;
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
    changed = true;
  }
  return changed;
}
