// What apps do with openai-node, as one story for every release from 4 on.
//
//     node client_story.mjs BASE_URL KEY       from a folder in which `openai` is installed
//
// The server's model is that of `talking_model.py`. Ends with an AssertionError where the story takes another turn.
import assert from 'node:assert/strict';
import { createReadStream, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import OpenAI, { toFile } from 'openai';
import { VERSION } from 'openai/version';

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 20_000 });
const { assistants, threads } = client.beta;
const { messages, runs } = threads;

// From release 5 on the ids above the last one are named in the parameters.
const OLD = VERSION.startsWith('4.');
const at = (threadId, id, body = {}) => (OLD ? [threadId, id, body] : [id, { thread_id: threadId, ...body }]);
const remove = (resource, ...path) => (OLD ? resource.del(...path) : resource.delete(...path));

const GET_WEATHER = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'The weather in a city.',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
};
const WEATHER = { '{"city": "Oslo"}': 'rain in Oslo', '{"city": "Rome"}': 'sun in Rome' };
const BOTH = 'It is rain in Oslo and sun in Rome.';
const TEXT_RUN = [
  'thread.run.created',
  'thread.run.queued',
  'thread.run.in_progress',
  'thread.run.step.created',
  'thread.run.step.in_progress',
  'thread.message.created',
  'thread.message.in_progress',
  'thread.message.delta',
  'thread.message.completed',
  'thread.run.step.completed',
  'thread.run.completed',
];
const CALLING_RUN = [...TEXT_RUN.slice(0, 5), 'thread.run.step.delta', 'thread.run.requires_action'];
const ANSWERED_RUN = ['thread.run.step.completed', ...TEXT_RUN.slice(1)];

const answers = (run) =>
  run.required_action.submit_tool_outputs.tool_calls.map((call) => ({
    tool_call_id: call.id,
    output: WEATHER[call.function.arguments],
  }));
const said = (text) => ({ messages: [{ role: 'user', content: text }] });
const withoutRepeats = (names) => names.filter((name, index) => name !== names[index - 1]);
const textOf = (message) => message.content[0].text.value;

async function collect(source) {
  const items = [];
  for await (const item of source) items.push(item);
  return items;
}

async function refused(kind, promise) {
  const error = await promise.then(
    () => assert.fail('this was not refused'),
    (error) => error,
  );
  assert.ok(error instanceof kind, String(error));
  return error;
}

async function objects() {
  const made = await assistants.create({ model: 'gpt-4o', name: 'Weather', tools: [GET_WEATHER], metadata: { a: 'b' } });
  assert.deepEqual(await assistants.retrieve(made.id), made);
  assert.equal((await assistants.update(made.id, { name: 'Other' })).name, 'Other');
  assert.ok((await collect(assistants.list({ limit: 2 }))).some((each) => each.id === made.id));
  assert.equal((await remove(assistants, made.id)).deleted, true);
  const missing = await refused(OpenAI.NotFoundError, assistants.retrieve(made.id));
  assert.equal(missing.error.message, `No assistant found with id '${made.id}'.`);

  const thread = await threads.create({ ...said('One'), metadata: { a: 'b' } });
  assert.deepEqual((await threads.update(thread.id, { metadata: { c: 'd' } })).metadata, { c: 'd' });
  const message = await messages.create(thread.id, { role: 'user', content: [{ type: 'text', text: 'Two' }] });
  assert.equal(textOf(await messages.retrieve(...at(thread.id, message.id))), 'Two');
  assert.deepEqual((await messages.update(...at(thread.id, message.id, { metadata: { n: '2' } }))).metadata, { n: '2' });
  assert.equal((await remove(messages, ...at(thread.id, message.id))).deleted, true);
  assert.deepEqual((await collect(messages.list(thread.id))).map(textOf), ['One']);
  assert.equal((await remove(threads, thread.id)).object, 'thread.deleted');
  assert.deepEqual((await collect(client.models.list())).map((model) => model.id), ['talker']);
}

