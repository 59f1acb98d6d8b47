// A peer of the push benchmark: Socket.IO with every client in one room. It broadcasts each event of a request.
"use strict";
const http = require("node:http");
const { Server } = require("socket.io");

const server = http.createServer((request, response) => {
  if (request.url === "/health/ready") return response.end("ready");
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    for (const change of JSON.parse(Buffer.concat(chunks))) {
      io.to("restaurant").emit("order_created", { eventType: "order_created", data: change.data.after });
    }
    response.end("ok");
  });
});
const io = new Server(server, { transports: ["websocket"], perMessageDeflate: false, serveClient: false });
io.on("connection", (socket) => socket.join("restaurant"));
server.listen({ port: Number(process.env.BENCH_PORT), host: "127.0.0.1", backlog: 4096 });
