// One headless Chromium for a test session. Each line on stdin, {url, name, job}, calls that function of the page at
// url; each line on stdout is {result} or {error}. Arguments: node_modules, Chromium, an empty folder for its profile.
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [modules, executablePath, profile] = process.argv.slice(2);
const { chromium } = await import(pathToFileURL(`${modules}/playwright-core/index.mjs`));
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
for await (const line of createInterface({ input: process.stdin })) {
  const { url, name, job } = JSON.parse(line);
  const page = await browser.newPage();
  const said = [];
  page.on("console", (message) => said.push(message.text()));
  page.on("pageerror", (error) => said.push(String(error)));
  let answer;
  try {
    await page.goto(url);
    await page.waitForFunction(() => window.ready === true);
    answer = { result: await page.evaluate(([name, job]) => window[name](job), [name, job]) };
  } catch (error) {
    answer = { error: [String(error), ...said].join("\n") };
  }
  await page.close();
  process.stdout.write(JSON.stringify(answer) + "\n");
}
await browser.close();
