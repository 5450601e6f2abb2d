// Requests of this window. An answer is never an exception: a server that is away has the status 0.

// Milliseconds for an answer. The pool and the locks of the shop give up before.
const PATIENCE = 90_000;
const WINDOW = Math.random().toString(36).slice(2);

/**
 * Send a request.
 * @returns {Promise<{ok: boolean, status: number, body: any, text: string, request: string}>}
 */
export async function send(method, path, body) {
  const request = `${method} ${path}`;
  try {
    const headers = { "X-Shop-Window": WINDOW };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method, headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout(PATIENCE),
    });
    const answer = await parsed(response);
    const text = response.ok ? "" : reason(answer);
    return { ok: response.ok, status: response.status, body: answer, text, request };
  } catch (error) {
    const text = error.name === "TimeoutError"
      ? "The shop has not answered in time; what was sent may be stored."
      : "The shop cannot be reached.";
    return { ok: false, status: 0, body: null, text, request };
  }
}

/** What the client got, in words. */
export function shown(answer) {
  if (answer.status === 0) return `no answer: ${answer.text}`;
  return answer.text ? `${answer.status}: ${answer.text}` : String(answer.status);
}

async function parsed(response) {
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function reason(body) {
  const detail = body?.detail ?? body;
  if (typeof detail === "string") return detail;
  return detail?.message ?? "no reason was given";
}
