// The till: sales, closings under a table lock, and a session that holds the lock for others to wait.
import { count, euros, onClick, part, write } from "./dom.js";
import { send, shown } from "./http.js";
import { report } from "./log.js";

const CENTS = 300;
const PATIENCE = 3;
const SECONDS = 5;

/** Wire the buttons. */
export function start() {
  onClick(part("sell"), sell);
  onClick(part("close-till"), close);
  onClick(part("hold-till"), hold);
}

/** Show the open sales, and the session that holds the till. */
export function showTill(till) {
  const element = part("till");
  element.dataset.cents = till.cents;
  element.dataset.sales = till.sales;
  element.dataset.held = till.held_by ?? "";
  write(element, `${count(till.sales, "open sale")} · ${euros(till.cents)}`);
  element.classList.toggle("is-held", till.held_by !== null);
}

async function sell() {
  tell("A sale is on its way …");
  const start = performance.now();
  const answer = await send("POST", "/till/sales", { cents: CENTS });
  const waited = ((performance.now() - start) / 1000).toFixed(1);
  if (answer.ok) done("sell", `Sale ${answer.body} is stored, after ${waited} s.`);
  else failed("sell", "The sale was not stored.", answer);
}

async function close() {
  tell("A closing asks for the lock …");
  const answer = await send("POST", `/till/closings?patience=${PATIENCE}`);
  if (answer.ok) {
    const { id, sales, cents } = answer.body;
    done("close-till", `Closing ${id} has counted ${count(sales, "sale")}, ${euros(cents)}; none was missed.`);
  } else {
    const isLocked = answer.body?.detail?.blockers !== undefined;
    const locked = `The lock was not free within ${PATIENCE} s; the error names its holder.`;
    failed("close-till", isLocked ? locked : "The till was not closed.", answer, isLocked);
  }
}

async function hold() {
  const answer = await send("POST", "/till/holds", { seconds: SECONDS });
  if (answer.ok) done("hold-till", `Session ${answer.body.pid} holds the till for ${SECONDS} s: sell and close now.`);
  else failed("hold-till", "The till is not held by another session.", answer);
}

const tell = (text) => write(document.querySelector('[data-result="till"]'), text);

function done(kind, text) {
  tell(text);
  report(kind, "done", text);
}

function failed(kind, text, answer, isLocked = false) {
  tell(isLocked ? text : answer.text);
  report(kind, "failed", text, [["client got", shown(answer)]]);
}
