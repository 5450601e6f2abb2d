// Products: how many are left, and their tags, a set of checkboxes that is saved as a whole.
import { onClick, write } from "./dom.js";
import { send, shown } from "./http.js";
import { report } from "./log.js";

const FEW = 3;
const DELIVERY = 25;
const saved = new Map();
const stocks = new Map();
const fieldsets = () => document.querySelectorAll("fieldset[data-sku]");

/** The tags that a product has in the database, as far as this window knows. */
export const tagsOf = (sku) => saved.get(sku) ?? [];

/** Have goods delivered where few are left, so that an order finds some. */
export async function restock(sku) {
  if ((stocks.get(sku) ?? FEW) >= FEW) return;
  const body = { supplier: "The page", lines: [{ sku, quantity: DELIVERY }] };
  const answer = await send("POST", "/deliveries", body);
  report("delivery", answer.ok ? "done" : "failed", `Few ${sku} are left: ${DELIVERY} more were ordered.`, [["client got", shown(answer)]]);
}

/** Wire the buttons. */
export function start() {
  for (const fieldset of fieldsets()) {
    onClick(fieldset.querySelector("[data-save]"), () => save(fieldset));
    fieldset.addEventListener("change", () => {
      fieldset.classList.toggle("is-edited", isEdited(fieldset));
      write(fieldset.querySelector("[data-result]"), "");
    });
  }
}

/** Show what the database has. What this visitor is editing stays as it is. */
export function showProducts(products) {
  const bySku = new Map(products.map((product) => [product.sku, product]));
  for (const fieldset of fieldsets()) {
    const product = bySku.get(fieldset.dataset.sku);
    if (!product) continue;
    write(fieldset.querySelector("[data-stock]"), `${product.stock} of ${product.shelf}`);
    stocks.set(product.sku, product.stock);
    const keep = isEdited(fieldset);
    saved.set(product.sku, product.tags);
    if (!keep) check(fieldset, product.tags);
    fieldset.classList.toggle("is-edited", isEdited(fieldset));
  }
}

async function save(fieldset) {
  const { sku } = fieldset.dataset;
  const tags = checked(fieldset);
  const answer = await send("PUT", `/products/${sku}/tags`, { tags });
  const result = fieldset.querySelector("[data-result]");
  if (!answer.ok) {
    write(result, "not saved");
    report("save-tags", "failed", `The tags of ${sku} were not saved.`, [["client got", shown(answer)]]);
    return;
  }
  saved.set(sku, tags);
  fieldset.classList.remove("is-edited");
  const { added, removed } = answer.body;
  write(result, `${added} added, ${removed} removed`);
  report("save-tags", "done", `${sku}: ${added} added, ${removed} removed by one m2m_set.`);
}

const boxes = (fieldset) => [...fieldset.querySelectorAll("input")];
const checked = (fieldset) => boxes(fieldset).filter((box) => box.checked).map((box) => box.value);
const isEdited = (fieldset) => checked(fieldset).join() !== [...tagsOf(fieldset.dataset.sku)].sort().join();

function check(fieldset, tags) {
  for (const box of boxes(fieldset)) box.checked = tags.includes(box.value);
}
