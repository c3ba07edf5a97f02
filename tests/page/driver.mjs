// Drives the real page in a real browser. One JSON request per line in, one JSON answer per line out.
// Started with one argument, JSON: {url, modules, executable, arguments, settings, viewport}.
import { createRequire } from 'node:module';
import path from 'node:path';
import readline from 'node:readline';

const options = JSON.parse(process.argv[2]);
const { chromium } = createRequire(path.join(options.modules, 'x.js'))('playwright-core');
const LOCAL = ['127.0.0.1', 'localhost'];

const messages = [];
const browser = await chromium.launch({
  executablePath: options.executable,
  args: options.arguments,
  headless: true,
});
const context = await browser.newContext({ viewport: options.viewport, serviceWorkers: 'block' });
await context.route(
  (url) => url.protocol.startsWith('http') && !LOCAL.includes(url.hostname),
  (route) => route.abort(),
);
const page = await context.newPage();
page.on('console', (message) => {
  if (['error', 'warning'].includes(message.type())) {
    messages.push({ kind: message.type(), text: message.text(), url: message.location().url });
  }
});
page.on('pageerror', (error) => messages.push({ kind: 'pageerror', text: String(error.stack ?? error), url: '' }));

const actions = {
  async open() {
    await fetch(`${options.url}/api/settings`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(options.settings),
    });
    await page.goto(options.url, { waitUntil: 'domcontentloaded' });
    // the page loads its first graph last; what a test loads must come after it
    await page.waitForFunction(
      () =>
        window.app?.extensionManager?.workflow?.activeWorkflow &&
        document.querySelector('#graph-canvas') &&
        !document.querySelector('#splash-loader, .p-blockui[aria-busy="true"]'),
      null,
      { timeout: 120000 },
    );
    await page.waitForTimeout(500);
  },

  async load({ workflow, name }) {
    await page.evaluate(([graph, title]) => window.app.loadGraphData(graph, true, true, title), [workflow, name]);
    await page.waitForTimeout(800);
  },

  prompt: () => page.evaluate(async () => (await window.app.graphToPrompt()).output),

  serialize: () => page.evaluate(async () => (await window.app.graphToPrompt()).workflow),

  // ends with the run: {status: 'success' | 'error' | 'interrupted' | 'refused', detail}
  run: ({ timeout }) =>
    page.evaluate(
      (milliseconds) =>
        new Promise((resolve, reject) => {
          const api = window.comfyAPI.api.api;
          const kinds = ['execution_success', 'execution_error', 'execution_interrupted'];
          const end = (result) => {
            clearTimeout(timer);
            for (const kind of kinds) api.removeEventListener(kind, listen);
            resolve(result);
          };
          const listen = (event) => end({ status: event.type.replace('execution_', ''), detail: event.detail });
          const timer = setTimeout(() => reject(new Error(`no end after ${milliseconds} ms`)), milliseconds);
          for (const kind of kinds) api.addEventListener(kind, listen);
          window.app.queuePrompt(0).then((queued) => {
            if (queued === false) end({ status: 'refused', detail: window.app.lastNodeErrors ?? null });
          }, reject);
        }),
      timeout,
    ),

  evaluate: ({ code, argument }) => page.evaluate(`(${code})(${JSON.stringify(argument ?? null)})`),

  async screenshot({ file }) {
    await page.screenshot({ path: file });
  },

  messages: () => messages,

  forget() {
    messages.length = 0;
  },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { action, ...request } = JSON.parse(line);
  let answer;
  try {
    answer = { result: (await actions[action](request)) ?? null };
  } catch (error) {
    answer = { error: String(error.stack ?? error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();