async function badRequests() {
  const thread = await threads.create();
  const wrong = await refused(OpenAI.BadRequestError, messages.create(thread.id, { role: 'system', content: 'x' }));
  assert.equal(wrong.error.message, "Invalid value: 'system'. Supported values are: 'user' and 'assistant'.");
  assert.deepEqual([wrong.type, wrong.param, wrong.code], ['invalid_request_error', 'role', 'invalid_value']);
  const stranger = new OpenAI({ baseURL, apiKey: 'sk-stranger', maxRetries: 0 });
  const error = await refused(OpenAI.AuthenticationError, stranger.beta.threads.retrieve(thread.id));
  assert.equal(error.code, 'invalid_api_key');
}

async function pages() {
  const thread = await threads.create();
  const numbers = Array.from({ length: 45 }, (_, number) => String(number));
  for (const content of numbers) await messages.create(thread.id, { role: 'user', content });
  assert.deepEqual((await collect(messages.list(thread.id))).map(textOf), [...numbers].reverse());
  assert.deepEqual((await collect(messages.list(thread.id, { order: 'asc', limit: 7 }))).map(textOf), numbers);
  const first = await messages.list(thread.id, { order: 'asc', limit: 20 });
  assert.deepEqual([first.data.length, first.hasNextPage()], [20, true]);
  const second = await first.getNextPage();
  assert.deepEqual(second.data.map(textOf), numbers.slice(20, 40));
}

async function polledRun(assistant) {
  const thread = await threads.create(said('Count.'));
  const run = await runs.createAndPoll(thread.id, { assistant_id: assistant.id });
  assert.deepEqual([run.status, run.usage.total_tokens], ['completed', 10]);
  const newest = (await messages.list(thread.id)).data[0];
  assert.deepEqual([newest.run_id, textOf(newest)], [run.id, 'One two three.']);
  const steps = await collect(OLD ? runs.steps.list(thread.id, run.id) : runs.steps.list(run.id, { thread_id: thread.id }));
  assert.deepEqual(steps.map((step) => step.type), ['message_creation']);
  const late = await refused(OpenAI.BadRequestError, runs.cancel(...at(thread.id, run.id)));
  assert.equal(late.error.message, "Cannot cancel run with status 'completed'.");
}

async function functionsByPolling(assistant) {
  let run = await threads.createAndRunPoll({ assistant_id: assistant.id, thread: said('Weather in Oslo, Rome?') });
  assert.equal(run.status, 'requires_action');
  const tool_outputs = answers(run);
  const ids = tool_outputs.map((each) => `'${each.tool_call_id}'`);
  const short = { tool_outputs: tool_outputs.slice(0, 1) };
  const few = await refused(OpenAI.BadRequestError, runs.submitToolOutputs(...at(run.thread_id, run.id, short)));
  assert.equal(few.error.message, `Expected tool outputs for call_ids [${ids.join(', ')}], got [${ids[0]}]`);
  const busy = await refused(OpenAI.BadRequestError, runs.create(run.thread_id, { assistant_id: assistant.id }));
  assert.equal(busy.error.message, `Thread ${run.thread_id} already has an active run ${run.id}.`);
  run = await runs.submitToolOutputsAndPoll(...at(run.thread_id, run.id, { tool_outputs }));
  assert.deepEqual([run.status, run.usage.total_tokens], ['completed', 20]);
  assert.equal(textOf((await messages.list(run.thread_id, { limit: 1 })).data[0]), BOTH);
}

