// Who waits for whom, as nested lists: a session stands below the one that it waits for.
import { make, part } from "./dom.js";

/** Draw the tree. */
export function showLocks(roots) {
  const tree = part("lock-tree");
  tree.dataset.waiting = String(roots.length > 0);
  tree.replaceChildren(
    roots.length ? list(roots) : make("p", { class: "empty" }, "Nobody waits."),
  );
}

function list(sessions) {
  return make("ul", {}, ...sessions.map(item));
}

function item(session) {
  const isWaiting = session.seconds !== null;
  const state = isWaiting ? `waits ${session.seconds.toFixed(1)} s` : "is in the way";
  const line = make("p", { class: isWaiting ? "waits" : "blocks" },
    make("b", {}, `pid ${session.pid}`), ` ${session.who} `,
    make("span", { class: "state" }, state),
    make("code", {}, session.what));
  const below = session.waiting.length ? [list(session.waiting)] : [];
  return make("li", { "data-pid": session.pid }, line, ...below);
}
