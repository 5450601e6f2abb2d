// The log of this window: what its buttons did, what the server answered, what PostgreSQL holds.
import { make, part } from "./dom.js";

const MOST = 40;

/**
 * Add an entry.
 * @param {string} kind the name of the button, or "connection"
 * @param {"kept" | "broken" | "done" | "failed"} outcome
 * @param {string} title one line
 * @param {[string, string][]} details pairs of a label and a text
 */
export function report(kind, outcome, title, details = []) {
  const log = part("log");
  log.querySelector(".empty")?.remove();
  const entry = make("article", { class: "entry", "data-kind": kind, "data-outcome": outcome });
  entry.append(
    make("p", { class: "entry-title" },
      make("span", { class: "badge" }, WORDS[outcome]), " ",
      make("time", {}, new Date().toLocaleTimeString("en-GB")), " ",
      make("span", {}, title)),
  );
  if (details.length) {
    const list = make("dl");
    for (const [label, text] of details) list.append(make("dt", {}, label), make("dd", {}, text));
    entry.append(list);
  }
  log.append(entry);
  while (log.children.length > MOST) log.firstElementChild.remove();
  log.scrollTop = log.scrollHeight;
}

const WORDS = { kept: "promise kept", broken: "promise broken", done: "done", failed: "failed" };