async function streamedRun(assistant) {
  const thread = await threads.create(said('Count.'));
  const told = { names: [], created: '', text: '', done: [], ends: 0 };
  const stream = runs
    .stream(thread.id, { assistant_id: assistant.id })
    .on('event', (event) => told.names.push(event.event))
    .on('textCreated', (text) => (told.created += text.value))
    .on('textDelta', (delta) => (told.text += delta.value))
    .on('messageDone', (message) => told.done.push(message.status))
    .on('end', () => (told.ends += 1));
  const final = await stream.finalMessages();
  assert.deepEqual(final.map(textOf), ['One two three.']);
  assert.equal((await stream.finalRun()).status, 'completed');
  assert.deepEqual((await stream.finalRunSteps()).map((step) => step.type), ['message_creation']);
  assert.deepEqual(withoutRepeats(told.names), TEXT_RUN);
  assert.deepEqual([told.text, told.done, told.ends], ['One two three.', ['completed'], 1]);
}

async function streamedFunctions(assistant) {
  // The outputs are submitted while the stream that asked for them is still open, as in the official guide.
  const stream = threads.createAndRunStream({ assistant_id: assistant.id, thread: said('Weather in Oslo, Rome?') });
  const names = [];
  let text = '';
  for await (const event of stream) {
    names.push(event.event);
    if (event.event !== 'thread.run.requires_action') continue;
    const run = event.data;
    const more = runs.submitToolOutputsStream(...at(run.thread_id, run.id, { tool_outputs: answers(run) }));
    more.on('textDelta', (delta) => (text += delta.value));
    for await (const event of more) names.push(event.event);
    assert.deepEqual((await more.finalMessages()).map(textOf), [BOTH]);
  }
  assert.deepEqual(withoutRepeats(names), ['thread.created', ...CALLING_RUN, ...ANSWERED_RUN]);
  assert.equal(text, BOTH);
  const run = await stream.finalRun();
  assert.deepEqual(run.required_action.submit_tool_outputs.tool_calls.length, 2);
}

async function rawStreams(assistant) {
  const thread = await threads.create(said('Weather in Rome?'));
  const events = await collect(await runs.create(thread.id, { assistant_id: assistant.id, stream: true }));
  assert.deepEqual(withoutRepeats(events.map((event) => event.event)), CALLING_RUN);
  const run = events.at(-1).data;
  const body = { tool_outputs: answers(run), stream: true };
  const more = await collect(await runs.submitToolOutputs(...at(thread.id, run.id, body)));
  assert.deepEqual(withoutRepeats(more.map((event) => event.event)), ANSWERED_RUN);
}

async function files() {
  // From memory and from a stream of unknown length; attached, downloaded and deleted.
  const data = Buffer.alloc(500_000, 'afterglow');
  const path = join(tmpdir(), `story-${process.pid}.csv`);
  writeFileSync(path, data);
  const given = [await toFile(data, 'naïve 日本.csv'), createReadStream(path)];
  const names = ['naïve 日本.csv', `story-${process.pid}.csv`];
  for (const [index, part] of given.entries()) {
    const file = await client.files.create({ file: part, purpose: 'assistants' });
    assert.deepEqual([file.filename, file.bytes, file.status], [names[index], data.length, 'processed']);
    assert.deepEqual(await client.files.retrieve(file.id), file);
    const content = await client.files.content(file.id);
    assert.ok(Buffer.from(await content.arrayBuffer()).equals(data));
    const attachments = [{ file_id: file.id, tools: [{ type: 'code_interpreter' }] }];
    const thread = await threads.create({ messages: [{ role: 'user', content: 'Look.', attachments }] });
    assert.deepEqual(thread.tool_resources.code_interpreter.file_ids, [file.id]);
    assert.ok((await remove(client.files, file.id)).deleted);
    await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
  }
  rmSync(path);
}

