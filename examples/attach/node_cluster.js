// A process for each worker, each with a listener of its own: node node_cluster.js HOST PORT WORKERS.
// Without reusePort the primary process listens, and hands connections to its workers itself.
// Needs Node 23.1 or later.

const cluster = require("node:cluster");
const http = require("node:http");

const [host, port, workers] = process.argv.slice(2);

if (cluster.isPrimary) {
  for (let number = 0; number < workers; number++) cluster.fork();
} else {
  const server = http.createServer((request, response) => response.end(`${process.pid}\n`));
  server.listen({ host, port, reusePort: true });
}
