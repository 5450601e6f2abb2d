// The event stream of this window. It is closed while the window is hidden: a browser has six
// connections for all windows of a server.
import { part, write } from "./dom.js";
import { report } from "./log.js";

const SLOWEST = 5000;
// Heartbeats that may be late before the stream counts as lost: a connection that was cut without
// an end stays open here.
const LATE = 3;

/** Call `handlers[name]` with the value of each event of that name, now and after each reconnection. */
export function follow(handlers) {
  let source = null;
  let pause = 500;
  let timer = 0;
  let wasLost = false;
  let every = 5;
  let silence = 0;

  function open() {
    close();
    source = new EventSource("/live");
    source.onopen = () => {
      pause = 500;
      if (wasLost) report("connection", "done", "The event stream is connected again.");
      wasLost = false;
      show("live");
    };
    // The browser tries again after a broken stream, but not after an error response.
    source.onerror = () => lost("The event stream was lost");
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => {
        heard();
        handle(JSON.parse(event.data));
      });
    }
    source.addEventListener("heartbeat", (event) => {
      every = JSON.parse(event.data).every;
      heard();
    });
    heard();
  }

  function heard() {
    clearTimeout(silence);
    silence = setTimeout(() => lost(`Nothing has arrived for ${LATE * every} s`), 1000 * LATE * every);
  }

  function lost(what) {
    if (!wasLost) report("connection", "failed", `${what}; this window connects again by itself.`);
    wasLost = true;
    show("reconnecting");
    close();
    timer = setTimeout(open, pause);
    pause = Math.min(2 * pause, SLOWEST);
  }

  function close() {
    clearTimeout(timer);
    clearTimeout(silence);
    source?.close();
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      close();
      show("paused");
    } else {
      open();
    }
  });
  addEventListener("pagehide", close);
  open();
}

function show(state) {
  const element = part("connection-state");
  element.dataset.state = state;
  write(element, state);
}
