// Relative times, as the server writes them, kept up to date.
export function duration(seconds) {
  if (seconds < 1) return `${Math.max(0, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${(Math.floor(seconds * 10) / 10).toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60), rest = Math.floor(seconds % 60);
  if (minutes < 60) return minutes < 10 && rest ? `${minutes} min ${rest} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} days`;
}

function about(seconds) {
  if (seconds >= 2 * 86400) return `${Math.floor(seconds / 86400)} days`;
  if (seconds >= 3600) return `${Math.floor(seconds / 3600)} h`;
  if (seconds >= 60) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds)} s`;
}

export function showTimes(root) {
  for (const element of root.querySelectorAll("time[data-relative]")) {
    const ago = (Date.now() - Date.parse(element.dateTime)) / 1000;
    const words = Math.abs(ago) < 5 ? "just now" : ago > 0 ? `${about(ago)} ago` : `in ${about(-ago)}`;
    if (element.textContent !== words) element.textContent = words;
  }
}
