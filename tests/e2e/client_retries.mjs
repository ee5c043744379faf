// What an app does with openai-node, while the answer to each first attempt of a POST gets lost.
//
//     node client_retries.mjs BASE_URL
import assert from 'node:assert/strict';
import OpenAI, { toFile } from 'openai';
import { VERSION } from 'openai/version';

const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'any', maxRetries: 2, timeout: 20_000 });
const { assistants, threads } = client.beta;
const assistant = await assistants.create({ model: 'gpt-4o' });
const thread = await threads.create();
await threads.messages.create(thread.id, { role: 'user', content: 'hi' });
const run = await threads.runs.createAndPoll(thread.id, { assistant_id: assistant.id }, { pollIntervalMs: 10 });
assert.equal(run.status, 'completed');
const names = [];
for await (const event of await threads.runs.create(thread.id, { assistant_id: assistant.id, stream: true })) {
  names.push(event.event);
}
assert.equal(names[0], 'thread.run.created');
assert.ok(names.includes('thread.run.completed'));
// 4.104 itself hangs when it sends a form again: its body is a stream that was read.
if (!VERSION.startsWith('4.')) await client.files.create({ file: await toFile(Buffer.from('abc'), 'a.txt'), purpose: 'assistants' });
console.log('all there');
