// Counters of the server, and whether PostgreSQL answers and a tour is under way.
import { count, write } from "./dom.js";
import { report } from "./log.js";

const HINT = "Open this page in a second window: each change appears in both.";
const TOUR = "The tour in the terminal is under way: watch it here. The buttons work when it has ended.";

let answered = true;
let away = "";
let tour = false;
let unread = [];

/** Show the counters. */
export function showCounters(now) {
  set("connections", `${now.connections} / ${now.pool_size}`, `${now.most_connections} at most so far`);
  set("waiters", now.waiters, `on ${count(now.watching, "connection")}, ${now.waiters_served} so far`);
  set("requests", now.requests, `${now.succeeded} succeeded, ${now.refused} refused`);
  set("rolled-back", now.rolled_back, now.rolled_back === 1 ? "transaction" : "transactions");
  set("errors", now.errors, "responses with 5xx");
}

/** Say when PostgreSQL is away, and when it is back. */
export function showDatabase({ answers, error }) {
  if (!answers) away = error === "TimeoutError" ? "PostgreSQL does not answer" : "PostgreSQL cannot be reached";
  if (answers !== answered) {
    if (answers) report("database", "done", "PostgreSQL answers again.");
    else report("database", "failed", `${away}; the shop tries again each second.`);
  }
  answered = answers;
  notice();
}

/** Say which parts of the page wait for a lock on their tables. */
export function showUnread(sections) {
  unread = sections;
  notice();
}

/** Say that a tour is under way. */
export function showTour(state) {
  tour = state.is_under_way;
  notice();
}

const locked = (what) =>
  `Locked by another session: the ${what} cannot be read now, and stay as they were. The lock tree names it.`;

function notice() {
  const text = !answered ? `${away}; the shop tries again.`
    : unread.length ? locked(unread.join(" and ")) : tour ? TOUR : HINT;
  const element = document.querySelector("[data-notice]");
  element.dataset.urgent = String(text !== HINT);
  write(element, text);
}

function set(name, value, note) {
  write(document.querySelector(`[data-count="${name}"]`), String(value));
  write(document.querySelector(`[data-note="${name}"]`), note);
}
