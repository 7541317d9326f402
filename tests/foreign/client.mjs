// A client written from protocol.md alone, on NATS's own packages: `node client.mjs nats://host:port`.
// Prints one JSON object of what it saw; the test judges it.

import { createRequire } from "node:module";

// the packages live where the test has put them, not beside this file
const require = createRequire(`${process.env.FOREIGN_MODULES}/`);
const { connect, headers } = require("@nats-io/transport-node");
const { Svcm, ServiceError } = require("@nats-io/services");

const nc = await connect({ servers: process.argv[2], name: "foreign" });

async function ask(verb, session, body = {}, { admin = false, extra, component = "coordinator" } = {}) {
  const subject = `if.v1.${admin ? "admin." : ""}${component}.${verb}.${session}`;
  const reply = await nc.request(subject, JSON.stringify(body), { timeout: 5000, headers: extra });
  const failed = ServiceError.toServiceError(reply); // by the headers, as any client of micro services does
  return failed
    ? { code: failed.code, sentence: failed.message, header: reply.headers.get("Nats-Service-Error-Code"), body: reply.json() }
    : reply.json();
}

async function all(answers) {
  const found = [];
  for await (const one of answers) found.push(one);
  return found;
}

const seen = {};
const services = new Svcm(nc).client({ strategy: "stall", maxWait: 1000, stall: 300 });
seen.ping = await all(await services.ping("coordinator"));
seen.info = await all(await services.info("coordinator"));

seen.hello = await ask("hello", "js-one", { capabilities: ["wasm"], ttl_s: 30, request_id: "hello-1" });
seen.helloOther = await ask("hello", "js-two", { ttl_s: 30 });
seen.submit = await ask("submit", "js-one", { tasks: [{ id: "JS.1", needs: ["wasm"], payload: { say: "grüß 💥" } }] });
const claim = { task: "JS.1", request_id: "claim-1" };
seen.claim = await ask("claim", "js-one", claim);
seen.retried = await ask("claim", "js-one", claim);
seen.taken = await ask("claim", "js-two", { task: "JS.1" });
seen.renew = await ask("renew", "js-one", { claims: [{ task: "JS.1", fence: seen.claim.fence }] });
const governor = { component: "governor" };
seen.limit = await ask("account", "js-op", { account: "@js-one", limit_micro_usd: 1000 }, { admin: true, ...governor });
seen.reserve = await ask("reserve", "js-one", { hold: "h1", amount_micro_usd: 900, request_id: "r1" }, governor);
seen.short = await ask("spend", "js-one", { entry: "e1", amount_micro_usd: 101 }, governor);
seen.commit = await ask("commit", "js-one", { hold: "h1", amount_micro_usd: 250, request_id: "c1" }, governor);
seen.admit = await ask("admit", "js-one", { breaker: "openai/gpt-x" }, governor);
const report = { breaker: "openai/gpt-x", permit: seen.admit.permit, outcome: "success", latency_s: 0.5 };
seen.report = await ask("report", "js-one", report, governor);
seen.match = await ask("match", "js-one", { needs: ["wasm"] }, governor);
const late = headers();
late.set("If-Deadline-Ms", "0");
seen.late = await ask("list", "js-one", {}, { extra: late });
seen.wrong = await ask("complete", "js-one", { task: "JS.1", fence: seen.claim.fence + 1 });
seen.complete = await ask("complete", "js-one", { task: "JS.1", fence: seen.claim.fence, result: [1, 2.5] });
seen.get = await ask("get", "js-two", { task: "JS.1" });
seen.malformed = await ask("claim", "js-one", { task: 7 });
seen.purge = await ask("purge", "js-one", { task: "JS.1" }, { admin: true });
seen.bye = [await ask("bye", "js-one"), await ask("bye", "js-two")];
seen.stats = await all(await services.stats("coordinator"));

console.log(JSON.stringify(seen));
await nc.drain();
