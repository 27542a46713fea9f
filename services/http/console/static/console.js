// What every page does: copy buttons, relative times, forms, parts that refresh themselves.
import { refresh } from "./refresh.js";
import { showTimes } from "./times.js";

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const source = button.dataset.copyFrom;
  const text = source ? document.getElementById(source).textContent : button.dataset.copy;
  await copy(text);
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (button.textContent = "Copy"), 1500);
});

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Pages without TLS that are not on loopback have no clipboard.
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

export function announce(words) {
  document.getElementById("announcer").textContent = words;
}

export function enhance(root) {
  for (const button of root.querySelectorAll("button.copy")) button.hidden = false;
  showTimes(root);
}

enhance(document);
setInterval(() => showTimes(document), 5000);

for (const form of document.querySelectorAll("form[data-submit-on-change]")) {
  form.addEventListener("change", (event) => event.target.matches("select") && form.requestSubmit());
  // An empty filter is no filter: the URL has those that are set.
  form.addEventListener("submit", () => {
    for (const field of form.elements) if (field.name && !field.value) field.disabled = true;
  });
  window.addEventListener("pageshow", () => {
    for (const field of form.elements) field.disabled = false;
  });
}

// A second click sends a form once.
for (const form of document.querySelectorAll("form[data-once]")) {
  form.addEventListener("submit", () => form.querySelectorAll("button").forEach((button) => (button.disabled = true)));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  window.addEventListener("pageshow", () => form.querySelectorAll("button").forEach((button) => (button.disabled = false)));
  // Going back loads the page again. It is the same form then, and not the next one.
  if (form.dataset.once) {
    const place = new URL(location.href);
    place.searchParams.set("form", form.dataset.once);
    history.replaceState(history.state, "", place);
  }
}

// The answer to a refused form is at a path that takes only forms.
for (const { dataset } of document.querySelectorAll("[data-page]")) {
  if (location.pathname !== dataset.page) history.replaceState(null, "", dataset.page);
}

for (const part of document.querySelectorAll("[data-refresh]")) refresh(part, enhance);
