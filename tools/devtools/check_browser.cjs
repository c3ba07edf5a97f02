// Exits 0 if a browser opens a page and paints it. Arguments: folder with playwright-core, executable, browser arguments.
const { createRequire } = require('node:module');
const path = require('node:path');

const [modules, executablePath, ...args] = process.argv.slice(2);
const { chromium } = createRequire(path.join(modules, 'x.js'))('playwright-core');

(async () => {
  const browser = await chromium.launch({ executablePath, args, headless: true, timeout: 60000 });
  const page = await browser.newPage();
  await page.goto('data:text/html,<title>opened</title><p style="font-family: Nowhere">text <i>\u6587\u5b57</i> \u{1f642}</p>');
  await page.screenshot(); // fonts are looked for here
  const title = await page.title();
  await browser.close();
  process.exit(title === 'opened' ? 0 : 1);
})().catch((error) => {
  console.error(String(error));
  process.exit(1);
});
