// A service worker: keeps what the page loads, so that it works offline, and isolates the page, as WebAssembly
// with several threads wants it.

const KEPT = "notes-1";
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event));
});

/** From the network where there is one, or as it was kept. */
async function answer(event) {
  const { request } = event;
  const kept = await caches.open(KEPT);
  let found;
  try {
    found = await fetch(request);
    // Not waited for, and a full disk keeps nothing, but the page works.
    if (found.status === 200) event.waitUntil(kept.put(request, found.clone()).catch(() => {}));
  } catch (error) {
    found = await kept.match(request, { ignoreSearch: true });
    if (!found) throw error;
  }
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}
