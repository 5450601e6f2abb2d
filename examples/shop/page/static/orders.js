// Orders: rows that keep their element, so that focus stays on an order when others arrive. A row is
// moved by a transform, which shifts no layout.
import { euros, make, onClick, part, write } from "./dom.js";
import { send, shown } from "./http.js";
import { report } from "./log.js";
import { restock, tagsOf } from "./products.js";

const NEXT = { placed: "paid", paid: "sent", sent: "received" };
const SKU = "beans";
const rows = new Map();
let customer = null;

/** Wire the button. */
export function start() {
  onClick(part("place-order"), place);
}

/** Show the latest orders, the newest first. */
export function showOrders(orders) {
  const list = part("orders");
  const ids = new Set(orders.map((order) => order.id));
  for (const [id, row] of rows) {
    if (!ids.has(id)) {
      row.remove();
      rows.delete(id);
    }
  }
  let before = list.firstElementChild;
  orders.forEach((order, place) => {
    let row = rows.get(order.id);
    if (!row) {
      row = newRow(order.id);
      rows.set(order.id, row);
      list.insertBefore(row, before);
    } else {
      before = row.nextElementSibling;
    }
    row.style.setProperty("--place", place);
    fill(row, order);
  });
}

function newRow(id) {
  const row = make("li", { class: "order", "data-testid": `order-${id}` },
    make("span", { class: "order-id" }, `#${id}`),
    make("span", { class: "order-lines" }),
    make("span", { class: "order-meta" }),
    make("span", { class: "status", "data-testid": `order-${id}-status` }),
    make("button", { type: "button", class: "order-next" }));
  onClick(row.querySelector("button"), () => moveOn(id, row));
  return row;
}

function fill(row, order) {
  row.dataset.status = order.status;
  write(row.querySelector(".order-lines"), (order.lines ?? "no lines").replace(/(\d+) /g, "$1 × "));
  write(row.querySelector(".order-meta"), [euros(order.total_cents), ...order.tags].join(" · "));
  write(row.querySelector(".status"), order.status);
  const button = row.querySelector("button");
  const next = NEXT[order.status];
  write(button, next ? `Mark ${next}` : "Complete");
  button.setAttribute("aria-label", next ? `Order ${order.id}: mark as ${next}` : `Order ${order.id} is complete`);
  button.classList.toggle("is-over", !next);
}

async function moveOn(id, row) {
  const status = NEXT[row.dataset.status];
  if (!status) return;
  const answer = await send("PUT", `/orders/${id}/status`, { status });
  if (answer.ok) report("move-order", "done", `Order ${id} is ${status}: each window receives it.`);
  else report("move-order", "failed", `Order ${id} was not changed.`, [["client got", shown(answer)]]);
}

/** A customer and a voucher of this window alone, or the answer that refused them. */
export async function openCase() {
  return send("POST", "/cases");
}

async function place() {
  if (customer === null) {
    const opened = await openCase();
    if (!opened.ok) return refused(opened);
    customer = opened.body.customer_id;
  }
  await restock(SKU);
  const body = { customer_id: customer, lines: [{ sku: SKU, quantity: 1 }] };
  const answer = await send("POST", "/orders", body);
  if (!answer.ok) return refused(answer);
  const tags = tagsOf(SKU);
  if (tags.length) await send("PUT", `/orders/${answer.body.id}/tags`, { tags });
  report("place-order", "done", `Order ${answer.body.id} is placed.`, [
    ["client got", "201, after the commit"],
    ["on_commit", "a mail to the customer"],
  ]);
}

function refused(answer) {
  customer = null;
  report("place-order", "failed", "No order was placed.", [["client got", shown(answer)]]);
}
