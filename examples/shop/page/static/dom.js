// Small helpers. All text goes through textContent, so none of it is markup.

/** The element with this test id. */
export const part = (name) => document.querySelector(`[data-testid="${name}"]`);

/** A new element with attributes, and with texts or elements in it. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Write a text only where it differs: a screen reader repeats what is written again. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Cents as an amount. */
export const euros = (cents) => `€${(cents / 100).toFixed(2)}`;

/** "1 order", "2 orders". */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** Run `action` at each click. A button that is at work stays in the order of focus and does nothing. */
export function onClick(button, action) {
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    try {
      await action(button);
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
}
