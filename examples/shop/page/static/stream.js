// The event stream of this window. It is closed while the window is hidden: a browser has six
// connections for all windows of a server.
import { part, write } from "./dom.js";
import { report } from "./log.js";

const SLOWEST = 5000;

/** Call `handlers[name]` with the value of each event of that name, now and after each reconnection. */
export function follow(handlers) {
  let source = null;
  let pause = 500;
  let timer = 0;
  let wasLost = false;

  function open() {
    clearTimeout(timer);
    source?.close();
    source = new EventSource("/live");
    source.onopen = () => {
      pause = 500;
      if (wasLost) report("connection", "done", "The event stream is connected again.");
      wasLost = false;
      show("live");
    };
    source.onerror = () => {
      if (!wasLost) report("connection", "failed", "The event stream was lost; this window connects again by itself.");
      wasLost = true;
      show("reconnecting");
      // The browser tries again after a broken stream, but not after an error response.
      source.close();
      timer = setTimeout(open, pause);
      pause = Math.min(2 * pause, SLOWEST);
    };
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      source?.close();
      show("paused");
    } else {
      open();
    }
  });
  addEventListener("pagehide", () => source?.close());
  open();
}

function show(state) {
  const element = part("connection-state");
  element.dataset.state = state;
  write(element, state);
}
