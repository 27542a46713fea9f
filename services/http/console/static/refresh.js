// A part of a page that shows what the server renders now. Only what has changed is replaced, so that focus, selection and
// the place of scrolling stay.
const running = new WeakSet();

// Refreshes a part as often as its data-refresh says, in milliseconds, for as long as it has one.
export function refresh(part, enhance) {
  if (running.has(part)) return;
  running.add(part);
  let waiting = 0;
  const again = () => {
    clearTimeout(waiting);
    if (part.dataset.refresh && !document.hidden) waiting = setTimeout(update, Number(part.dataset.refresh));
    else if (!part.dataset.refresh) running.delete(part);
  };
  const update = async () => {
    if (!part.dataset.refresh) return;
    await renew([part], enhance);
    again();
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(waiting) : update()));
  again();
}

// Renders the page anew at the server and takes over the parts. False when no page could be had.
export async function renew(parts, enhance) {
  let answer;
  try {
    answer = await fetch(location.href, { headers: { "X-Requested-With": "fetch" }, cache: "no-store" });
    // The session is over: the page leads to signing in.
    if (answer.status === 401) location.reload();
    if (!answer.ok || answer.redirected) return false;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    enhance(fresh);
    const focused = document.activeElement;
    for (const part of parts) {
      const found = fresh.getElementById(part.id);
      if (found) take(part, found);
    }
    // An element that was moved has lost it.
    if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    return true;
  } catch {
    // The front is away. The next round finds it again.
    return false;
  }
}

function take(old, fresh) {
  if (old.isEqualNode(fresh) || old.dataset?.keep !== undefined) return;
  const same = old.nodeName === fresh.nodeName && old.nodeType === Node.ELEMENT_NODE;
  if (!same || old.dataset.key !== fresh.dataset.key) return old.replaceWith(document.adoptNode(fresh));
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  // A row that has moved is the same row.
  const byKey = new Map();
  for (const child of old.children) if (child.dataset.key) byKey.set(child.dataset.key, child);
  let place = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const known = child.dataset?.key && byKey.get(child.dataset.key);
    if (known && known !== place) old.insertBefore(known, place);
    const counterpart = known || place;
    if (!counterpart) {
      old.append(document.adoptNode(child));
      continue;
    }
    if (!known && counterpart.dataset?.key && counterpart.dataset.key !== child.dataset?.key) {
      old.insertBefore(document.adoptNode(child), place);
      continue;
    }
    place = counterpart.nextSibling;
    take(counterpart, child);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}
