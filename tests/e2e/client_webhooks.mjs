// Reads webhooks as an app does with openai-node from release 5 on.
//
//     node client_webhooks.mjs FILE       with JSON: `secret`, and `posts`, each with `headers` and `body`
import { readFileSync } from 'node:fs';
import OpenAI from 'openai';

const given = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const client = new OpenAI({ apiKey: 'unused', webhookSecret: given.secret });
for (const { headers, body } of given.posts) {
  const event = await client.webhooks.unwrap(body, headers);
  console.log(event.type, event.data.id);
  try {
    await client.webhooks.unwrap(body.replace('evt_', 'evt-'), headers);
  } catch (error) {
    if (!(error instanceof OpenAI.InvalidWebhookSignatureError)) throw error;
    console.log('refused');
  }
}
