// A thread for each worker, each with a listener of its own: node node_threads.js HOST PORT WORKERS.
// Needs Node 23.1 or later.

const http = require("node:http");
const { Worker, isMainThread, threadId, workerData } = require("node:worker_threads");

// A path such as /0.08 keeps the worker busy for so many seconds, as a computation would.
function answer(request, response) {
  const end = performance.now() + 1000 * (Number(request.url.slice(1)) || 0);
  while (performance.now() < end);
  response.end(`${threadId}\n`);
}

if (isMainThread) {
  const [host, port, workers] = process.argv.slice(2);
  for (let number = 0; number < workers; number++) {
    new Worker(__filename, { workerData: { host, port } });
  }
} else {
  http.createServer(answer).listen({ ...workerData, reusePort: true });
}
