// A process for each worker, each with a listener of its own: node node_cluster.js HOST PORT WORKERS.
// Without reusePort the primary process listens, and hands connections to its workers itself.
// Needs Node 23.1 or later.

const cluster = require("node:cluster");
const http = require("node:http");

// A path such as /0.08 keeps the worker busy for so many seconds, as a computation would.
function answer(request, response) {
  const end = performance.now() + 1000 * (Number(request.url.slice(1)) || 0);
  while (performance.now() < end);
  response.end(`${process.pid}\n`);
}

const [host, port, workers] = process.argv.slice(2);

if (cluster.isPrimary) {
  for (let number = 0; number < workers; number++) cluster.fork();
} else {
  http.createServer(answer).listen({ host, port, reusePort: true });
}
