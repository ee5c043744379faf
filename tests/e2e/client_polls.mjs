// The polling helpers of openai-node, and how many requests they take.
//
//     node client_polls.mjs BASE_URL KEY ASSISTANT       from a folder in which `openai` is installed
//
// The server's model calls `get_weather` once, then answers; each answer is held until a poll waits for it.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { VERSION } from 'openai/version';

const [baseURL, apiKey, assistant_id] = process.argv.slice(2);
let asked = [];
const noting = (url, options) => {
  asked.push(options?.method?.toUpperCase() ?? 'GET');
  return fetch(url, options);
};
const OLD = VERSION.startsWith('4.');
const at = (threadId, id, body = {}) => (OLD ? [threadId, id, body] : [id, { thread_id: threadId, ...body }]);
const said = (text) => ({ messages: [{ role: 'user', content: text }] });

const { threads } = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 30_000, fetch: noting }).beta;
let run = await threads.createAndRunPoll({ assistant_id, thread: said('Weather?') });
assert.equal(run.status, 'requires_action');
const [call] = run.required_action.submit_tool_outputs.tool_calls;
const tool_outputs = [{ tool_call_id: call.id, output: 'rain' }];
run = await threads.runs.submitToolOutputsAndPoll(...at(run.thread_id, run.id, { tool_outputs }));
assert.equal(run.status, 'completed');
assert.deepEqual(asked, ['POST', 'GET', 'POST', 'GET']);
asked = [];
run = await threads.runs.createAndPoll(run.thread_id, { assistant_id });
assert.equal(run.status, 'completed');
assert.equal(asked.length, 2);

// An answer that takes longer than this client waits for one. Release 7 does not tell the server how long that is.
const hasty = new OpenAI({ baseURL, apiKey, maxRetries: OLD ? 0 : 1, timeout: 1_500, fetch: noting }).beta.threads;
run = await hasty.createAndRunPoll({ assistant_id, thread: said('Slowly.') });
assert.equal(run.status, 'completed');