async function fileSearch() {
  // A store that is filled one by one and in a batch, searched by hand and by an assistant that cites what it found.
  const stores = client.vectorStores;
  const store = await stores.create({ name: 'Handbook' });
  const leave = await toFile(Buffer.from('Everyone has 30 days of leave a year.'), 'leave.md');
  const file = await stores.files.uploadAndPoll(store.id, leave);
  assert.deepEqual([file.status, file.last_error, file.vector_store_id], ['completed', null, store.id]);
  const more = [await toFile(Buffer.from('Tea is at four.'), 'tea.txt'), await toFile(Buffer.from('%PDF-1.4'), 'no.pdf')];
  const batch = await stores.fileBatches.uploadAndPoll(store.id, { files: more });
  assert.deepEqual([batch.status, batch.file_counts.completed, batch.file_counts.failed], ['completed', 1, 1]);
  const failed = await collect(stores.files.list(store.id, { filter: 'failed' }));
  assert.deepEqual(failed.map((each) => each.last_error.code), ['invalid_file']);
  const found = await collect(stores.search(store.id, { query: 'how many days of leave' }));
  assert.deepEqual([found[0].file_id, found[0].filename], [file.id, 'leave.md']);
  const assistant = await assistants.create({
    model: 'gpt-4o',
    tools: [{ type: 'file_search' }],
    tool_resources: { file_search: { vector_store_ids: [store.id] } },
  });
  const thread = await threads.create(said('Search: days of leave'));
  const run = await runs.createAndPoll(thread.id, { assistant_id: assistant.id });
  assert.equal(run.status, 'completed');
  const [newest] = (await messages.list(thread.id, { limit: 1 })).data;
  const [citation] = newest.content[0].text.annotations;
  assert.deepEqual([citation.type, citation.file_citation.file_id], ['file_citation', file.id]);
  assert.equal(textOf(newest).slice(citation.start_index, citation.end_index), citation.text);
  assert.ok((await remove(stores, store.id)).deleted);
  await assert.rejects(stores.retrieve(store.id), OpenAI.NotFoundError);
}

async function uploads() {
  const data = Buffer.alloc(250_000, 'afterglow');
  const about = { bytes: data.length, filename: 'a.txt', mime_type: 'text/plain', purpose: 'assistants' };
  const upload = await client.uploads.create(about);
  const part = async (from, to) =>
    (await client.uploads.parts.create(upload.id, { data: await toFile(data.subarray(from, to), 'part') })).id;
  const second = await part(100_000);
  const part_ids = [await part(0, 100_000), second];
  const done = await client.uploads.complete(upload.id, { part_ids });
  assert.deepEqual([done.status, done.file.bytes], ['completed', data.length]);
  const content = await client.files.content(done.file.id);
  assert.ok(Buffer.from(await content.arrayBuffer()).equals(data));
  assert.equal((await client.uploads.cancel((await client.uploads.create(about)).id)).status, 'cancelled');
}

async function cancelled(assistant) {
  // Leaving a stream does not end the run; cancelling does, and frees the thread.
  const thread = await threads.create(said('Think hard.'));
  let run;
  for await (const event of await runs.create(thread.id, { assistant_id: assistant.id, stream: true })) {
    run = event.data;
    break;
  }
  assert.ok(['queued', 'in_progress'].includes((await runs.retrieve(...at(thread.id, run.id))).status));
  assert.ok(['cancelling', 'cancelled'].includes((await runs.cancel(...at(thread.id, run.id))).status));
  run = OLD ? await runs.poll(thread.id, run.id) : await runs.poll(run.id, { thread_id: thread.id });
  assert.equal(run.status, 'cancelled');
  await messages.create(thread.id, { role: 'user', content: 'Count.' });
  assert.equal((await runs.createAndPoll(thread.id, { assistant_id: assistant.id })).status, 'completed');
}

await objects();
await badRequests();
await pages();
await files();
await fileSearch();
await uploads();
const weather = await assistants.create({ model: 'gpt-4o', instructions: 'Tell the weather.', tools: [GET_WEATHER] });
await polledRun(weather);
await functionsByPolling(weather);
await streamedRun(weather);
await streamedFunctions(weather);
await rawStreams(weather);
await cancelled(weather);
console.log(`openai-node ${VERSION} on node ${process.version}: the story came to its end.`);
