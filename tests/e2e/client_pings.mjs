// What openai-node makes of recorded streams, each played back with keep-alives in other places.
//
//     node client_pings.mjs BASE_URL KIND=COUNT…      against the server of `recordings.replaying`
//
// Fails unless all variants of a kind give the same, with the stream helper and without.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { VERSION } from 'openai/version';

const [baseURL, ...counts] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'any', maxRetries: 0, timeout: 20_000 });
const { runs } = client.beta.threads;
const OLD = VERSION.startsWith('4.');
const outputs = (threadId, body) => (OLD ? [threadId, 'run_1', body] : ['run_1', { thread_id: threadId, ...body }]);

async function collect(source) {
  const items = [];
  for await (const item of source) items.push(item);
  return items;
}

async function byHelper(kind, threadId) {
  const stream =
    kind === 'outputs'
      ? runs.submitToolOutputsStream(...outputs(threadId, { tool_outputs: [] }))
      : runs.stream(threadId, { assistant_id: 'asst_1' });
  const events = await collect(stream);
  return [events, await stream.finalRun(), await stream.finalMessages(), await stream.finalRunSteps()];
}

async function raw(kind, threadId) {
  const answer =
    kind === 'outputs'
      ? runs.submitToolOutputs(...outputs(threadId, { tool_outputs: [], stream: true }))
      : runs.create(threadId, { assistant_id: 'asst_1', stream: true });
  return collect(await answer);
}

for (const each of counts) {
  const [kind, count] = each.split('=');
  for (const read of [byHelper, raw]) {
    const first = await read(kind, `thread_${kind}_0`);
    for (let number = 1; number < Number(count); number++) {
      assert.deepEqual(await read(kind, `thread_${kind}_${number}`), first, `${kind} ${read.name} ${number}`);
    }
  }
  console.log(kind, count, 'variants: all the same');
}
