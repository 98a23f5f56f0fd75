// Images and a stream of frames from an sdxs server: `npm install`, then `node client.js 127.0.0.1:8500 "red apple"`.
// The client is made from protos/ as it runs. Prints a line of JSON for each answer, its image's bytes counted.
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const protos = process.env.SDXS_PROTOS || path.join(__dirname, "..", "..", "protos");
const options = { includeDirs: [protos], longs: String, enums: String, oneofs: true };
const { sdxs } = grpc.loadPackageDefinition(loader.loadSync("sdxs/v1/gateway.proto", options));

const [address, prompt] = process.argv.slice(2);
const client = new sdxs.v1.GatewayService(address, grpc.credentials.createInsecure());
const deadline = () => new Date(Date.now() + 30000);
const tell = (what, facts) => console.log(JSON.stringify({ what, ...facts }));

function generate(request) {
  return new Promise((resolve, reject) =>
    client.Generate(request, { deadline: deadline() }, (error, answer) => (error ? reject(error) : resolve(answer))));
}

function stream(frames) {
  return new Promise((resolve, reject) => {
    const call = client.Stream({ deadline: deadline() });
    call.on("data", ({ image, dropped, state }) => {
      if (image) tell("image", { frame: image.frameId, bytes: image.image.data.length });
      if (dropped) tell("dropped", { frame: dropped.frameId, reason: dropped.reason });
      if (state) tell("state", { phase: state.phase });
    });
    call.on("error", reject);
    call.on("end", resolve);
    call.write({ open: { settings: { prompt, seed: "7" } } });
    for (let id = 1; id <= frames; id++) call.write({ frame: { id: String(id) } });
    call.end();
  });
}

(async () => {
  const answer = await generate({ prompt, seed: "7" });
  tell("generated", { bytes: answer.images[0].data.length, seeds: answer.receipt.seeds });
  await generate({ prompt: "" }).catch((error) =>
    tell("refused", { code: grpc.status[error.code], message: error.details, rich: error.metadata.get("grpc-status-details-bin").length }));
  await stream(3);
  client.close();
})();
