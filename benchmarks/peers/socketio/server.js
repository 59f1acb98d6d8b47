// A peer of the push benchmark: Socket.IO with every client in one room. One request brings events, each is broadcast.
"use strict";
const http = require("node:http");
const { Server } = require("socket.io");

const server = http.createServer((request, response) => {
  if (request.url === "/health/ready") return response.end("ready");
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", () => {
    for (const change of JSON.parse(Buffer.concat(pieces))) {
      io.to("restaurant").emit("order_created", { eventType: "order_created", data: change.data.after });
    }
    response.end("ok");
  });
});
const io = new Server(server, { transports: ["websocket"], perMessageDeflate: false, serveClient: false });
io.on("connection", (socket) => socket.join("restaurant"));
server.listen({ port: Number(process.env.BENCH_PORT), host: "127.0.0.1", backlog: 4096 });
