// The provocations. Each sends the requests that a client would send, and then asks what PostgreSQL
// holds. None relies on what other visitors do: each attempt has a customer of its own.
import { count, onClick, part, write } from "./dom.js";
import { send, shown } from "./http.js";
import { report } from "./log.js";
import { openCase } from "./orders.js";
import { restock } from "./products.js";

const SKU = "kettle";

/** An attempt that cannot be made: a request before it was refused. */
class Refused extends Error {}

/** Wire the buttons. */
export function start() {
  for (const [kind, provoke] of Object.entries(PROVOCATIONS)) {
    onClick(part(`provoke-${kind}`), () => attempt(kind, provoke));
  }
}

async function attempt(kind, provoke) {
  const result = document.querySelector(`[data-result="${kind}"]`);
  write(result, "Under way …");
  try {
    const { kept, title, short, details } = await provoke();
    write(result, `${kept ? "Kept" : "BROKEN"}: ${short}`);
    report(kind, kept ? "kept" : "broken", title, details);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    write(result, error.message);
    report(kind, "failed", "The attempt could not be made.", [["client got", error.message]]);
  }
}

const PROVOCATIONS = {
  "swallowed-error": swallowedError,
  "failing-commit": failingCommit,
  "hundred-waiters": hundredWaiters,
  "killed-connection": killedConnection,
};

async function swallowedError() {
  const { order, customer } = await newCase();
  await needed("POST", "/orders", order);
  const answer = await send("POST", "/mistakes/orders", order);
  const left = await evidence(customer);
  return {
    kept: answer.status === 500 && left.orders === 1 && left.mails === 1,
    title: "An endpoint swallowed an IntegrityError and returned 200.",
    short: `the client got ${answer.status}, the second order is not stored.`,
    details: [
      ["did", "POST /orders with a voucher, then POST /mistakes/orders with the same one"],
      ["client got", shown(answer)],
      ["PostgreSQL has", `${holdings(left)}: those of the first request alone`],
    ],
  };
}

async function failingCommit() {
  const { order, customer } = await newCase();
  const answer = await send("POST", "/mistakes/parcels", order);
  const left = await evidence(customer);
  return {
    kept: answer.body?.title === "Conflict" && left.orders === 0 && left.mails === 0 && left.parcels === 0,
    title: "The endpoint returned 201, and the COMMIT failed.",
    short: `the client got ${answer.status}, nothing is stored.`,
    details: [
      ["did", "POST /mistakes/parcels: an order, and a parcel that breaks a deferred constraint"],
      ["client got", shown(answer)],
      ["PostgreSQL has", `${holdings(left)}, ${count(left.parcels, "parcel")}`],
    ],
  };
}

async function killedConnection() {
  const { order, customer } = await newCase();
  const answer = await send("POST", "/mistakes/lost-connections", order);
  const left = await evidence(customer);
  const again = await send("POST", "/orders", order);
  const after = await evidence(customer);
  return {
    kept: answer.status === 503 && left.orders === 0 && left.mails === 0 && again.status === 201 && after.orders === 1,
    title: "PostgreSQL ended the connection in the middle of a transaction.",
    short: `the client got ${answer.status}, then ${again.status}.`,
    details: [
      ["did", "POST /mistakes/lost-connections: an order, then pg_terminate_backend of its connection"],
      ["client got", shown(answer)],
      ["PostgreSQL has", holdings(left)],
      ["then", `POST /orders, the same again: ${shown(again)}; ${holdings(after)}`],
    ],
  };
}

async function hundredWaiters() {
  const { order } = await newCase();
  const placed = await needed("POST", "/orders", order);
  const { body } = await needed("POST", "/waiters", { order_id: placed.body.id, waiters: 100 });
  return {
    kept: body.received === body.waiters && body.watching === 1,
    title: `${body.waiters} clients followed order ${placed.body.id}; then it was paid.`,
    short: `${body.received} of ${body.waiters} served by ${count(body.watching, "connection")}.`,
    details: [
      ["did", `GET /orders/${placed.body.id}/events, ${body.waiters} times at once; PUT /orders/${placed.body.id}/status`],
      ["clients got", `${body.received} of ${body.waiters} received the change, the last after ${body.milliseconds} ms`],
      ["PostgreSQL has", `${count(body.watching, "connection")} that watches; ${body.pool_in_use} of the pool in use meanwhile`],
    ],
  };
}

/** A customer for this attempt alone, and an order of it. */
async function newCase() {
  await restock(SKU);
  const opened = await openCase();
  if (!opened.ok) throw new Refused(shown(opened));
  const { customer_id: customer, voucher } = opened.body;
  return { customer, order: { customer_id: customer, lines: [{ sku: SKU, quantity: 1 }], voucher } };
}

async function needed(method, path, body) {
  const answer = await send(method, path, body);
  if (!answer.ok) throw new Refused(`${answer.request}: ${shown(answer)}`);
  return answer;
}

async function evidence(customer) {
  return (await needed("GET", `/cases/${customer}`)).body;
}

const holdings = (left) => `${count(left.orders, "order")} and ${count(left.mails, "mail")} of this customer`;
