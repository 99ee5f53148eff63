// A thread for each worker, each with a listener of its own: node node_threads.js HOST PORT WORKERS.
// Needs Node 23.1 or later.

const http = require("node:http");
const { Worker, isMainThread, threadId, workerData } = require("node:worker_threads");

if (isMainThread) {
  const [host, port, workers] = process.argv.slice(2);
  for (let number = 0; number < workers; number++) {
    new Worker(__filename, { workerData: { host, port } });
  }
} else {
  const server = http.createServer((request, response) => response.end(`${threadId}\n`));
  server.listen({ ...workerData, reusePort: true });
}
